"""The ways to run a product with its collective, how each cuts it, and where cutting it by columns may pay.

Shapes: M rows over all ranks, K and N this rank's inner and outer dimensions, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..comms.chunk_plan import ChunkPlan

HUNGRY = 512  # operations for a byte; an H200 does 150 of bf16 while its memory, which copies use too, reads one
NARROW = 512  # columns; with fewer, 1792 rows of a product reach less than 0.7 of an H200's rate


@dataclass(frozen=True)
class Arm:
    """A way to run a product. `subchunks`: pieces of a rank's chunk; `overlap` False is the sequential way.

    `tracked`: one kernel that counts its tiles (`kernels.tracked_matmul`), instead of a product for each piece.
    `columns`: the pieces are columns, each with rows for every other rank, instead of rows (`chunk_plan`); `whole`: and
    the own rows. `replayed`: as a CUDA graph where the operands lie where they did before (`cuda_recorder`), else piece
    by piece.
    """

    name: str
    subchunks: int
    overlap: bool
    tracked: bool = False
    columns: bool = False
    replayed: bool = False
    whole: bool = False


SEQUENTIAL = Arm("sequential", 1, False)
ROW_ARMS = tuple(Arm(f"overlap, {n} piece{'s' if n > 1 else ''}", n, True) for n in (1, 2, 4))
COLUMN_ARMS = tuple(Arm(f"columns, {n} pieces", n, True, columns=True) for n in (2, 4, 8))
ARMS = (SEQUENTIAL, *ROW_ARMS, *COLUMN_ARMS[:2])
TRACKED_ARMS = tuple(Arm(f"tracked, {n} pieces", n, True, True) for n in (2, 4, 8))
REPLAYED_ARMS = (
    Arm("replayed, 1 piece", 1, True, replayed=True),
    Arm("replayed, 2 pieces", 2, True, replayed=True),
    *(Arm(f"replayed panels, {n} pieces", n, True, columns=True, replayed=True, whole=True) for n in (2, 4, 8)),
)
PANEL_ARMS = tuple(Arm(f"panels, {n} pieces", n, True, columns=True, whole=True) for n in (2, 4))
CUDA_ARMS = (SEQUENTIAL, *ROW_ARMS, *COLUMN_ARMS, *PANEL_ARMS, *TRACKED_ARMS, *REPLAYED_ARMS)


def cut(arm: Arm, rank: int, sizes: tuple[int, ...], n: int) -> ChunkPlan:
    """The plan of an arm for a product of `n` columns."""
    return ChunkPlan(rank, sizes, arm.subchunks, columns=n if arm.columns else 0, whole=arm.whole)


def fewer_reads(arm: Arm, sizes: tuple[int, ...], k: int, n: int, itemsize: int) -> bool:
    """Whether pieces of columns read less of their operands than rows that begin to leave as early would, and memory
    may be what a piece of rows waits for: it has fewer than `HUNGRY` operations for each byte of the second operand.

    The first of T equal pieces of columns is made after (W - 1) / (W T) of the product, or 1 / T of it with the own
    rows, the first of t pieces of rows after 1 / (W t), so T columns stand beside T / (W - 1) or T / W rows. The rank
    in the middle, whose products are the most, counts for all, so that all choose alike.
    """
    world = len(sizes)
    if world < 2:
        return False
    pieces = max(1, round(arm.subchunks / (world if arm.whole else world - 1)))
    if 2 * max(sizes) >= pieces * itemsize * HUNGRY:
        return False
    rows = ChunkPlan(world // 2, sizes, pieces)
    return cut(arm, world // 2, sizes, n).reads(k, n) < rows.reads(k, n)


def narrow(arm: Arm, n: int) -> bool:
    """Whether a product of `n` columns gives an arm pieces of columns that are too narrow for a GPU, in the mean."""
    return arm.columns and n < NARROW * arm.subchunks


def in_columns(
    arm: Arm, sizes: tuple[int, ...], k: int, n: int, itemsize: int, *, gpu: bool, summed: bool = False
) -> bool:
    """Whether an arm's pieces of columns may pay in a reduce-scatter, or (`summed`) in an all-reduce, where they alone
    hide that sums are handed out. On a GPU those of a reduce-scatter have the own rows too."""
    if arm.whole != (gpu and not summed):
        return False
    return summed or (fewer_reads(arm, sizes, k, n, itemsize) and not (gpu and narrow(arm, n)))
