"""Random datatypes: our packed bytes equal the library's, and unpacking restores exactly the type's bytes.

usage: fuzz_types.py SEED ROUNDS
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parent))

import library
from mpi_types import Types


def span(datatype: MPI.Datatype, count: int) -> tuple[int, int]:
    """(bytes below the origin, bytes from the origin on) that `count` elements may touch."""
    true_lb, true_extent = datatype.Get_true_extent()
    extent = datatype.Get_extent()[1]
    low = min(true_lb, true_lb + (count - 1) * extent)
    high = max(true_lb, true_lb + (count - 1) * extent) + true_extent
    return max(0, -low), max(1, high)


def main(seed: int, rounds: int) -> None:
    types = Types(seed)
    rng = np.random.default_rng(seed)
    for number in range(rounds):
        datatype = types.random(types.rng.randint(1, 4))
        count = types.rng.choice([1, 1, 2, 3, 7])
        below, above = span(datatype, count)
        buffer = rng.integers(0, 256, below + above, dtype=np.uint8)
        origin = buffer.ctypes.data + below
        want = library.pack(datatype, count, origin)
        got = library.our_pack(datatype, count, origin)
        assert np.array_equal(want, got), f"pack differs: seed {seed} round {number} {datatype.Get_envelope()}"
        index = places(datatype, count, below, above)
        if len(np.unique(index)) == len(index):
            blank = np.full(below + above, 0x5A, np.uint8)
            target = blank.copy()
            library.our_unpack(datatype, count, want, target.ctypes.data + below)
            blank[index] = want
            assert np.array_equal(target, blank), f"unpack differs: seed {seed} round {number}"
        types.free()
    print(f"ok {rounds}")


def places(datatype: MPI.Datatype, count: int, below: int, above: int) -> np.ndarray:
    """Where each packed byte comes from, asked of the library with three patterns."""
    numbers = np.arange(below + above, dtype=np.int64)
    index = np.zeros(datatype.Get_size() * count, np.int64)
    for shift in (0, 8, 16, 24):
        pattern = (numbers >> shift).astype(np.uint8)
        index |= library.pack(datatype, count, pattern.ctypes.data + below).astype(np.int64) << shift
    return index


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
