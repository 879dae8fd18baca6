"""Messages from and to device memory as libraries make it: the runtime's cudaMalloc, torch, cupy and its pools.

Two ranks on a GPU under the preload. Every kind of memory that is at hand here is sent to its own kind and to the host,
and received from the host, with a datatype that has gaps, at an offset inside the allocation; what arrives is compared
with numpy. Managed memory is among them. With torch, also what is queued on the default stream around a message. Prints
the kinds that were tried.

usage: device_libraries.py [KIND …]      kinds that must be at hand
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parent))

from device_memory import Device

comm = MPI.COMM_WORLD
rank, peer = comm.rank, comm.rank ^ 1
device = Device(rank)
N, SKIP = 5000, 48  # numbers; bytes in front of them
Made = tuple[int, Any]  # address of SKIP + 4 N bytes, and what keeps them


def runtime() -> Made:
    """cudaMalloc of the CUDA runtime that torch or cupy has loaded."""
    for version in (13, 12):
        try:
            cudart = ctypes.CDLL(f"libcudart.so.{version}")
        except OSError:
            continue
        pointer = ctypes.c_void_p()
        if cudart.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(SKIP + 4 * N)):
            raise RuntimeError("cudaMalloc failed")
        return pointer.value or 0, None
    raise ImportError("no CUDA runtime is loaded")


def with_torch() -> Made:
    import torch

    if not torch.cuda.is_available():
        raise ImportError("this torch has no device")
    made = torch.zeros(SKIP + 4 * N, dtype=torch.uint8, device=f"cuda:{rank % torch.cuda.device_count()}")
    torch.cuda.synchronize(made.device)
    return made.data_ptr(), made


def with_cupy(allocate: str) -> Callable[[], Made]:
    """By a function of cupy.cuda: its pool's alloc, malloc_managed, or malloc_async (a pool of the driver's)."""

    def make() -> Made:
        import cupy

        cupy.cuda.Device(rank % cupy.cuda.runtime.getDeviceCount()).use()
        made = getattr(cupy.cuda, allocate)(SKIP + 4 * N)
        cupy.cuda.Device().synchronize()
        return made.ptr, made

    return make


def on_driver() -> Made:
    made = device.empty(SKIP + 4 * N)
    return made.address, made


# torch and cupy first: they load the runtime
KINDS: dict[str, Callable[[], Made]] = {
    "driver": on_driver, "torch": with_torch, "cupy": with_cupy("alloc"), "cupy async": with_cupy("malloc_async"),
    "managed": with_cupy("malloc_managed"), "cudaMalloc": runtime,
}  # fmt: skip


class Bytes:
    """N numbers behind SKIP bytes of a kind of memory; of numpy's for kind 'host'."""

    def __init__(self, kind: str, values: np.ndarray) -> None:
        self.host = values.copy()
        self.at, self.keep = (0, None) if kind == "host" else KINDS[kind]()
        if self.at:
            device.must(device.cuda.cuMemcpy(ctypes.c_uint64(self.at + SKIP), self._host(), ctypes.c_size_t(4 * N)))
            device.must(device.cuda.cuCtxSynchronize())

    def _host(self) -> ctypes.c_uint64:
        return ctypes.c_uint64(self.host.ctypes.data)

    def mpi(self) -> MPI.buffer:
        return MPI.buffer.fromaddress(self.at + SKIP if self.at else self.host.ctypes.data, 4 * N)

    def read(self) -> np.ndarray:
        if self.at:
            device.must(device.cuda.cuMemcpy(self._host(), ctypes.c_uint64(self.at + SKIP), ctypes.c_size_t(4 * N)))
            device.must(device.cuda.cuCtxSynchronize())
        return self.host


def exchange(source: str, target: str) -> None:
    datatype = MPI.INT.Create_vector(N // 5, 3, 5).Commit()
    values = np.arange(N, dtype="i") * 3
    mine, got = Bytes(source, values + rank), Bytes(target, np.full(N, -7, "i"))
    comm.Sendrecv([mine.mpi(), 1, datatype], peer, 5, [got.mpi(), 1, datatype], peer, 5)
    want = np.full(N, -7, "i")
    inside = (np.arange(N) % 5) < 3
    want[inside] = (values + peer)[inside]
    assert np.array_equal(got.read(), want), (source, target)
    datatype.Free()


def behind_the_default_stream() -> None:
    """What torch has queued there is done before a message is packed, and an earlier reader before one is unpacked."""
    import torch

    place = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(place)
    datatype = MPI.INT.Create_vector(N // 5, 3, 5).Commit()
    inside = torch.arange(N, device=place) % 5 < 3
    slow = torch.ones(4096, 4096, device=place)
    for turn in range(3):
        mine, got = (torch.full((N,), -7, dtype=torch.int32, device=place) for _ in range(2))
        torch.cuda.synchronize(place)
        for _ in range(20):
            torch.mm(slow, slow)
        before = got.clone()  # reads the target, still to come when the message arrives
        mine.copy_(torch.arange(N, device=place) * 3 + rank + turn)
        sent, received = (MPI.buffer.fromaddress(x.data_ptr(), 4 * N) for x in (mine, got))
        comm.Sendrecv([sent, 1, datatype], peer, 6, [received, 1, datatype], peer, 6)
        other = torch.cuda.Stream(place)
        with torch.cuda.stream(other):  # the data are there for every stream
            want = torch.where(inside, torch.arange(N, device=place) * 3 + peer + turn, -7).to(torch.int32)
            right = torch.equal(got, want)
        assert right and bool((before == -7).all()), turn
    datatype.Free()


def main(needed: list[str]) -> None:
    tried = []
    for kind, make in KINDS.items():
        try:
            here = make()[0] > 0
        except (ImportError, RuntimeError) as error:  # a driver without pools, for one; `needed` says what must not
            sys.stderr.write(f"rank {rank}: no memory of kind {kind}: {error}\n")
            here = False
        if not comm.allreduce(here, MPI.LAND):
            continue
        for source, target in ((kind, kind), (kind, "host"), ("host", kind)):
            exchange(source, target)
        tried.append(kind)
    if "torch" in tried:
        behind_the_default_stream()
    missing = [kind for kind in needed if kind not in tried]
    if missing:
        raise SystemExit(f"device_libraries: no memory of {', '.join(missing)} here")
    if rank == 0:
        sys.stdout.write(f"kept by memory of {', '.join(tried)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
