"""The MPI library's own PMPI functions through ctypes: the reference that the preload cannot have touched."""

from __future__ import annotations

import ctypes

import numpy as np
from mpi4py import MPI


def mapped(name: str) -> str:
    """Path of the mapped file whose base name starts with `name`."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            path = line.split()[-1]
            if path.rsplit("/", 1)[-1].startswith(name):
                return path
    return ""


PATH = next(filter(None, map(mapped, ("libmpi.so", "libmpich.so", "libmpi_abi.so"))))
LIB = ctypes.CDLL(PATH)


def handle(thing: object) -> ctypes.c_void_p | ctypes.c_int:
    value = MPI._handleof(thing)
    return ctypes.c_void_p(value) if MPI._sizeof(thing) == 8 else ctypes.c_int(value)


def pack(datatype: MPI.Datatype, count: int, address: int) -> np.ndarray:
    """PMPI_Pack of `count` elements at `address`."""
    size = datatype.Get_size() * count
    out, position = np.zeros(max(1, size), np.uint8), ctypes.c_int(0)
    rc = LIB.PMPI_Pack(
        ctypes.c_void_p(address), count, handle(datatype), ctypes.c_void_p(out.ctypes.data), size,
        ctypes.byref(position), handle(MPI.COMM_SELF),
    )  # fmt: skip
    assert rc == 0 and position.value == size, (rc, position.value, size)
    return out[:size]


def our_pack(datatype: MPI.Datatype, count: int, address: int, symbol: str = "MPI_Pack") -> np.ndarray:
    """The same through the global symbol, which the preload has replaced."""
    size = datatype.Get_size() * count
    everywhere = ctypes.CDLL(None)
    out, position = np.zeros(max(1, size) + 32, np.uint8), ctypes.c_int(0)
    rc = getattr(everywhere, symbol)(
        ctypes.c_void_p(address), count, handle(datatype), ctypes.c_void_p(out.ctypes.data), size,
        ctypes.byref(position), handle(MPI.COMM_SELF),
    )  # fmt: skip
    assert rc == 0 and position.value == size, (rc, position.value, size)
    assert not out[size:].any()
    return out[:size]


def our_unpack(datatype: MPI.Datatype, count: int, packed: np.ndarray, address: int) -> None:
    everywhere, position = ctypes.CDLL(None), ctypes.c_int(0)
    rc = everywhere.MPI_Unpack(
        ctypes.c_void_p(packed.ctypes.data), len(packed), ctypes.byref(position), ctypes.c_void_p(address), count,
        handle(datatype), handle(MPI.COMM_SELF),
    )  # fmt: skip
    assert rc == 0 and position.value == len(packed), (rc, position.value, len(packed))
