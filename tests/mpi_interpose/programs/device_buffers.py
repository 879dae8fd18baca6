"""Numbers in device memory that MPI calls may be given, for the rule programs of device buffers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parent))

from device_memory import Array, Device

comm = MPI.COMM_WORLD
rank, size, peer = comm.rank, comm.size, comm.rank ^ 1
GAP = 77
device = Device(rank)


class Mine:
    """An array of numbers on the device (or, with on=False, on the host) that MPI calls may be given."""

    def __init__(self, values: np.ndarray, on: bool = True) -> None:
        self.dtype, self.host = values.dtype.str, values.copy()
        self.array = device.array(values) if on else None

    def address(self, skip: int = 0) -> int:
        return (self.array.address if isinstance(self.array, Array) else self.host.ctypes.data) + skip

    def mpi(self, skip: int = 0) -> MPI.buffer:
        return MPI.buffer.fromaddress(self.address(skip), self.host.nbytes - skip)

    def write(self, values: np.ndarray) -> None:
        if isinstance(self.array, Array):
            self.array.write(values)
        else:
            self.host[:] = values

    def read(self) -> np.ndarray:
        return self.array.read(self.dtype) if isinstance(self.array, Array) else self.host


def data(r: int, n: int = 400) -> np.ndarray:
    return (np.arange(n) * 3 + 1000 * r).astype("i")


def blank(n: int = 400) -> np.ndarray:
    return np.full(n, GAP, "i")


def strided(n: int = 64, length: int = 3, step: int = 5) -> MPI.Datatype:
    return MPI.INT.Create_vector(n, length, step).Commit()


PLACES = (np.arange(64)[:, None] * 5 + np.arange(3)[None, :]).reshape(-1)


def expect(source: int) -> np.ndarray:
    out = blank()
    out[PLACES] = data(source)[PLACES]
    return out
