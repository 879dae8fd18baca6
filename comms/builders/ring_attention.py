"""Ring attention, forward: queries stay, keys and values travel once round the ring (Liu et al. 2023, section 3).

In hop s rank r holds the K, V of rank r - s, attends to them, and merges the partial (out, log-sum-exp) into its own.
While it attends, the same K, V go to its successor and the next ones arrive in the other of two buffers. With the
causal mask over contiguous chunks a rank skips what lies in its future, and K, V stop where nobody needs them further
on. The operations `attend` and `merge_lse` come from the caller; layouts and masks beyond these are `parallel`'s work.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..actions import Slice
from ..schedule import Schedule
from ..terms import Content, applied, combined, op_text, origin
from .draft import Draft, Rows, per_rank


def ring_attention(
    world: int,
    rows: Rows,
    *,
    batch: int = 1,
    q_heads: int = 1,
    kv_heads: int = 1,
    head_dim: int = 1,
    dtype: str = "float32",
    causal: bool = False,
) -> Schedule:
    """Inputs `q` [rows, batch, q_heads, head_dim] and `kv` [rows, 2, batch, kv_heads, head_dim] of each rank's rows.

    Outputs `out` as `q` and `lse` [rows, batch, q_heads], both float32: partial results are kept in full precision.
    `attend{causal}(q, kv) => o, l` is one block; `merge_lse(o, l, o', l') => o, l` joins two.
    """
    sizes = per_rank(rows, world)
    draft = Draft("ring_attention", world, causal=causal)
    shapes = ([batch, q_heads, head_dim], [batch, q_heads], [2, batch, kv_heads, head_dim])
    for rank in range(world):
        draft.lane(rank, "compute")  # first in the list of lanes
        q = draft.value(rank, "q", dtype, sizes[rank], shapes[0], "input")
        draft.value(rank, "kv", dtype, sizes[rank], shapes[2], "input")
        partials = _Partials(draft, rank, q, shapes, sum(_needs(sizes, causal, rank, j) for j in range(world)))
        free: dict[str, list[Slice]] = {}  # by slot: what shows that the K, V in it are no longer needed
        for hop in range(world):
            owner = (rank - hop) % world
            if not _arrives(sizes, causal, rank, hop):
                continue
            held = Slice("kv", 0, sizes[owner])
            if hop:
                slot = f"buffer.{hop % 2}"
                held = draft.value(rank, f"kv.{hop}", dtype, sizes[owner], shapes[2], slot=slot)
                for guard in free.pop(slot, ()):
                    draft.wait(rank, "from_previous", guard)
                draft.recv(rank, "from_previous", (rank - 1) % world, f"kv.of.{owner}", held)
                free[slot] = []
            if hop < world - 1 and _arrives(sizes, causal, (rank + 1) % world, hop + 1):
                sent = draft.token(rank, f"sent.{hop}") if 0 < hop < world - 2 else None
                draft.send(rank, "to_next", (rank + 1) % world, f"kv.of.{owner}", held, done=sent)
                free.get(f"buffer.{hop % 2}", []).extend([sent] if sent else [])
            if _needs(sizes, causal, rank, owner):
                flops = 4 * sizes[rank] * sizes[owner] * batch * q_heads * head_dim // (2 if causal and not hop else 1)
                written = partials.attend(held, hop, flops, f"attention_forward/{dtype}", causal and not hop)
                free.get(f"buffer.{hop % 2}", []).append(written)
        for index, name in enumerate(("out", "lse")):
            parts = [_block(sizes, causal, rank, j, index) for j in range(world) if _needs(sizes, causal, rank, j)]
            if parts:
                draft.goal(rank, Slice(name, 0, q.rows), combined("merge_lse", parts))
    return draft.done()


class _Partials:
    """One rank's partial results: the first block begins the running result, the others are merged into it in place."""

    def __init__(self, draft: Draft, rank: int, q: Slice, shapes: Sequence[Sequence[int]], blocks: int) -> None:
        self.draft, self.rank, self.q, self.shapes, self.blocks = draft, rank, q, shapes, blocks
        self.running: list[Slice] = []
        self.done = 0
        if not blocks:
            self._pair("", "output", "")

    def _pair(self, suffix: str, role: str, slot: str) -> list[Slice]:
        names = ("out", "lse") if role == "output" else (f"o.{suffix}", f"l.{suffix}")
        return [
            self.draft.value(self.rank, name, "float32", self.q.rows, shape, role, slot and f"{slot}.{name[0]}")
            for name, shape in zip(names, self.shapes)
        ]

    def attend(self, kv: Slice, hop: int, flops: int, engine: str, causal: bool) -> Slice:
        """Attend to one block and merge it; returns the rows that show that `kv` has been read."""
        self.done += 1
        last = ("", "output") if self.done == self.blocks else (f"to.{hop}", "scratch")
        if not self.running:
            part = self.running = self._pair(*last, "running")
        else:
            part = self._pair(str(hop), "scratch", "part")
        params = {"causal": True} if causal else {}
        self.draft.compute(self.rank, "attend", [self.q, kv], part, flops=flops, engine=engine, params=params)
        if part is not self.running:
            merged = self._pair(*last, "running")
            self.draft.compute(self.rank, "merge_lse", [*self.running, *part], merged, kind="merge")
            self.running = merged
        return part[0]


def _needs(sizes: Sequence[int], causal: bool, rank: int, owner: int) -> bool:
    """Does any query of `rank` see any key of `owner`?"""
    return bool(sizes[rank] and sizes[owner]) and not (causal and owner > rank)


def _arrives(sizes: Sequence[int], causal: bool, rank: int, hop: int) -> bool:
    """Do K, V come to `rank` in this hop: does it, or a rank further on, need them?"""
    world = len(sizes)
    owner = (rank - hop) % world
    return any(_needs(sizes, causal, (rank + on) % world, owner) for on in range(world - hop))


def _block(sizes: Sequence[int], causal: bool, rank: int, owner: int, output: int) -> Content:
    label = op_text("attend", [("causal", True)] if causal and owner == rank else [])
    args = [origin("q", rank, 0, sizes[rank]), origin("kv", owner, 0, sizes[owner])]
    return applied(label, args, sizes[rank], output=output)
