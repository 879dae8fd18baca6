"""Heads dealt out among neighbouring ranks before attention, and collected after it (Jacobs et al. 2023, Ulysses).

All sends are staggered, so that no two ranks send to one at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from ..actions import Slice
from ..terms import Content, applied, cut, join, origin
from .attention_shape import RESULTS, Shape
from .draft import Draft


class Sharing(Protocol):
    """The ranks that hold share `column` of the heads, one of each of `size` teams. `results`: by team and name."""

    size: int
    column: int

    @property
    def results(self) -> Mapping[tuple[int, str], Content]: ...

    def rank(self, team: int) -> int: ...


def split(draft: Draft, shape: Shape, rank: int, name: str) -> None:
    """Cut an input of `rank` into one share of the heads for each member of its team."""
    _, row, dtype = shape.field(name, shape.inner)
    rows = shape.rows(name, rank)
    shares = [draft.value(rank, f"{name}.to.{i}", dtype, rows, row) for i in range(shape.inner)]
    draft.compute(rank, "split_heads", [Slice(name, 0, rows)], shares, lane="exchange")


def gathered(
    draft: Draft, shape: Shape, rank: int, team: int, column: int, name: str
) -> tuple[Content, dict[int, Slice]]:
    """Declare on `rank` the input `name` of all members with share `column` of the heads: what it will hold, and where
    the part of each member goes."""
    _, row, dtype = shape.field(name, shape.inner)
    draft.value(rank, f"{name}.h", dtype, shape.team_rows(name, team), row)
    at, parts, places = 0, [], {}
    for member in range(team * shape.inner, (team + 1) * shape.inner):
        rows = shape.rows(name, member)
        places[member % shape.inner] = Slice(f"{name}.h", at, at + rows)
        at += rows
        parts.append(applied("split_heads", [origin(name, member, 0, rows)], rows, output=column))
    return join(parts), places


def take(draft: Draft, shape: Shape, rank: int, name: str, shift: int, here: Slice) -> None:
    """Bring the share of the member `shift` before `rank` to `here`; 0 is this rank itself."""
    team, column = divmod(rank, shape.inner)
    source = team * shape.inner + (column - shift) % shape.inner
    share = Slice(f"{name}.to.{column}", 0, here.rows)
    if here.rows and not shift:
        draft.compute(rank, "copy", [share], [here], kind="copy", lane="exchange")
    elif here.rows:
        draft.send(source, "heads_out", rank, f"{name}.heads", share)
        draft.recv(rank, "heads_in", source, f"{name}.heads", here)


def collect(draft: Draft, shape: Shape, teams: Sequence[Sharing], *, backward: bool, goals: bool) -> None:
    """Every rank gets its rows with all heads back; staggered as the way there."""
    inner = shape.inner
    for name in (name for group in RESULTS[backward] for name in group):
        parts: dict[tuple[int, int], Slice] = {}
        sent = _narrowed(draft, shape, teams, name)
        for shift in range(inner):
            for rank in range(draft.world):
                team, column = divmod(rank, inner)
                rows, other = shape.rows(name, rank), teams[(column - shift) % inner]
                start = sum(shape.rows(name, team * inner + m) for m in range(column))
                away = Slice(f"{name}.h", start, start + rows)
                if shift and rows:
                    _, row, dtype = shape.part(name, inner)
                    away = Slice(f"{name}.{sent}", start, start + rows)
                    home = draft.value(rank, f"{name}.from.{other.column}", dtype, rows, row)
                    draft.send(other.rank(team), "results_out", rank, f"{name}.heads", away)
                    draft.recv(rank, "results_in", other.rank(team), f"{name}.heads", home)
                    away = home
                parts[rank, other.column] = away
        for rank in range(draft.world):
            team, column = divmod(rank, inner)
            rows = shape.rows(name, rank)
            start = sum(shape.rows(name, team * inner + m) for m in range(column))
            _, row, dtype = shape.field(name)
            out = draft.value(rank, name, dtype, rows, row, "output")
            if rows:
                draft.compute(rank, "join_heads", [parts[rank, i] for i in range(inner)], [out], lane="exchange")
            if rows and goals:
                contents = [cut(other.results[team, name], start, start + rows) for other in teams]
                draft.goal(rank, out, applied("join_heads", contents, rows))


def _narrowed(draft: Draft, shape: Shape, teams: Sequence[Sharing], name: str) -> str:
    """Bring a result into the dtype in which it is sent; returns the suffix of what is sent."""
    _, row, dtype = shape.part(name, shape.inner)
    if dtype == shape.field(name)[2]:
        return "h"
    for team in teams:
        for at in range(team.size):
            if rows := shape.team_rows(name, at):
                narrow = draft.value(team.rank(at), f"{name}.w", dtype, rows, row)
                whole = Slice(f"{name}.h", 0, rows)
                draft.compute(team.rank(at), "copy", [whole], [narrow], kind="copy", lane="exchange")
    return "w"
