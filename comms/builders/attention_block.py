"""A block of an attention schedule: one kernel call, over the keys of one team or of several one after the other.

Small blocks do not fill a GPU, and each one's result has to be merged. Where keys and values travel, the blocks of a
rank that need the same queries and hide none of their pairs are the same product over other keys, so those that arrive
one after the other can be one call over all their keys (`Shape.joined` of them at most): fewer and larger calls, and
one merge for several. It begins when the last of them has arrived, which costs nothing where links are fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .attention_shape import INPUTS, OF_QUERIES, Need, Shape
from .routes import Route

Part = tuple[int, Need]  # key team, what is needed of it


@dataclass(frozen=True)
class Block:
    """Rows of query team `i` against those of each part, in the order of arrival. The parts need the same queries."""

    i: int
    parts: tuple[Part, ...]

    @property
    def q0(self) -> int:
        return self.parts[0][1].q0

    @property
    def q1(self) -> int:
        return self.parts[0][1].q1

    def op(self, backward: bool) -> str:
        """`attend`, `attend_backward`, or of several parts `attend_joined`, `attend_backward_joined`."""
        return f"attend{'_backward' * backward}{'_joined' * (len(self.parts) > 1)}"

    @property
    def params(self) -> dict[str, int | str]:
        """What the operation is told: q, k (teams), q0, q1, k0, k1 (rows); of several parts k, k0 and k1 are lists."""
        keys = [(j, need.k0, need.k1) for j, need in self.parts]
        if len(keys) == 1:
            (j, k0, k1), *_ = keys
            return {"q": self.i, "k": j, "q0": self.q0, "q1": self.q1, "k0": k0, "k1": k1}
        of_keys = {name: " ".join(map(str, each)) for name, each in zip(("k", "k0", "k1"), zip(*keys))}
        return {"q": self.i, "q0": self.q0, "q1": self.q1, **of_keys}

    def flops(self, shape: Shape, backward: bool) -> int:
        return sum(block_flops(shape, need, backward) for _, need in self.parts)

    def reads(self, backward: bool) -> list[tuple[str, Part, tuple[int, int]]]:
        """Inputs in the operation's order: (name, part, rows). Of several parts first what belongs to queries, then k
        and v of each part."""
        first, names = self.parts[0], INPUTS[backward]
        order = [(name, first) for name in names]
        if len(self.parts) > 1:
            order = [(name, first) for name in names if name in OF_QUERIES]
            order += [(name, part) for part in self.parts for name in ("k", "v")]
        rows = [(n, p, (self.q0, self.q1) if n in OF_QUERIES else (p[1].k0, p[1].k1)) for n, p in order]
        return [item for item in rows if item[2][0] < item[2][1]]


def block_flops(shape: Shape, need: Need, backward: bool) -> int:
    """Floating-point operations of one need with one share of the heads: two products forward, five backward."""
    h = shape.heads
    width = 2 * (3 * h.head_dim + 2 * h.v_dim) if backward else 2 * (h.head_dim + h.v_dim)
    return need.area * h.batch * (h.q_heads // shape.inner) * width


def blocks_of(shape: Shape, routes: Sequence[Route], moves: str, size: int, *, backward: bool) -> list[Block]:
    """Every need in one block. Those with no visible pair are left out, but for a team's own, which begin its sums."""
    found = []
    for i in range(size):
        mine = [(i, n) for n in shape.needs.get((i, i), ())]
        found += [Block(i, (part,)) for part in mine]
        others = [j for j in range(size) if j != i]
        if moves == "kv" and len(routes) == 1:
            others.sort(key=lambda j: routes[0].step(j, i))
            arrivals = [(j, n) for j in others for n in shape.needs.get((i, j), ()) if n.area]
            found += _joined(i, arrivals, shape.joined[backward])
        else:
            found += [Block(i, ((j, n),)) for j in others for n in shape.needs.get((i, j), ()) if n.area]
    return found


def _joined(i: int, arrivals: Sequence[Part], most: int) -> list[Block]:
    """Runs of arrivals that need the same queries and hide no pair, cut into blocks of at most `most`."""
    found: list[list[Part]] = []
    for j, need in arrivals:
        last = found[-1] if found else []
        fits = last and len(last) < most and _whole(need) and all(_whole(n) for _, n in last)
        if fits and (last[0][1].q0, last[0][1].q1) == (need.q0, need.q1):
            last.append((j, need))
        else:
            found.append([(j, need)])
    return [Block(i, tuple(parts)) for parts in found]


def _whole(need: Need) -> bool:
    return need.area == (need.q1 - need.q0) * (need.k1 - need.k0)
