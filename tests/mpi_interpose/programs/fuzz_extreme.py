"""Datatypes with extreme numbers: huge and zero counts, strides and displacements near the ends of their range, nested.

Each is committed, which decodes and plans it, and freed; none is packed, because the libraries themselves then read
outside the buffer. It is the arithmetic of the decoder that is on trial, best under a sanitizer: sizes and bounds that
leave 64 bits must be noticed, not wrapped.

usage: fuzz_extreme.py SEED ROUNDS
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

from mpi4py import MPI

LARGEST_BASE = 1 << 19  # one step multiplies a size by 2^43 at most, and MPICH ends the program beyond 63 bits
COUNTS = (0, 1, 2, 3, 7, 1000, 65535, 65536, 2**20, 2**31 - 1)
STEPS = (0, 1, -1, 3, -7, 4096, -65536, 2**31 - 1, -(2**31), 2**40, -(2**40), 2**61, -(2**61))


class Extremes:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def step(self, ints: bool = False) -> int:
        return self.rng.choice([s for s in STEPS if not ints or -(2**31) <= s < 2**31])

    def grow(self, base: MPI.Datatype) -> MPI.Datatype:
        rng, count = self.rng, self.rng.choice
        some = [rng.choice(COUNTS[:6]) for _ in range(rng.randint(0, 4))]
        makers: list[Callable[[], MPI.Datatype]] = [
            lambda: base.Create_contiguous(count(COUNTS)),
            lambda: base.Create_vector(count(COUNTS), count(COUNTS[:6]), self.step(ints=True)),
            lambda: base.Create_hvector(count(COUNTS), count(COUNTS[:6]), self.step()),
            lambda: base.Create_indexed(some, [self.step(ints=True) for _ in some]),
            lambda: base.Create_hindexed(some, [self.step() for _ in some]),
            lambda: base.Create_hindexed_block(count(COUNTS[:5]), [self.step() for _ in some]),
            lambda: MPI.Datatype.Create_struct(some, [self.step() for _ in some], [base] * len(some)),
            lambda: base.Create_resized(self.step(), self.step()),
            base.Dup,
        ]
        return rng.choice(makers)()


def main(seed: int, rounds: int) -> None:
    MPI.COMM_WORLD.Set_errhandler(MPI.ERRORS_RETURN)
    extremes, made = Extremes(seed), 0
    for _ in range(rounds):
        size = 16
        datatype, owned = extremes.rng.choice([MPI.BYTE, MPI.INT, MPI.DOUBLE_INT, MPI.SHORT_INT]), False
        for _ in range(extremes.rng.randint(1, 4)):
            if size > LARGEST_BASE:
                break
            try:
                grown = extremes.grow(datatype)
            except (MPI.Exception, OverflowError):
                break
            size = grown.Get_size()
            if owned:
                datatype.Free()
            datatype, owned = grown, True
        if not owned:
            continue
        datatype.Commit()
        made += 1
        datatype.Free()
    print(f"ok {rounds}, {made} made")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
