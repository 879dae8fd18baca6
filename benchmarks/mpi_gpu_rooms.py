"""Where the buffers of the MPI benchmarks live, and the two ways without the preload to get their bytes into a message.

A `Room` makes device memory for one rank: on its own card (rank r of a host takes card r mod count, so two ranks share
the only card and part when there are two), in host memory to try a program without a GPU, or through the driver alone,
which the tests' stand-in for libcuda serves too. A `Batch` is what one exchange moves on one side: layouts at places of
a buffer, with a pinned buffer that holds them densely, one after the other. Its rivals' ways to fill that buffer are

    by hand     torch packs every layout into device scratch, one copy goes to pinned memory, one wait
    kernels     the same with a kernel of the user's own for each layout (mpi_gpu_rivals' strided copies), given nvcc
    per block   one cuMemcpyAsync for each contiguous block, as Open MPI's CUDA support does it, one wait
"""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from undertow.benchmarks.mpi_gpu_rivals import Driver, Layout, views
from undertow.mpi_interpose import gpu, gpu_kernels
from undertow.mpi_interpose.compile import compiler

MOST_BLOCKS = 1 << 17  # more single copies than this take seconds
ALIGN = 64
PRELOAD = ("auto", "direct", "staged")
IPC = "ipc"  # of the w collectives only: the switch UNDERTOW_MPI_IPC, otherwise off
RIVALS = ("by hand", "kernels", "per block")

BLOCKS = r"""
#include <string.h>
typedef int (*Copy)(unsigned long long, unsigned long long, unsigned long, void*);
extern "C" int on_host(unsigned long long to, unsigned long long from, unsigned long n, void*) {
  memcpy((void*)to, (const void*)from, n);
  return 0;
}
extern "C" int blocks(Copy copy, unsigned long long user, unsigned long long packed, int packing, long len,
                      long n2, long s2, long n1, long s1, void* stream) {
  int bad = 0;
  for (long z = 0; z < n2; ++z)
    for (long y = 0; y < n1; ++y, packed += len)
      bad |= packing ? copy(packed, user + z * s2 + y * s1, len, stream)
                     : copy(user + z * s2 + y * s1, packed, len, stream);
  return bad;
}
"""


