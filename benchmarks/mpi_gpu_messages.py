"""Messages of device buffers between two ranks: under the preload, staged by hand, and one copy per block.

    undertow mpi run -- mpirun -n 2 python -m undertow.benchmarks.mpi_gpu_messages [--output FOLDER]

Three ways to the same bytes, in one run, in turn, each checked first:

    preload   MPI_Send and MPI_Recv of the device tensor with its datatype; nothing else
    by hand   what a user writes without it: torch packs, a pinned buffer is filled, sent, received and unpacked
    blocks    one cuMemcpyAsync per contiguous block to and from a pinned buffer, as Open MPI's CUDA support does it

Ping-pong halves and exchanges of six faces, medians of the slower rank. Both ranks may share one device.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from undertow.benchmarks.mpi_gpu_rivals import Layout, views
from undertow.examples.halo3d import face_types
from undertow.mpi_interpose.compile import compiler

KIB, MIB = 1 << 10, 1 << 20
REPEATS = 11
KEYS = {"preload": "preload_us", "by hand": "by_hand_us", "blocks": "per_block_us"}
MOST_BLOCKS = 1 << 17  # more single copies than this take seconds

BLOCKS = r"""
typedef int (*Copy)(unsigned long long, unsigned long long, unsigned long, void*);
extern "C" void blocks(Copy copy, unsigned long long user, unsigned long long packed, int packing, long len,
                       long n2, long s2, long n1, long s1, void* stream) {
  for (long z = 0; z < n2; ++z)
    for (long y = 0; y < n1; ++y, packed += len)
      packing ? copy(packed, user + z * s2 + y * s1, len, stream) : copy(user + z * s2 + y * s1, packed, len, stream);
}
"""


class PerBlock:
    """A loop in C over the driver's copies."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "blocks.cc", Path(folder) / "blocks.so"
            source.write_text(BLOCKS)
            subprocess.run([compiler(), "-O2", "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
            self.lib = ctypes.CDLL(str(target))
        self.copy = ctypes.CDLL("libcuda.so.1").cuMemcpyAsync

    def __call__(self, layout: Layout, user: int, packed: int, packing: bool) -> None:
        (n1, s1), (n2, s2) = layout.dims[-1], layout.dims[0] if len(layout.dims) == 2 else (1, 0)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.lib.blocks(
            self.copy, ctypes.c_uint64(user), ctypes.c_uint64(packed), int(packing), ctypes.c_long(layout.block),
            ctypes.c_long(n2), ctypes.c_long(s2), ctypes.c_long(n1), ctypes.c_long(s1), stream,
        )  # fmt: skip
        torch.cuda.current_stream().synchronize()


class Side:
    """One layout at one place of a device tensor, with what each way needs to send or receive it."""

    def __init__(self, layout: Layout, whole: torch.Tensor, start: int, datatype: Any, per_block: PerBlock) -> None:
        self.layout, self.datatype, self.per_block = layout, datatype, per_block
        self.user = whole[start : start + layout.span]
        scratch = torch.empty(layout.size, dtype=torch.uint8, device=whole.device)
        self.view, self.dense = views(layout, self.user, scratch)
        self.scratch = scratch
        self.pinned = torch.empty(layout.size, dtype=torch.uint8, pin_memory=True)
        self.host = self.pinned.numpy()

    @property
    def few_blocks(self) -> bool:
        return self.layout.size // self.layout.block <= MOST_BLOCKS

    def pack(self, way: str) -> list:
        """The message to send."""
        if way == "preload":
            return [self.user, 1, self.datatype]
        if way == "blocks":
            self.per_block(self.layout, self.user.data_ptr(), self.pinned.data_ptr(), True)
        else:
            self.dense.copy_(self.view)
            self.pinned.copy_(self.scratch, non_blocking=True)
            torch.cuda.current_stream().synchronize()
        return [self.host, self.layout.size, self.byte]

    def place(self, way: str) -> list:
        """The message to receive into."""
        return [self.user, 1, self.datatype] if way == "preload" else [self.host, self.layout.size, self.byte]

    def unpack(self, way: str) -> None:
        if way == "blocks":
            self.per_block(self.layout, self.user.data_ptr(), self.pinned.data_ptr(), False)
        elif way == "by hand":
            self.scratch.copy_(self.pinned, non_blocking=True)
            self.view.copy_(self.dense)
            torch.cuda.current_stream().synchronize()

    byte: Any = None


def datatype_of(mpi: Any, layout: Layout) -> Any:
    """The layout as an MPI datatype made of hvectors."""
    made = mpi.BYTE.Create_contiguous(layout.block)
    for count, stride in reversed(layout.dims):
        made = made.Create_hvector(count, 1, stride)
    return made.Commit()


def median(world: Any, mpi: Any, action: Callable[[], None], share: float) -> float:
    """Microseconds: median over repeats of the slower rank, times `share`."""
    times = []
    for turn in range(REPEATS + 2):
        torch.cuda.synchronize()
        world.Barrier()
        start = time.perf_counter()
        action()
        took = world.allreduce(time.perf_counter() - start, mpi.MAX)
        if turn >= 2:
            times.append(took * 1e6 * share)
    return statistics.median(times)


def ping_pong(world: Any, mpi: Any, layout: Layout, per_block: PerBlock) -> dict:
    """Half a round trip of one layout by every way."""
    peer = 1 - world.rank
    datatype = datatype_of(mpi, layout)
    whole = torch.full((layout.span,), world.rank, dtype=torch.uint8, device="cuda")
    side = Side(layout, whole, 0, datatype, per_block)

    def once(way: str) -> None:
        if world.rank == 0:
            world.Send(side.pack(way), peer)
            world.Recv(side.place(way), peer)
            side.unpack(way)
        else:
            world.Recv(side.place(way), peer)
            side.unpack(way)
            world.Send(side.pack(way), peer)

    row: dict = {"name": layout.name, "size": layout.size, "blocks": layout.size // layout.block}
    for way in KEYS:
        if way == "blocks" and not side.few_blocks:
            continue
        whole.fill_(world.rank + 7)
        torch.cuda.synchronize()
        once(way)
        torch.cuda.synchronize()
        row["wrong"] = row.get("wrong", 0) + int((side.view != side.view.flatten()[0]).sum())
        row[KEYS[way]] = median(world, mpi, lambda way=way: once(way), 0.5)
    datatype.Free()
    return row


def halo(world: Any, mpi: Any, n: int, per_block: PerBlock) -> dict:
    """The exchange of examples/halo3d on a device field: two ranks along one axis, each itself along the others."""
    edge = n + 2
    row_bytes, plane = 8 * edge, 8 * edge * edge
    field = torch.full((edge, edge, edge), float(world.rank), dtype=torch.float64, device="cuda")
    flat = field.view(torch.uint8).reshape(-1)
    grid = world.Create_cart(mpi.Compute_dims(world.size, 3), periods=[True] * 3)
    shapes = [
        Layout("x", 8 * n, ((n, row_bytes),)),
        Layout("y", 8 * n, ((n, plane),)),
        Layout("z", 8, ((n, plane), (n, row_bytes))),
    ]
    faces, sides = face_types(mpi, n, 1), []
    for axis, direction, *_ in faces:
        for where in ((1 if direction < 0 else n), (0 if direction < 0 else n + 1)):
            at = [1, 1, 1]
            at[axis] = where
            start = at[0] * plane + at[1] * row_bytes + at[2] * 8
            sides.append(Side(shapes[axis], flat, start, None, per_block))

    def exchange(way: str) -> None:
        requests, arriving = [], []
        for k, (axis, direction, _, ghost) in enumerate(faces):
            source, tag = grid.Shift(axis, direction)[1], 2 * axis + (direction < 0)
            place = [field, 1, ghost] if way == "preload" else sides[2 * k + 1].place(way)
            requests.append(grid.Irecv(place, source, tag))
            arriving.append(sides[2 * k + 1])
        for k, (axis, direction, inner, _) in enumerate(faces):
            target, tag = grid.Shift(axis, direction)[1], 2 * axis + (direction > 0)
            message = [field, 1, inner] if way == "preload" else sides[2 * k].pack(way)
            requests.append(grid.Isend(message, target, tag))
        mpi.Request.Waitall(requests)
        if way != "preload":
            for side in arriving:
                side.unpack(way)

    row: dict = {"name": f"halo {n}^3", "size": 6 * 8 * n * n, "blocks": 4 * n + 2 * n * n, "wrong": 0}
    want = None
    for way in KEYS:
        if way == "blocks" and row["blocks"] > MOST_BLOCKS:
            continue
        field.copy_(torch.arange(field.numel(), device="cuda", dtype=torch.float64).view_as(field) + world.rank * 0.5)
        torch.cuda.synchronize()
        exchange(way)
        torch.cuda.synchronize()
        if want is None:
            want = field.clone()
        row["wrong"] += int((field != want).sum())
        row[KEYS[way]] = median(world, mpi, lambda way=way: exchange(way), 1.0)
    for _, _, *types in faces:
        for datatype in types:
            datatype.Free()
    return row


def layouts() -> list[Layout]:
    out = [Layout(f"contiguous {s >> 10} KiB", s, ((1, s),)) for s in (KIB, 64 * KIB, 1 * MIB, 16 * MIB)]
    for block in (8, 64, 512, 4096):
        sizes = [s for s in (4 * KIB, 64 * KIB, 1 * MIB, 16 * MIB) if s > block]
        out += [Layout(f"{block} B blocks, {s >> 10} KiB", block, ((s // block, 2 * block),)) for s in sizes]
    return out


def main(argv: list[str] | None = None) -> int:
    from mpi4py import MPI

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cells", type=int, nargs="*", default=[32, 64, 128, 256])
    parser.add_argument("--output", type=Path, help="folder for the JSON file")
    options = parser.parse_args(argv)
    world = MPI.COMM_WORLD
    if world.size != 2 or not torch.cuda.is_available():
        sys.stderr.write("mpi_gpu_messages needs two ranks and a CUDA device\n")
        return 2
    torch.cuda.set_device(world.rank % torch.cuda.device_count())
    Side.byte = MPI.BYTE
    per_block, rows = PerBlock(), []
    if world.rank == 0:
        sys.stdout.write(f"{torch.cuda.get_device_name()}, {MPI.Get_library_version().splitlines()[0][:40]}\n")
        titles = f"{'preload us':>11} {'by hand':>10} {'ratio':>6} {'per block':>11} {'ratio':>8}"
        sys.stdout.write(f"{'case':<26} {'blocks':>8} {titles}\n")
    cases: list[Callable[[], dict]] = [lambda x=x: ping_pong(world, MPI, x, per_block) for x in layouts()]
    cases += [lambda n=n: halo(world, MPI, n, per_block) for n in options.cells]
    for case in cases:
        rows.append(case())
        wrong = world.allreduce(rows[-1]["wrong"])
        if world.rank == 0:
            row = rows[-1]
            single = (
                f"{row['per_block_us']:>11.1f} {row['per_block_us'] / row['preload_us']:>8.1f}"
                if "per_block_us" in row
                else f"{'-':>20}"
            )
            sys.stdout.write(
                f"{row['name']:<26} {row['blocks']:>8} {row['preload_us']:>11.1f} {row['by_hand_us']:>10.1f} "
                f"{row['by_hand_us'] / row['preload_us']:>6.2f} {single}{' WRONG' if wrong else ''}\n"
            )
            sys.stdout.flush()
    if world.rank == 0 and options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "mpi_gpu_messages.json").write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
