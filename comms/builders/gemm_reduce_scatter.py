"""GEMM → reduce-scatter that starts while the product runs: T3's tracked GEMM as a plain schedule.

Every rank multiplies its shard of K and owns a chunk of the rows of the sum. The product is made chunk by chunk in the
order in which a reduce-scatter hands chunks out (Pati et al., ASPLOS 2024, sections 4.2 and 4.4: staggered, the own
chunk last). The trigger needs no word of its own: a send reads the rows that a compute wrote. `overlap=False` is the
same schedule with one wait in front of the sends: the sequential rival, in the same executor.
"""

from __future__ import annotations

from ..actions import Slice
from ..schedule import Schedule
from ..terms import applied, combined, origin
from .draft import Draft, Rows, bounds, per_rank, pieces
from .reduce_scatter import chunk_order, scatter


def gemm_reduce_scatter(
    world: int,
    rows: Rows,
    k: int,
    n: int,
    dtype: str = "float32",
    *,
    algorithm: str = "direct",
    subchunks: int = 1,
    staggered: bool = True,
    overlap: bool = True,
    sum_order: str = "rank",
    sum_dtype: str | None = None,
    transposed: bool = False,
) -> Schedule:
    """Inputs `x` [rows of all ranks, k] and `w` [k, n] → output `out` [rows of this rank, n] of the sum of all x @ w.

    `k`: this rank's shard of the inner dimension. The operation is named `gemm`; with `transposed`, `w` is [n, k], as
    in a linear layer, and the operation `gemm_t`.
    """
    sizes = per_rank(rows, world)
    op = "gemm_t" if transposed else "gemm"
    draft = Draft("gemm_reduce_scatter", world, algorithm=algorithm, subchunks=subchunks, overlap=overlap)
    for rank in range(world):
        draft.value(rank, "x", dtype, sum(sizes), [k], "input")
        w = weight_value(draft, rank, dtype, k, n, transposed)
        y = draft.value(rank, "y", dtype, sum(sizes), [n])
        for owner in chunk_order(world, rank, algorithm, staggered):
            for low, high in pieces(*bounds(sizes)[owner], subchunks):
                part = Slice("y", low, high)
                cost = 2 * (high - low) * k * n
                draft.compute(rank, op, [Slice("x", low, high), w], [part], flops=cost, engine=f"gemm/{dtype}")
        if not overlap and y.rows and world > 1:
            draft.wait(rank, "out" if algorithm == "direct" else "to_next", y)
    scatter(draft, "y", sizes, [n], dtype, algorithm, subchunks, staggered, sum_order, sum_dtype)
    for rank, (start, stop) in enumerate(bounds(sizes)):
        for low, high in pieces(start, stop, subchunks):
            products = [
                applied(op, [origin("x", r, low, high), origin("w", r, 0, n if transposed else k)], high - low)
                for r in range(world)
            ]
            draft.goal(rank, Slice("out", low - start, high - start), combined("add", products))
    return draft.done()


def weight_value(draft: Draft, rank: int, dtype: str, k: int, n: int, transposed: bool) -> Slice:
    """Declare the input `w`, [k, n] or [n, k]."""
    return draft.value(rank, "w", dtype, n if transposed else k, [k if transposed else n], "input")
