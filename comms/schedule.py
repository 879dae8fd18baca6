"""The noun of this room: a `Schedule`, the frozen plan of who computes, sends, receives and reduces what.

Per rank a program of *lanes* (compute, reduce, one per link direction); actions run in order within a lane. The only
edges between lanes are the named values that actions read and write: a reader waits for the writers of its rows. So a
ring hop is a receive whose value the next compute reads, and the trigger of T3 (Pati et al., ASPLOS 2024) is a send
that reads rows which a GEMM wrote. Each row of a value is written once per rank; memory is a separate matter: values
that name the same *slot* share one buffer, in the order in which they are declared, and `check` proves that no buffer
is reused early. That single rule makes every legal interleaving give the same result. `str(schedule)` is the text
form, `schedule_text.parse` reads it back exactly, and the goals in it say what the schedule is for (see `terms`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from ..dist.errors import UserError
from .actions import Action, Compute, Param, Slice, Value, literal, named
from .terms import Content


@dataclass(frozen=True)
class Lane:
    """Actions that run one after another. A lane carries operations, or sends, or receives; waits go anywhere."""

    name: str
    actions: tuple[Action, ...]

    def __post_init__(self) -> None:
        named(self.name, "a lane")


@dataclass(frozen=True)
class Program:
    """What one rank does: its lanes, which run beside each other."""

    rank: int
    lanes: tuple[Lane, ...]


@dataclass(frozen=True)
class Goal:
    """What `rows` must hold on `rank` in the end, as a term over the inputs of all ranks (see `terms`)."""

    rank: int
    rows: Slice
    content: Content

    def __str__(self) -> str:
        return f"goal {self.rank} {self.rows} = {'; '.join(map(str, self.content))}"


@dataclass(frozen=True)
class Schedule:
    """The plan of all ranks. Immutable; safe to share between threads and to send to other processes."""

    name: str
    world: int
    values: tuple[Value, ...]
    programs: tuple[Program, ...]
    goals: tuple[Goal, ...] = ()
    meta: tuple[tuple[str, Param], ...] = ()

    def __post_init__(self) -> None:
        named(self.name, "a schedule")
        for key, value in self.meta:
            named(key, "metadata")
            literal(value)

    @cached_property
    def by_rank(self) -> tuple[dict[str, Value], ...]:
        """For each rank its values by name, in the order of declaration; the first declaration of a name wins."""
        found: tuple[dict[str, Value], ...] = tuple({} for _ in range(self.world))
        for value in self.values:
            for rank in value.ranks or range(self.world):
                if 0 <= rank < self.world:
                    found[rank].setdefault(value.name, value)
        return found

    def value(self, name: str, rank: int) -> Value:
        return self.by_rank[rank][name]

    def nbytes(self, rank: int, *slices: Slice) -> int:
        """Bytes of the slices on `rank`; `UserError` while their shapes hold symbols."""
        return sum(s.rows * self.by_rank[rank][s.value].row_bytes for s in slices)

    def actions(self) -> Iterator[tuple[int, str, int, Action]]:
        """(rank, lane, index within the lane, action), rank by rank and lane by lane."""
        for program in self.programs:
            for lane in program.lanes:
                for index, action in enumerate(lane.actions):
                    yield program.rank, lane.name, index, action

    @cached_property
    def operations(self) -> frozenset[str]:
        """Names of the operations that an executor must know."""
        return frozenset(action.op for _, _, _, action in self.actions() if isinstance(action, Compute))

    def bind(self, dims: Mapping[str, int]) -> Schedule:
        """The same schedule with numbers in place of the symbols named in `dims`."""
        unknown = set(dims) - {d for v in self.values for d in v.shape if isinstance(d, str)}
        if unknown:
            raise UserError(f"schedule {self.name} has no dim named {', '.join(sorted(unknown))}")
        fixed = (
            replace(v, shape=tuple(dims.get(d, d) if isinstance(d, str) else d for d in v.shape)) for v in self.values
        )
        return replace(self, values=tuple(fixed))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the text form: ranks compare it before they run the schedule together."""
        return hashlib.sha256(str(self).encode()).hexdigest()

    def __str__(self) -> str:
        lines = [f"schedule {self.name}", f"world {self.world}"]
        lines += [f"meta {key} = {literal(value)}" for key, value in self.meta]
        lines += [*map(str, self.values), *map(str, self.goals)]
        for program in self.programs:
            lines += ["", f"rank {program.rank}"]
            for lane in program.lanes:
                lines += [f"lane {lane.name}", *(f"  {action}" for action in lane.actions)]
        return "\n".join(lines) + "\n"