def blocks_library() -> ctypes.CDLL:
    """The loop over single copies, in C."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "blocks.cc", Path(folder) / "blocks.so"
        source.write_text(BLOCKS)
        subprocess.run([compiler(), "-O2", "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
        return ctypes.CDLL(str(target))


@dataclass
class Buffer:
    """`nbytes` bytes of a room; `keep` owns them (a torch tensor of bytes where the room has torch)."""

    room: Room
    address: int
    nbytes: int
    keep: Any

    def mpi(self, mpi: Any) -> Any:
        return mpi.buffer.fromaddress(self.address, self.nbytes)

    def write(self, values: np.ndarray) -> None:
        self.room.write(self, np.ascontiguousarray(values).view(np.uint8).reshape(-1))

    def read(self, dtype: str = "u1") -> np.ndarray:
        return self.room.read(self).view(dtype)


class Room:
    """Memory of one rank by torch, on `device` 'cuda' or 'cpu'. `card` says where it is."""

    rivals: tuple[str, ...] = ("by hand", "per block")
    driver: Driver | None = None

    def __init__(self, rank: int, device: str) -> None:
        self.lib = blocks_library()
        self.on_card = device != "cpu"
        self.place = torch.device("cpu")
        self.card = "no card: host memory"
        if self.on_card:
            self.place = torch.device("cuda", rank % torch.cuda.device_count())
            torch.cuda.set_device(self.place)
            about = torch.cuda.get_device_properties(self.place)
            if gpu_kernels.find_nvcc():
                self.driver, self.rivals = Driver(), RIVALS
            self.card = f"cuda:{self.place.index} {about.name} {getattr(about, 'uuid', '')}".strip()

    def empty(self, nbytes: int) -> Buffer:
        made = torch.zeros(nbytes, dtype=torch.uint8, device=self.place)
        return Buffer(self, made.data_ptr(), nbytes, made)

    def write(self, buffer: Buffer, values: np.ndarray) -> None:
        buffer.keep.copy_(torch.from_numpy(values.copy()))
        self.wait()

    def read(self, buffer: Buffer) -> np.ndarray:
        return buffer.keep.cpu().numpy().copy()

    def pinned(self, nbytes: int) -> np.ndarray:
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=self.on_card).numpy()

    def wait(self) -> None:
        """Until all work of this rank's card is done (between timings, so that nobody pays for another's)."""
        if self.on_card:
            torch.cuda.synchronize(self.place)

    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self.on_card else 0

    def copier(self) -> Any:
        return ctypes.CDLL("libcuda.so.1").cuMemcpyAsync if self.on_card else self.lib.on_host

    def settle(self) -> None:
        if self.on_card:
            torch.cuda.current_stream().synchronize()


class DriverRoom(Room):
    """Memory by the driver's own calls, for the stand-in (and any card): no kernels of torch's, so no `by hand`."""

    rivals = ("per block",)

    def __init__(self, rank: int) -> None:
        self.lib, self.on_card = blocks_library(), True
        self.cuda = ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
        count, context = ctypes.c_int(), ctypes.c_void_p()
        self.must(self.cuda.cuInit(0))
        self.must(self.cuda.cuDeviceGetCount(ctypes.byref(count)))
        card = rank % count.value
        self.must(self.cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), card))
        self.must(self.cuda.cuCtxSetCurrent(context))
        name = ctypes.create_string_buffer(256)
        self.must(self.cuda.cuDeviceGetName(name, 256, card))
        self.card = f"cuda:{card} {name.value.decode()}"

    @staticmethod
    def must(result: int) -> None:
        if result:
            raise RuntimeError(f"CUDA driver error {result}")

    def empty(self, nbytes: int) -> Buffer:
        at = ctypes.c_uint64()
        self.must(self.cuda.cuMemAlloc_v2(ctypes.byref(at), ctypes.c_size_t(nbytes)))
        buffer = Buffer(self, at.value, nbytes, None)
        buffer.write(np.zeros(nbytes, np.uint8))
        return buffer

    def write(self, buffer: Buffer, values: np.ndarray) -> None:
        self._copy(buffer.address, values.ctypes.data, buffer.nbytes)

    def read(self, buffer: Buffer) -> np.ndarray:
        out = np.empty(buffer.nbytes, np.uint8)
        self._copy(out.ctypes.data, buffer.address, buffer.nbytes)
        return out

    def _copy(self, to: int, source: int, nbytes: int) -> None:
        self.must(self.cuda.cuMemcpy(ctypes.c_uint64(to), ctypes.c_uint64(source), ctypes.c_size_t(nbytes)))
        self.wait()

    def pinned(self, nbytes: int) -> np.ndarray:
        at = ctypes.c_void_p()
        self.must(self.cuda.cuMemHostAlloc(ctypes.byref(at), ctypes.c_size_t(nbytes), 1))
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(at.value or 0))

    def wait(self) -> None:
        self.must(self.cuda.cuCtxSynchronize())

    def stream(self) -> int:
        return 0

    def copier(self) -> Any:
        return self.cuda.cuMemcpyAsync

    settle = wait


def room(rank: int, device: str) -> Room:
    """device: 'cuda' (torch), 'driver' (libcuda alone) or 'cpu'."""
    return DriverRoom(rank) if device == "driver" else Room(rank, device)


class Batch:
    """Layouts at byte offsets of `buffer`; packed, the k-th lies at `places[k]` of `host`, `counts[k]` bytes long."""

    def __init__(self, where: Room, buffer: Buffer, parts: list[tuple[Layout, int]]) -> None:
        self.room, self.buffer, self.parts = where, buffer, parts
        self.counts = [layout.size for layout, _ in parts]
        self.places: list[int] = []
        total = 0
        for count in self.counts:
            self.places.append(total)
            total += -(-count // ALIGN) * ALIGN
        self.host = where.pinned(total)
        self.blocks = sum(layout.size // layout.block for layout, _ in parts)
        self.copy = where.copier()
        if "by hand" in where.rivals:
            whole = buffer.keep
            self.pinned = torch.from_numpy(self.host)
            self.scratch = torch.empty(total, dtype=torch.uint8, device=whole.device)
            self.views = [
                views(layout, whole[start : start + layout.span], self.scratch[place : place + layout.size])
                for (layout, start), place in zip(parts, self.places)
            ]
        self.kernels = {packing: self._kernels(packing) for packing in (True, False)} if where.driver else {}

    def _kernels(self, packing: bool) -> list[Callable[[], object]]:
        """A launch for each layout between the buffer and the scratch."""
        made, driver = [], self.room.driver
        for (layout, start), place in zip(self.parts, self.places):
            run = (
                driver.paper(layout, self.buffer.address + start, self.scratch.data_ptr() + place, packing)
                if driver
                else None
            )
            if run is None:
                raise ValueError(f"no strided kernel for {layout.name}: {len(layout.dims)} loops, expected one or two")
            made.append(run)
        return made

    def ways(self) -> list[str]:
        return [way for way in self.room.rivals if way != "per block" or self.blocks <= MOST_BLOCKS]

    def pack(self, way: str) -> None:
        """The bytes into `host`, by one of the rivals' ways; complete on return."""
        if way == "per block":
            self._each(True)
        else:
            self._move(way, True)
            self.pinned.copy_(self.scratch, non_blocking=True)
        self.room.settle()

    def unpack(self, way: str) -> None:
        if way == "per block":
            self._each(False)
        else:
            self.scratch.copy_(self.pinned, non_blocking=True)
            self._move(way, False)
        self.room.settle()

    def _move(self, way: str, packing: bool) -> None:
        """Between the buffer and the device scratch, queued."""
        if way == "kernels":
            for launch in self.kernels[packing]:
                launch()
            return
        for view, dense in self.views:
            dense.copy_(view) if packing else view.copy_(dense)

    def _each(self, packing: bool) -> None:
        for (layout, start), place in zip(self.parts, self.places):
            dims = layout.dims or ((1, layout.block),)
            (n1, s1), (n2, s2) = dims[-1], dims[0] if len(dims) == 2 else (1, 0)
            failed = self.room.lib.blocks(
                self.copy, ctypes.c_uint64(self.buffer.address + start), ctypes.c_uint64(self.host.ctypes.data + place),
                int(packing), ctypes.c_long(layout.block), ctypes.c_long(n2), ctypes.c_long(s2), ctypes.c_long(n1),
                ctypes.c_long(s1), ctypes.c_void_p(self.room.stream()),
            )  # fmt: skip
            if failed:
                raise RuntimeError(f"a copy of a block failed (CUDA error {failed})")

    def part(self, k: int) -> np.ndarray:
        return self.host[self.places[k] : self.places[k] + self.counts[k]]


