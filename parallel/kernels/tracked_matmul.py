"""A product that says how far it is: a persistent Triton kernel that counts the finished tiles of each piece.

The tracker of T3 (Pati et al., ASPLOS 2024, section 4.2) in software. Tiles are made in the order of a table, piece
after piece, so a copy engine that waits for a counter (`comms.stream_wait`) carries off what is finished while the same
launch makes the rest: no piece pays for a launch or a last wave of its own, as row chunks of cuBLAS do. Each tile is
stored by all warps, then a barrier, then one release at system scope: the reader is a copy engine, outside the scope
of the GPU. Counters only grow (see `comms.tracker`).

Shapes: a [M, K], b [K, N] (or the transpose of a contiguous [N, K]), y [M, N].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # the CPU build of torch comes without Triton
    triton = None

BLOCK_M, BLOCK_N, BLOCK_K = 128, 256, 64
GROUP = 8  # tile rows whose columns are made together, for the second-level cache; never across pieces


def unusable(a_MK: Tensor, b_KN: Tensor) -> str:
    """Why the kernel cannot make this product; '' when it can."""
    if triton is None:
        return "no Triton"
    if not a_MK.is_cuda:
        return "not on a GPU"
    if torch.cuda.get_device_capability(a_MK.device) < (9, 0):
        return "a GPU older than compute capability 9.0"
    if a_MK.dtype not in (torch.bfloat16, torch.float16) or b_KN.dtype != a_MK.dtype:
        return f"{a_MK.dtype} @ {b_KN.dtype}: only two of bfloat16 or of float16"
    if not a_MK.numel() or not b_KN.numel():
        return "an empty product"
    if not _described(a_MK) or not (_described(b_KN) or _described(b_KN.t())):
        return "rows that are not contiguous, or do not begin at multiples of 16 bytes"
    return ""


def tile_table(pieces: Sequence[tuple[int, int]], n: int, block_m: int = BLOCK_M, block_n: int = BLOCK_N) -> Tensor:
    """int32 [tiles, 4]: first row, end of the piece's rows, first column and number of the piece, in order of making.

    `pieces`: rows [low, high) of each, in the order in which they are made. No tile covers rows of two pieces.
    """
    tiles = []
    for number, (low, high) in enumerate(pieces):
        rows = list(range(low, high, block_m))
        for first in range(0, len(rows), GROUP):
            for column in range(0, n, block_n):
                tiles += [(row, high, column, number) for row in rows[first : first + GROUP]]
    return torch.tensor(tiles, dtype=torch.int32).reshape(-1, 4)


@lru_cache(maxsize=256)
def _placed(pieces: tuple[tuple[int, int], ...], n: int, device: torch.device) -> tuple[Tensor, list[int]]:
    """The table on its device, and the number of tiles of each piece."""
    table = tile_table(pieces, n)
    return table.to(device), torch.bincount(table[:, 3], minlength=len(pieces)).tolist()


def tracked_matmul(
    a_MK: Tensor, b_KN: Tensor, y_MN: Tensor, pieces: Sequence[tuple[int, int]], counters: Tensor
) -> list[int]:
    """Queue y = a @ b, and add 1 to counters[i] (int32) as each tile of pieces[i] is in memory; their numbers of tiles.

    Summed in float32. `unusable(a, b)` must be ''.
    """
    table, counts = _placed(tuple(pieces), b_KN.shape[1], a_MK.device)
    _launch(a_MK, b_KN, y_MN, table, counters, torch.cuda.get_device_properties(a_MK.device).multi_processor_count)
    return counts


def _launch(a: Tensor, b: Tensor, y: Tensor, table: Tensor, counters: Tensor, programs: int) -> None:
    transposed = not _described(b)
    stored, block = (b.t(), [BLOCK_N, BLOCK_K]) if transposed else (b, [BLOCK_K, BLOCK_N])
    programs = max(1, min(programs, len(table)))
    _tracked_kernel[(programs,)](  # pyright: ignore[reportIndexIssue]
        TensorDescriptor.from_tensor(a, [BLOCK_M, BLOCK_K]), TensorDescriptor.from_tensor(stored, block),
        y, table, counters, len(table), b.shape[1], a.shape[1], y.stride(0),
        transposed, BLOCK_M, BLOCK_N, BLOCK_K, programs, num_warps=8, num_stages=3,
    )  # fmt: skip


def _described(rows: Tensor) -> bool:
    """Whether a tensor descriptor can name it."""
    size = rows.element_size()
    return rows.stride(1) == 1 and rows.stride(0) * size % 16 == 0 and rows.data_ptr() % 16 == 0


if triton is not None:

    @triton.jit
    def _tracked_kernel(
        a, b, y, tiles, counters, n_tiles, N, K, y_stride,
        TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr,
    ):  # fmt: skip
        for at in range(tl.program_id(0), n_tiles, PROGRAMS):
            low = tl.load(tiles + 4 * at)
            high = tl.load(tiles + 4 * at + 1)
            left = tl.load(tiles + 4 * at + 2)
            piece = tl.load(tiles + 4 * at + 3)
            total = tl.zeros((BM, BN), tl.float32)
            for k in range(0, K, BK):
                x = a.load([low, k])
                if TRANSPOSED:
                    w = b.load([left, k]).T
                else:
                    w = b.load([k, left])
                total = tl.dot(x, w, total)
            row = low + tl.arange(0, BM)
            column = left + tl.arange(0, BN)
            here = y + row.to(tl.int64)[:, None] * y_stride + column[None, :]
            tl.store(here, total.to(y.dtype.element_ty), mask=(row < high)[:, None] & (column < N)[None, :])
            tl.debug_barrier()
            tl.atomic_add(counters + piece, 1, sem="release", scope="sys")


def tracked_product(a_MK: Tensor, b_KN: Tensor, y_MN: Tensor) -> Any:
    """`tracked_matmul` of these three for `comms.overlap_cuda`; None where it is `unusable`."""
    if unusable(a_MK, b_KN):
        return None
    return lambda pieces, counters: tracked_matmul(a_MK, b_KN, y_MN, pieces, counters)
