"""Datatypes of more than 256 KiB are compared with the library before they are used, like small ones.

Open MPI 5 packs wrong bytes for 16-byte elements with gaps behind each, where they lie on multiples of 8. Whatever a
library packs, a program must get the same with the preload; the test reads in the report which types were used.
"""

from __future__ import annotations

import library
import numpy as np
from mpi4py import MPI


def check(datatype: MPI.Datatype, times: int = 1) -> None:
    datatype.Commit()
    lb, extent = datatype.Get_true_extent()
    buffer = np.random.default_rng(1).integers(0, 256, lb + extent, dtype=np.uint8)
    assert buffer.ctypes.data % 16 == 0
    want = library.pack(datatype, 1, buffer.ctypes.data)
    for _ in range(times):
        assert np.array_equal(library.our_pack(datatype, 1, buffer.ctypes.data), want)
    datatype.Free()


if __name__ == "__main__":
    for n in (100, 30000):  # 1.6 KB and 480 KB
        spaced = MPI.C_DOUBLE_COMPLEX.Create_resized(0, 24)
        check(spaced.Create_vector(n, 1, 3))
        if n == 100:  # a type that is another one moved by a cache line
            check(spaced.Create_vector(n, 1, 3).Create_hindexed([1], [64]))
        if n == 100:  # its first byte lies at 4, the other elements on multiples of 8: a question of where it is put
            check(spaced.Create_hindexed([1, 40], [4, 48]))
        spaced.Free()
    check(MPI.FLOAT.Create_vector(1 << 17, 1, 4), times=10)  # 512 KiB
    print("ok")
