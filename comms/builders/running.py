"""A running result: contributions to the rows of one output, combined in the order in which a builder adds them.

Contributions may cover some rows only (half a zigzag shard). Each row of a value is written once, so every combination
makes a new version of its rows; all versions share one slot, and the last one of each row is the output itself. The
order is the order of `add`, never that of arrival: that is what makes a sum repeat bit for bit. A combination reads
and writes the whole sum beside what it adds, so several contributions that wait for each other (`batch`) cost less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from ..actions import Slice
from .draft import Draft

Field = tuple[str, Sequence[int | str], str]  # name, shape of a row, dtype


@dataclass
class _Segment:
    """Rows that get the same contributions. `left`: how many are still to come."""

    start: int
    stop: int
    left: int
    version: list[Slice] | None = None
    waiting: tuple[_Part, ...] = ()


@dataclass(eq=False)
class _Part:
    """A contribution to rows from `start` on. `read`: gets what shows that it has been read."""

    slices: Sequence[Slice]
    start: int
    read: list[Slice]


class Running:
    """One result of `fields` on `rank`, combined by the operation `op` of `kind` ('merge' or 'reduce').

    `ends`: the fields as they are in the end, where the last sum is rounded; the output then has memory of its own.

    `expect` every contribution first, then `add` them in order, then `finish`. A contribution that is the first of its
    rows must stay in memory of its own until it has been combined; of others at most `batch` wait to be combined.
    """

    def __init__(
        self, draft: Draft, rank: int, fields: Sequence[Field], rows: int, op: str, kind: str, role: str,
        ends: Sequence[Field] | None = None, batch: int = 1,
    ) -> None:  # fmt: skip
        self.draft, self.rank, self.fields, self.rows = draft, rank, list(fields), rows
        self.ends = list(ends or fields)
        self.op, self.kind, self.role, self.batch = op, kind, role, batch
        self.expected: list[tuple[int, int]] = []
        self._segments: list[_Segment] = []
        self._versions = self._added = self._waiting = 0

    def expect(self, start: int, stop: int) -> None:
        if start < stop:
            self.expected.append((start, stop))

    @property
    def sole(self) -> bool:
        """Is there one contribution only? It may then be written straight into `final`."""
        return self.expected == [(0, self.rows)]

    def begins(self, start: int, stop: int) -> bool:
        """Would a contribution to these rows be the first of some of them, and so have to stay where it is?"""
        return any(s.version is None and not s.waiting for s in self._inside(start, stop))

    def final(self, start: int, stop: int) -> list[Slice]:
        return [Slice(name, start, stop) for name, _, _ in self.fields]

    @property
    def segments(self) -> list[_Segment]:
        if not self._segments:
            edges = sorted({edge for ends in self.expected for edge in ends})
            self._segments = [
                _Segment(a, b, sum(start <= a and b <= stop for start, stop in self.expected))
                for a, b in zip(edges, edges[1:])
            ]
        return self._segments

    def _inside(self, start: int, stop: int) -> list[_Segment]:
        return [s for s in self.segments if start <= s.start and s.stop <= stop]

    def add(self, part: Sequence[Slice], start: int, stop: int, lane: str, read: list[Slice]) -> None:
        """Combine rows `start`:`stop`, soon: `read` then gets slices that show that `part` has been read (none if it
        must stay)."""
        self._waiting += not self.begins(start, stop)
        self._added += 1
        mine = _Part(part, start, read)
        for segment in self._inside(start, stop):
            segment.left -= 1
            segment.waiting += (mine,)
        if self._waiting == self.batch or self._added == len(self.expected):
            self._combine(lane)

    def _combine(self, lane: str) -> None:
        """All that waits."""
        self._waiting = 0
        for (last, _, parts), group in groupby(
            (s for s in self.segments if s.waiting),
            key=lambda s: (not s.left, s.version and s.version[0].value, s.waiting),
        ):
            rows = list(group)
            low, high = rows[0].start, rows[-1].stop
            before = [Slice(a.value, a.start, b.stop) for a, b in zip(rows[0].version or (), rows[-1].version or ())]
            reads = [Slice(s.value, s.start + low - p.start, s.start + high - p.start) for p in parts for s in p.slices]
            if not before and len(parts) == 1 and not last:
                written = reads  # it stays where it is
            else:
                written = self.final(low, high) if last else self._version(low, high)
                if before or len(parts) > 1:
                    self.draft.compute(self.rank, self.op, [*before, *reads], written, kind=self.kind, lane=lane)
                else:
                    self.draft.compute(self.rank, "copy", reads, written, kind="copy", lane=lane)
                for part in parts:
                    part.read.append(written[0])
            for segment in rows:
                segment.waiting = ()
                segment.version = [
                    Slice(w.value, w.start + segment.start - low, w.start + segment.stop - low) for w in written
                ]

    def _version(self, low: int, high: int) -> list[Slice]:
        self._versions += 1
        names = [f"{name}.version.{self._versions}" for name, _, _ in self.fields]
        for name, (field, row, dtype) in zip(names, self.fields):
            self.draft.value(self.rank, name, dtype, self.rows, row, slot=f"running.{field}")
        return [Slice(name, low, high) for name in names]

    def finish(self) -> None:
        """Declare the output: the last owner of the slot, unless it is rounded to another dtype."""
        for (name, row, dtype), (_, _, summed) in zip(self.ends, self.fields):
            slot = f"running.{name}" if self._versions and dtype == summed else ""
            self.draft.value(self.rank, name, dtype, self.rows, row, self.role, slot)
