"""A schedule while it is being written: what every builder needs, so that a builder is only its own idea.

Values are declared per rank and folded into one declaration when all ranks agree. The order of declaration is the order
in which values own a shared slot. Rows are given per rank, so ragged partitions cost a builder nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from ...dist.errors import UserError
from ..actions import Action, Compute, Param, Recv, Send, Slice, Value, Wait
from ..schedule import Goal, Lane, Program, Schedule
from ..terms import Content

Rows = int | Sequence[int]


def per_rank(rows: Rows, world: int) -> list[int]:
    """Rows of each rank's chunk, from one number or one number per rank."""
    if world < 1:
        raise UserError(f"a schedule for {world} ranks", expected="at least 1")
    found = [rows] * world if isinstance(rows, int) else list(rows)
    if len(found) != world or min(found) < 0:
        raise UserError(f"rows {rows} for {world} ranks", expected=f"one number ≥ 0, or {world} of them")
    return found


def bounds(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Where each chunk lies when the chunks stand one below the other."""
    ends = list(accumulate(rows))
    return [(end - n, end) for end, n in zip(ends, rows)]


def pieces(start: int, stop: int, parts: int) -> list[tuple[int, int]]:
    """The rows in `parts` nearly equal pieces; empty pieces are left out."""
    edges = [start + (stop - start) * i // parts for i in range(parts + 1)]
    return [(a, b) for a, b in zip(edges, edges[1:]) if a < b]


class Draft:
    """Collects values, goals and actions; `done()` freezes them."""

    def __init__(self, name: str, world: int, **meta: Param) -> None:
        self.name, self.world, self.meta = name, world, tuple(meta.items())
        self._values: list[dict[str, Value]] = [{} for _ in range(world)]
        self._goals: list[Goal] = []
        self._lanes: list[dict[str, list[Action]]] = [{} for _ in range(world)]

    def value(
        self,
        rank: int,
        name: str,
        dtype: str,
        rows: int,
        row_shape: Sequence[int | str] = (),
        role: str = "scratch",
        slot: str = "",
    ) -> Slice:
        """Declare a value of `rank`; returns all of its rows."""
        declared = Value(name, dtype, (rows, *row_shape), role, slot)
        self._values[rank][name] = declared
        return declared.all()

    def token(self, rank: int, name: str) -> Slice:
        return self.value(rank, name, "token", 1)

    def goal(self, rank: int, rows: Slice, content: Content) -> None:
        self._goals.append(Goal(rank, rows, content))

    def lane(self, rank: int, name: str) -> list[Action]:
        """The lane's actions so far, to append to; lanes stand in the order in which they were first asked for."""
        return self._lanes[rank].setdefault(name, [])

    def compute(
        self, rank: int, op: str, reads: Sequence[Slice], writes: Sequence[Slice],
        *, kind: str = "compute", lane: str = "compute", flops: int = 0, engine: str = "",
        params: Mapping[str, Param] = {},
    ) -> None:  # fmt: skip
        action = Compute(kind, op, tuple(reads), tuple(writes), tuple(params.items()), flops, engine if flops else "")
        self.lane(rank, lane).append(action)

    def send(self, rank: int, lane: str, to: int, tag: str, *reads: Slice, done: Slice | None = None) -> None:
        self.lane(rank, lane).append(Send(to, tag, reads, () if done is None else (done,)))

    def recv(self, rank: int, lane: str, source: int, tag: str, *writes: Slice) -> None:
        self.lane(rank, lane).append(Recv(source, tag, writes))

    def wait(self, rank: int, lane: str, *reads: Slice) -> None:
        self.lane(rank, lane).append(Wait(reads))

    def done(self) -> Schedule:
        values = []
        for name in self._order():
            ranks_of: dict[Value, list[int]] = {}
            for rank, declared in enumerate(self._values):
                if name in declared:
                    ranks_of.setdefault(declared[name], []).append(rank)
            for value, ranks in ranks_of.items():
                everywhere = len(ranks) == self.world
                values.append(value if everywhere else replace(value, ranks=tuple(ranks)))
        programs = tuple(
            Program(rank, tuple(Lane(name, tuple(actions)) for name, actions in lanes.items() if actions))
            for rank, lanes in enumerate(self._lanes)
        )
        return Schedule(self.name, self.world, tuple(values), programs, tuple(self._goals), self.meta)

    def _order(self) -> list[str]:
        """All names, first come first; the owners of a slot in the order in which each rank declares them."""
        before: dict[str, set[str]] = {}
        for declared in self._values:
            latest: dict[str, str] = {}
            for name, value in declared.items():
                found = before.setdefault(name, set())
                if value.slot:
                    found |= {latest[value.slot]} if value.slot in latest else set()
                    latest[value.slot] = name
        done: dict[str, None] = {}
        for name in before:
            chain = [name]
            while chain:
                missing = [other for other in sorted(before[chain[-1]]) if other not in done and other not in chain]
                if missing:
                    chain.append(missing[0])
                else:
                    done[chain.pop()] = None
        return list(done)
