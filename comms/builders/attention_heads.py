"""Heads dealt out among neighbouring ranks before attention, and collected after it (Jacobs et al. 2023, Ulysses).

All sends are staggered, so that no two ranks send to one at once. A team's rows need not be those of one rank after
those of another (`Shape.runs`): in the order of the sequence a zigzag team has one run of tokens, or two, so its block
is one kernel call, where it would be many.
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
) -> tuple[Content, dict[int, list[tuple[Slice, Slice]]]]:
    """Declare on `rank` the input `name` of all members with share `column` of the heads: what it will hold, and for
    each member which rows of its share go where."""
    _, row, dtype = shape.field(name, shape.inner)
    draft.value(rank, f"{name}.h", dtype, shape.team_rows(name, team), row)
    parts, places = dict[int, Content](), {}
    for member in range(team * shape.inner, (team + 1) * shape.inner):
        rows, runs = shape.rows(name, member), shape.runs(name, member)
        places[member % shape.inner] = [
            (Slice(f"{name}.to.{column}", run.start, run.stop), Slice(f"{name}.h", run.at, run.end)) for run in runs
        ]
        for run in runs:
            share = applied("split_heads", [origin(name, member, 0, rows)], rows, output=column)
            parts[run.at] = cut(share, run.start, run.stop)
    return join(parts[at] for at in sorted(parts)), places


def take(draft: Draft, shape: Shape, rank: int, name: str, shift: int, here: list[tuple[Slice, Slice]]) -> None:
    """Bring the share of the member `shift` before `rank`: (its rows, where they go); 0 is this rank itself."""
    team, column = divmod(rank, shape.inner)
    source = team * shape.inner + (column - shift) % shape.inner
    shares, places = [share for share, _ in here], [place for _, place in here]
    if here and not shift:
        draft.compute(rank, "copy", shares, places, kind="copy", lane="exchange")
    elif here:
        draft.send(source, "heads_out", rank, f"{name}.heads", *shares)
        draft.recv(rank, "heads_in", source, f"{name}.heads", *places)


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
                runs = shape.runs(name, rank)
                if not shift and len(runs) == 1:
                    parts[rank, other.column] = Slice(f"{name}.h", runs[0].at, runs[0].end)
                elif rows:
                    _, row, dtype = shape.part(name, inner) if shift else shape.field(name, inner)
                    away = [Slice(f"{name}.{sent if shift else 'h'}", run.at, run.end) for run in runs]
                    home = draft.value(rank, f"{name}.from.{other.column}", dtype, rows, row)
                    into = [Slice(home.value, run.start, run.stop) for run in runs]
                    parts[rank, other.column] = home
                    if shift:
                        draft.send(other.rank(team), "results_out", rank, f"{name}.heads", *away)
                        draft.recv(rank, "results_in", other.rank(team), f"{name}.heads", *into)
                    else:
                        draft.compute(rank, "copy", away, into, kind="copy", lane="exchange")
        for rank in range(draft.world):
            team = rank // inner
            rows, runs = shape.rows(name, rank), shape.runs(name, rank)
            _, row, dtype = shape.field(name)
            out = draft.value(rank, name, dtype, rows, row, "output")
            if rows:
                draft.compute(rank, "join_heads", [parts[rank, i] for i in range(inner)], [out], lane="exchange")
            if rows and goals:
                contents = [join(cut(o.results[team, name], run.at, run.end) for run in runs) for o in teams]
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
