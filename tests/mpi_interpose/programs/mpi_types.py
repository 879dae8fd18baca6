"""A seeded generator of nested MPI datatypes through mpi4py: every constructor, negative strides, gaps, zero counts."""

from __future__ import annotations

import random

from mpi4py import MPI

PLAIN = [MPI.CHAR, MPI.BYTE, MPI.SHORT, MPI.INT, MPI.FLOAT, MPI.DOUBLE, MPI.LONG_LONG, MPI.C_DOUBLE_COMPLEX]
PAIRS = [MPI.SHORT_INT, MPI.DOUBLE_INT, MPI.LONG_INT, MPI.FLOAT_INT, MPI.TWOINT, MPI.LONG_DOUBLE_INT]
_KINDS = (
    "contiguous vector hvector indexed hindexed indexed_block hindexed_block struct subarray darray resized dup f90"
)
KINDS = _KINDS.split()


class Types:
    """Makes types and frees all it made; `made` holds every derived handle of the current type."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.made: list[MPI.Datatype] = []

    def free(self) -> None:
        for datatype in self.made:
            datatype.Free()
        self.made.clear()

    def keep(self, datatype: MPI.Datatype) -> MPI.Datatype:
        self.made.append(datatype)
        return datatype

    def leaf(self) -> MPI.Datatype:
        roll = self.rng.random()
        if roll < 0.12:
            return self.rng.choice(PAIRS)
        if roll < 0.16:
            kind, numbers = self.rng.choice((("real", (6, 30)), ("complex", (6, 30)), ("integer", (9,))))
            try:
                return getattr(MPI.Datatype, f"Create_f90_{kind}")(*numbers)
            except (MPI.Exception, NotImplementedError):
                return MPI.DOUBLE
        if roll < 0.2 and MPI.Get_version() >= (4, 1):
            return MPI.Datatype.Get_value_index(MPI.DOUBLE, MPI.INT)
        return self.rng.choice(PLAIN)

    def random(self, depth: int = 3, limit: int = 1 << 16) -> MPI.Datatype:
        """A committed type whose span fits `limit` bytes."""
        while True:
            datatype = self.make(depth)
            if self.fits(datatype, limit):
                return datatype.Commit() if not datatype.is_predefined else self.keep(datatype.Dup()).Commit()
            self.free()

    @staticmethod
    def fits(datatype: MPI.Datatype, limit: int) -> bool:
        lb, extent = datatype.Get_extent()
        true_lb, true_extent = datatype.Get_true_extent()
        return (
            0 < datatype.Get_size() <= limit and true_extent <= limit and abs(true_lb) <= limit and abs(extent) <= limit
        )

    def make(self, depth: int) -> MPI.Datatype:
        """A type with at least one byte: MPICH 5.0.2 divides by zero when it packs some types made of empty ones."""
        while depth > 0:
            datatype = self.of_kind(self.rng.choice(KINDS), depth)
            if datatype.Get_size() > 0:
                return datatype
        return self.leaf()

    def of_kind(self, kind: str, depth: int) -> MPI.Datatype:
        rng = self.rng
        if kind == "f90":
            return self.leaf()
        old = self.make(depth - 1)
        n = rng.choice([0, 1, 2, 3, 5, 8, 17])
        small = [rng.choice([0, 1, 1, 2, 3, 4]) for _ in range(n)]
        extent = abs(old.Get_extent()[1]) or 1
        step = rng.choice([1, 2, 3, 5, -2, -1, 16])
        if kind == "contiguous":
            return self.keep(old.Create_contiguous(n))
        if kind == "vector":
            return self.keep(old.Create_vector(n, rng.choice([0, 1, 1, 2, 3]), step))
        if kind == "hvector":
            return self.keep(old.Create_hvector(n, rng.choice([0, 1, 2, 3]), step * extent + rng.choice([0, 0, 4, 1])))
        if kind == "indexed":
            return self.keep(old.Create_indexed(small, [rng.randint(-20, 40) for _ in small]))
        if kind == "hindexed":
            return self.keep(old.Create_hindexed(small, [rng.randint(-300, 900) for _ in small]))
        if kind == "indexed_block":
            return self.keep(old.Create_indexed_block(rng.choice([0, 1, 2]), [rng.randint(-20, 40) for _ in small]))
        if kind == "hindexed_block":
            return self.keep(old.Create_hindexed_block(rng.choice([1, 2]), [rng.randint(-300, 900) for _ in small]))
        if kind == "struct":
            members = [self.make(depth - 1) for _ in range(rng.randint(1, 4))]
            counts = [rng.choice([0, 1, 1, 2, 3]) for _ in members]
            return self.keep(MPI.Datatype.Create_struct(counts, [rng.randint(-200, 600) for _ in members], members))
        order = rng.choice([MPI.ORDER_C, MPI.ORDER_FORTRAN])
        if kind == "subarray":
            dims = rng.randint(1, 4)
            sizes = [rng.randint(1, 6) for _ in range(dims)]
            parts = [rng.randint(1, size) for size in sizes]
            starts = [rng.randint(0, size - part) for size, part in zip(sizes, parts)]
            return self.keep(old.Create_subarray(sizes, parts, starts, order))
        if kind == "darray":
            return self.darray(old, order)
        if kind == "resized":
            lb, size = old.Get_extent()
            return self.keep(old.Create_resized(lb + rng.choice([0, -4, 8]), size + rng.choice([0, 8, 3, -1])))
        return self.keep(old.Dup())

    def darray(self, old: MPI.Datatype, order: int) -> MPI.Datatype:
        rng = self.rng
        dims = rng.randint(1, 3)
        grid = [rng.randint(1, 3) for _ in range(dims)]
        sizes = [rng.randint(1, 9) for _ in range(dims)]
        kinds, arguments = [], []
        for d in range(dims):
            kind = rng.choice([MPI.DISTRIBUTE_BLOCK, MPI.DISTRIBUTE_CYCLIC, MPI.DISTRIBUTE_NONE])
            if kind == MPI.DISTRIBUTE_NONE:
                grid[d] = 1
            smallest = -(-sizes[d] // grid[d])
            argument = rng.choice([MPI.DISTRIBUTE_DFLT_DARG, smallest + rng.randint(0, 1)])
            if kind == MPI.DISTRIBUTE_CYCLIC:
                argument = rng.choice([MPI.DISTRIBUTE_DFLT_DARG, 1, 2, 3])
            kinds.append(kind)
            arguments.append(argument if kind != MPI.DISTRIBUTE_NONE else MPI.DISTRIBUTE_DFLT_DARG)
        ranks = 1
        for side in grid:
            ranks *= side
        return self.keep(old.Create_darray(ranks, rng.randrange(ranks), sizes, kinds, arguments, grid, order))
