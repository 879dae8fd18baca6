"""All-gather → GEMM that multiplies each chunk of rows as soon as it has arrived, the own chunk first.

The mirror image of GEMM → reduce-scatter, and what its backward needs (Pati et al., ASPLOS 2024, section 7.2, call it
the consumer's side). Every rank sends its rows straight to all others, staggered, and keeps what it received, because a
weight gradient wants the gathered rows again. `overlap=False` puts one wait before the first product.
"""

from __future__ import annotations

from ..actions import Slice
from ..schedule import Schedule
from ..terms import applied, origin
from .draft import Draft, Rows, bounds, per_rank, pieces
from .gemm_reduce_scatter import weight_value


def all_gather_gemm(
    world: int,
    rows: Rows,
    k: int,
    n: int,
    dtype: str = "float32",
    *,
    subchunks: int = 1,
    overlap: bool = True,
    transposed: bool = False,
) -> Schedule:
    """Inputs `x` [rows of this rank, k] and `w` [k, n] → outputs `gathered` [rows of all ranks, k] and `out` = their
    product with `w`. `transposed`: `w` is [n, k] and the operation `gemm_t`."""
    sizes = per_rank(rows, world)
    places = bounds(sizes)
    op = "gemm_t" if transposed else "gemm"
    draft = Draft("all_gather_gemm", world, subchunks=subchunks, overlap=overlap)
    for rank in range(world):
        own = draft.value(rank, "x", dtype, sizes[rank], [k], "input")
        w = weight_value(draft, rank, dtype, k, n, transposed)
        draft.value(rank, "gathered", dtype, sum(sizes), [k], "output")
        draft.value(rank, "out", dtype, sum(sizes), [n], "output")
        start = places[rank][0]
        order = [(rank - distance) % world for distance in range(world)]  # the own first, then as they arrive
        if own.rows:
            draft.compute(rank, "copy", [own], [Slice("gathered", *places[rank])], kind="copy", lane="keep")
        if not overlap and sum(sizes):
            draft.wait(rank, "compute", Slice("gathered", 0, sum(sizes)))
        for peer in order:
            for low, high in pieces(*places[peer], subchunks):
                source = Slice("x", low - start, high - start) if peer == rank else Slice("gathered", low, high)
                cost = 2 * (high - low) * k * n
                draft.compute(rank, op, [source, w], [Slice("out", low, high)], flops=cost, engine=f"gemm/{dtype}")
        for distance in range(1, world):
            to, source_rank = (rank + distance) % world, (rank - distance) % world
            for part, (low, high) in enumerate(pieces(0, sizes[rank], subchunks)):
                draft.send(rank, "out", to, f"part.{part}", Slice("x", low, high))
            for part, ends in enumerate(pieces(*places[source_rank], subchunks)):
                draft.recv(rank, "in", source_rank, f"part.{part}", Slice("gathered", *ends))
        for owner, (begin, end) in enumerate(places):
            for low, high in pieces(begin, end, subchunks):
                rows_of = origin("x", owner, low - begin, high - begin)
                draft.goal(rank, Slice("gathered", low, high), rows_of)
                weight = origin("w", rank, 0, n if transposed else k)
                draft.goal(rank, Slice("out", low, high), applied(op, [rows_of, weight], high - low))
    return draft.done()
