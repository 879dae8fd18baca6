"""A stored tensor piece by piece, whole again whatever the number of ranks that wrote it, in bounded memory.

Pieces are runs of rows, cut by shape and type alone, so two checkpoints of the same tensor are cut alike however they
were sharded. Rows are read with `pread`, not mapped, so that memory in use stays the budget and not the file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from .manifest import BadCheckpoint, Manifest, ShardRecord
from .reader import dtype_of

PIECE_BYTES = 32 * 2**20


def pieces(path: Path, manifest: Manifest, key: str, *, budget_bytes: int = PIECE_BYTES) -> Iterator[torch.Tensor]:
    """Flat tensors that joined are tensor `key` in row-major order, each at most `budget_bytes` or one row."""
    record = manifest.tensors[key]
    dtype = dtype_of(record.dtype)
    lead = next((dim for dim, size in enumerate(record.shape[:-1]) if size != 1), max(0, len(record.shape) - 1))
    shape = record.shape[lead:] or (1,)
    boxes = [(shard, shard.offsets[lead:] or (0,), shard.sizes[lead:] or (1,)) for shard in record.shards]
    if not math.prod(shape):
        return
    row = math.prod(shape[1:]) * dtype.itemsize
    rows = max(1, budget_bytes // row)
    handles = {shard.file: os.open(path / shard.file, os.O_RDONLY | os.O_CLOEXEC) for shard in record.shards}
    try:
        for begin in range(0, shape[0], rows):
            end = min(begin + rows, shape[0])
            piece = torch.empty((end - begin, *shape[1:]), dtype=dtype)
            for shard, offsets, sizes in boxes:
                first, last = max(begin, offsets[0]), min(end, offsets[0] + sizes[0])
                if first < last and math.prod(sizes):
                    target = piece[first - begin : last - begin]
                    for dim in range(1, len(shape)):
                        target = target.narrow(dim, offsets[dim], sizes[dim])
                    target.copy_(_rows(handles[shard.file], shard, dtype, sizes, first - offsets[0], last - first))
            yield piece.view(-1)
    finally:
        for handle in handles.values():
            os.close(handle)


def _rows(
    handle: int, shard: ShardRecord, dtype: torch.dtype, sizes: tuple[int, ...], first: int, count: int
) -> torch.Tensor:
    row = math.prod(sizes[1:]) * dtype.itemsize
    data = bytearray(count * row)
    view, position = memoryview(data), shard.payload + first * row
    while view:
        got = os.preadv(handle, [view], position)
        if not got:
            raise BadCheckpoint(f"{shard.file} ends at byte {position}, inside a tensor")
        view, position = view[got:], position + got
    return torch.frombuffer(data, dtype=dtype).view(count, *sizes[1:])


def stored_bytes(manifest: Manifest, key: str) -> int:
    """The tensor's size in bytes."""
    record = manifest.tensors[key]
    return math.prod(record.shape) * dtype_of(record.dtype).itemsize
