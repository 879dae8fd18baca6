"""Ring all-gather: every rank's rows travel once round the ring, and each rank keeps a copy of what passes.

P - 1 steps; in step s rank r sends the chunk of rank r - s to r + 1, straight from where it was received, so no staging
buffer is needed. Each rank sends all chunks but its successor's: the least that any all-gather can send.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..actions import Slice
from ..schedule import Schedule
from ..terms import origin
from .draft import Draft, Rows, bounds, per_rank


def ring_all_gather(world: int, rows: Rows, row_shape: Sequence[int | str] = (), dtype: str = "float32") -> Schedule:
    """Input `x` [rows of this rank, *row_shape] → output `out` [rows of all ranks, *row_shape], in rank order."""
    sizes = per_rank(rows, world)
    chunks = [Slice("out", *ends) for ends in bounds(sizes)]
    draft = Draft("ring_all_gather", world, rows=sum(sizes))
    for rank in range(world):
        x = draft.value(rank, "x", dtype, sizes[rank], row_shape, "input")
        draft.value(rank, "out", dtype, sum(sizes), row_shape, "output")
        if x.rows:
            draft.compute(rank, "copy", [x], [chunks[rank]], kind="copy")
        for step in range(world - 1):
            mine, theirs = (rank - step) % world, (rank - step - 1) % world
            if sizes[mine]:
                draft.send(rank, "to_next", (rank + 1) % world, f"chunk.{mine}", x if step == 0 else chunks[mine])
            if sizes[theirs]:
                draft.recv(rank, "from_previous", (rank - 1) % world, f"chunk.{theirs}", chunks[theirs])
        for owner, chunk in enumerate(chunks):
            if chunk.rows:
                draft.goal(rank, chunk, origin("x", owner, 0, sizes[owner]))
    return draft.done()
