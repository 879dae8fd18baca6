"""All-to-all by direct messages: in step s rank r sends to r + s and receives from r - s.

The stagger keeps every rank busy with another peer, so that no rank's incoming link is asked for by two at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..actions import Slice
from ..schedule import Schedule
from ..terms import origin
from .draft import Draft, bounds, per_rank


def all_to_all(
    world: int, rows: int | Sequence[Sequence[int]], row_shape: Sequence[int | str] = (), dtype: str = "float32"
) -> Schedule:
    """Input `x` holds one chunk for each rank, output `out` one chunk of each rank, both in rank order.

    `rows`: of every chunk, or `rows[i][j]` from rank i to rank j.
    """
    table = [[rows] * world] * world if isinstance(rows, int) else [per_rank(line, world) for line in rows]
    table = [table[rank] for rank in range(len(per_rank(0, world)))]
    draft = Draft("all_to_all", world)
    for rank in range(world):
        coming = [table[source][rank] for source in range(world)]
        draft.value(rank, "x", dtype, sum(table[rank]), row_shape, "input")
        draft.value(rank, "out", dtype, sum(coming), row_shape, "output")
        outgoing = [Slice("x", *ends) for ends in bounds(table[rank])]
        incoming = [Slice("out", *ends) for ends in bounds(coming)]
        if coming[rank]:
            draft.compute(rank, "copy", [outgoing[rank]], [incoming[rank]], kind="copy")
        for step in range(1, world):
            to, source = (rank + step) % world, (rank - step) % world
            if outgoing[to].rows:
                draft.send(rank, "out", to, "chunk", outgoing[to])
            if incoming[source].rows:
                draft.recv(rank, "in", source, "chunk", incoming[source])
        for source, chunk in enumerate(incoming):
            if chunk.rows:
                start, stop = bounds(table[source])[rank]
                draft.goal(rank, chunk, origin("x", source, start, stop))
    return draft.done()
