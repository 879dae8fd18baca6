"""What a value holds, written as a term over the inputs of all ranks: the language of a schedule's goals.

``gemm(x@0[0:4], w@0[0:8])[0:4]`` is rows 0-4 of what `gemm` makes of rank 0's inputs; ``add: a + b`` is a sum, in any
order and grouping; ``;`` puts rows below rows. `provenance` runs a schedule on such terms instead of numbers, so
*every needed block exactly once* needs no knowledge of attention or of matrix products: the term that arrives must be
the goal, atom for atom. Operations are opaque, sums are multisets, and equal content always has one form (`join`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property


@dataclass(frozen=True)
class Origin:
    """Rows of an input, counted from `start`."""

    value: str
    rank: int
    start: int

    def text(self, rows: int) -> str:
        return f"{self.value}@{self.rank}[{self.start}:{self.start + rows}]"

    @cached_property
    def key(self) -> str:
        return self.text(0)


@dataclass(frozen=True)
class Applied:
    """Rows, counted from `start`, of the `output`-th result of the operation `op` (with its parameters, as text)."""

    op: str
    args: tuple[Content, ...]
    output: int
    start: int

    def text(self, rows: int) -> str:
        output = f"#{self.output}" if self.output else ""
        return f"{self.block}{output}[{self.start}:{self.start + rows}]"

    @cached_property
    def block(self) -> str:
        """The call itself, whatever rows or result of it are meant."""
        return f"{self.op}({', '.join('; '.join(map(str, arg)) for arg in self.args)})"

    @cached_property
    def key(self) -> str:
        return self.text(0)


Atom = Origin | Applied


@dataclass(frozen=True)
class Segment:
    """`rows` rows, each the sum in the sense of `combine` of the atoms' rows; one atom stands for itself."""

    rows: int
    combine: str
    atoms: tuple[Atom, ...]

    def __str__(self) -> str:
        head = f"{self.combine}: " if self.combine else ""
        return head + " + ".join(atom.text(self.rows) for atom in self.atoms)


Content = tuple[Segment, ...]


def op_text(op: str, params: Iterable[tuple[str, object]]) -> str:
    """``attend{causal=true, scale=0.5}``: the one spelling of an operation with its parameters."""
    inner = ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in params)
    return f"{op}{{{inner}}}" if inner else op


def segment(rows: int, combine: str, atoms: Iterable[Atom]) -> Segment:
    """A segment in its one form: atoms sorted, no `combine` for a single atom."""
    ordered = tuple(sorted(atoms, key=lambda atom: atom.key))
    return Segment(rows, combine if len(ordered) > 1 else "", ordered)


def origin(value: str, rank: int, start: int, stop: int) -> Content:
    """Rows of an input of `rank`."""
    return (Segment(stop - start, "", (Origin(value, rank, start),)),)


def applied(op: str, args: Sequence[Content], rows: int, *, output: int = 0, start: int = 0) -> Content:
    """Rows `start` … `start + rows` of a result of `op`; `op` is spelled by `op_text`."""
    return (Segment(rows, "", (Applied(op, tuple(args), output, start),)),)


def join(parts: Iterable[Content]) -> Content:
    """The parts one below the other; neighbours that continue each other become one segment."""
    done: list[Segment] = []
    for part in parts:
        for piece in part:
            if done and _continues(done[-1], piece):
                done[-1] = replace(done[-1], rows=done[-1].rows + piece.rows)
            elif piece.rows:
                done.append(piece)
    return tuple(done)


def cut(content: Content, start: int, stop: int) -> Content:
    """Rows `start` … `stop` of the content."""
    found, base = [], 0
    for piece in content:
        low, high = max(start - base, 0), min(stop - base, piece.rows)
        if low < high:
            found.append((segment(high - low, piece.combine, _shift(piece.atoms, low)),))
        base += piece.rows
    return join(found)


def combined(combine: str, parts: Sequence[Content]) -> Content:
    """The row-wise sum of contents with equally many rows. ValueError when a part is a sum in another sense."""
    edges = sorted({edge for part in parts for edge in _edges(part)})
    found = []
    for start, stop in zip(edges, edges[1:]):
        atoms: list[Atom] = []
        for part in parts:
            (piece,) = cut(part, start, stop)
            if piece.combine not in ("", combine):
                raise ValueError(f"{combine} of rows that are already a sum by {piece.combine}")
            atoms += piece.atoms
        found.append((segment(stop - start, combine, atoms),))
    return join(found)


def block_key(content: Content) -> tuple:
    """Equal for two results of the same calls, whatever their output index."""
    return tuple(
        (
            piece.rows,
            piece.combine,
            *sorted((a.block if isinstance(a, Applied) else a.key, a.start) for a in piece.atoms),
        )
        for piece in content
    )


def rows_of(content: Content) -> int:
    return sum(piece.rows for piece in content)


def _edges(content: Content) -> list[int]:
    found = [0]
    for piece in content:
        found.append(found[-1] + piece.rows)
    return found


def _shift(atoms: tuple[Atom, ...], rows: int) -> Iterable[Atom]:
    return (replace(atom, start=atom.start + rows) for atom in atoms) if rows else atoms


def _continues(upper: Segment, lower: Segment) -> bool:
    if upper.combine != lower.combine or len(upper.atoms) != len(lower.atoms):
        return False
    return segment(0, upper.combine, _shift(upper.atoms, upper.rows)).atoms == lower.atoms
