"""Sequence-parallel attention, forward and backward, as one builder: what travels, and by which route, are arguments.

Each (query team, key team) block is computed at home or away. If keys and values travel, it is computed where the
queries are (Liu et al. 2023); if queries travel, where the keys are, and what the traveller's owner needs back ((out,
lse) or dQ, as in TokenRing; dK, dV otherwise) goes straight home. Rows that nobody further on needs stay behind, which
is the half-query saving of TokenRing's zigzag form. With `inner` > 1 heads are exchanged among `inner` neighbouring
ranks first (Jacobs et al. 2023), and routes run between such teams. `delta` = rowsum(dout * out) travels instead of
out. Masks are not known here: `needs` says which rectangle of rows each block takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..schedule import Schedule
from .attention_heads import collect, split
from .attention_shape import INPUTS, Shape
from .attention_team import Team
from .draft import Draft
from .routes import Route


def attention(
    name: str,
    shape: Shape,
    routes: Sequence[Route],
    *,
    moves: str = "kv",
    backward: bool = False,
    bookends: bool = False,
    goals: bool = True,
    beside: bool = True,
) -> Schedule:
    """The schedule. `moves`: 'kv' or 'q'. With several routes, need i of a pair travels by route i.

    Inputs `q` [rows, batch, q_heads, head_dim], `k`, `v`; backward also `dout` as out, `lse`, `delta` [rows, batch,
    q_heads]. Outputs `out`, `lse`, or `dq`, `dk`, `dv`, in the partial dtype. The needs of a pair (t, t) must cover all
    query rows with the first, and all key rows together. `bookends` keeps the last of them for the end: it hides the
    last return, as the first hides the first arrival. `beside`: results are merged in a lane of their own, while the
    next block is computed; otherwise between blocks, as ring-flash-attention and torch do. Without `goals` it can be
    costed and simulated, not checked.
    """
    draft = Draft(name, len(shape.q_rows), moves=moves, backward=backward, inner=shape.inner)
    for rank in range(draft.world):
        draft.lane(rank, "compute")
        for given in INPUTS[backward]:
            _, row, dtype = shape.field(given)
            whole = draft.value(rank, given, dtype, shape.rows(given, rank), row, "input")
            if shape.inner > 1 and whole.rows:
                split(draft, shape, rank, given)
    teams = [
        Team(draft, shape, column, routes, moves, backward, bookends, goals, beside) for column in range(shape.inner)
    ]
    for team in teams:
        for at in range(team.size):
            team.begin(at)
    for name in INPUTS[backward] if shape.inner > 1 else ():  # staggered, so that no two send to one rank at once
        for shift in range(shape.inner):
            for team in teams:
                for at in range(team.size):
                    team.exchange(at, name, shift)
    for team in teams:
        team.build()
    if shape.inner > 1:
        collect(draft, shape, teams, backward=backward, goals=goals)
    return draft.done()