class Preload:
    """The preload of this process, asked to take one path; `present` is false without it."""

    def __init__(self) -> None:
        self.lib = ctypes.CDLL(None)
        self.present = hasattr(self.lib, "undertow_measure_gpu_path")

    def take(self, way: str) -> None:
        """From the next call on: 'auto', 'direct', 'staged' or 'ipc'; a rival's way leaves things as they are."""
        if self.present and way not in RIVALS:
            self.lib.undertow_measure_gpu_path(gpu.PATHS.index("auto" if way == IPC else way))
            as_run = 2 * (way == "auto" and os.environ.get("UNDERTOW_MPI_IPC") == "auto")
            self.lib.undertow_measure_ipc(1 if way == IPC else as_run)

    def counted(self, what: str) -> int:
        """One of gpu.COUNTERS so far, as 'bytes' packed on the device or 'slabs' of pinned memory handed out."""
        if not self.present:
            return 0
        values = (ctypes.c_int64 * len(gpu.COUNTERS))()
        self.lib.undertow_measure_gpu_counters(values)
        return values[gpu.COUNTERS.index(what)]


def timed(
    world: Any, mpi: Any, where: Room, ways: list[str], once: Callable[[str], None], take: Callable[[str], None], n: int
) -> dict[str, list[float]]:
    """Microseconds of the slowest rank, `n` of each way, interleaved, after two that do not count. The order is drawn
    anew in each round, on all ranks alike: what follows a long copy per block finds other caches and clocks."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    order = random.Random(0)
    for turn in range(n + 2):
        for way in order.sample(ways, len(ways)):
            take(way)
            where.wait()
            world.Barrier()
            start = time.perf_counter()
            once(way)
            took = world.allreduce(time.perf_counter() - start, mpi.MAX)
            if turn >= 2:
                times[way].append(took * 1e6)
    return times
