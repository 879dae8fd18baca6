"""How many bytes a pack must move: what no kernel can go below, from the layout alone.

A pack reads whole granules of the memory behind the second-level cache (64 bytes on an H200, as the device says of
itself; mpi_gpu_traffic counts them) and writes its dense side. An unpack reads the dense side and writes sectors of 32
bytes; a sector that it writes in part is read first, in whole granules. So blocks of 32 bytes with gaps as large move
three bytes in a pack where a copy moves two, and blocks of 4 move five in an unpack: 67 % and 40 % of the rate of a
copy are the ceiling there. The bound holds where the layout does not fit in the second-level cache; one that does is
not bound by memory.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from undertow.benchmarks.mpi_gpu_rivals import Layout

GRANULE, SECTOR, LINE = 64, 32, 128
MOST_STARTS = 1 << 23  # blocks that are looked at one by one; of a longer loop, one period stands for all


@lru_cache(maxsize=4)
def runs(layout: Layout) -> tuple[np.ndarray, np.ndarray, int]:
    """(starts, ends, how often they repeat): the bytes of the layout, blocks that touch being one run."""
    times = 1
    if layout.offsets:
        starts = np.array(sorted(layout.offsets))
    else:
        dims = list(layout.dims)
        if len(dims) == 1:
            count, stride = dims[0]
            period = math.lcm(stride, LINE) // stride
            if count > period and count % period == 0:
                dims, times = [(period, stride)], count // period
        blocks = math.prod(count for count, _ in dims)
        if blocks > MOST_STARTS:
            raise ValueError(f"{layout.name} has {blocks:,} blocks; at most {MOST_STARTS:,} are looked at one by one")
        starts = np.zeros(1, np.int64)
        for count, stride in dims:
            starts = (starts[:, None] + np.arange(count, dtype=np.int64) * stride).reshape(-1)
        starts.sort()
    ends = starts + layout.block
    apart = starts[1:] != ends[:-1]
    return starts[np.r_[True, apart]], ends[np.r_[apart, True]], times


def touched(layout: Layout, unit: int) -> int:
    """Bytes of the aligned units that hold a byte of the layout, which begins at an aligned address."""
    starts, ends, times = runs(layout)
    first, last = starts // unit, (ends - 1) // unit
    shared = int((first[1:] == last[:-1]).sum())  # a unit where one run ends and the next begins
    return (int((last - first + 1).sum()) - shared) * unit * times


def partial(layout: Layout, granule: int) -> int:
    """Bytes of the granules around sectors that the layout covers in part."""
    starts, ends, times = runs(layout)
    at_start, at_end = starts[starts % SECTOR != 0] // granule, ends[ends % SECTOR != 0] // granule
    return len(np.union1d(at_start, at_end)) * granule * times


def bytes_moved(layout: Layout, packing: bool, granule: int = GRANULE) -> tuple[int, int]:
    """(read, written) of one pack or unpack that finds nothing in the cache and leaves nothing there."""
    if packing:
        return touched(layout, granule), layout.size
    return layout.size + partial(layout, granule), touched(layout, SECTOR)


def cache_bytes(layout: Layout) -> int:
    """What a pack or unpack takes of the second-level cache: lines of 128 bytes, on both sides."""
    return touched(layout, LINE) + layout.size


def ceiling(layout: Layout, packing: bool) -> float:
    """The most that a pack can reach of the rate of a copy of its size, both bound by memory."""
    return min(1.0, 2 * layout.size / sum(bytes_moved(layout, packing)))
