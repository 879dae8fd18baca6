"""Every pack kernel beside every other, in the cells where one matters: the data that `choose.cc` is written from.

    python -m undertow.benchmarks.mpi_gpu_variants [--seconds 85] [--only TEXT] [--output FOLDER]

For each layout and direction all kernels that serve it (named as in csrc/gpu/choose.hh) are compared byte by byte with
a strided copy on the host, and timed in turn with the rivals, as mpi_gpu_pack does it. `roof` reads and writes as many
bytes as the layout must (whole granules of 64 bytes where blocks are shorter; sectors that are written in part are read
first), but in order: what it takes is the memory's share of the time, whatever a pack does. A cell prints the kernels
by their time; `!` marks a rival. The end says for each layout which kernel is the fastest, and by how much.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from undertow.benchmarks import facts, mpi_gpu_pages
from undertow.benchmarks.mpi_gpu_bound import bytes_moved
from undertow.benchmarks.mpi_gpu_pack import KIB, MIB, Graph, fetch, layouts
from undertow.benchmarks.mpi_gpu_rivals import Driver, Layout, make, views
from undertow.mpi_interpose import gpu, gpu_kernels

SAMPLES = 5
NAMES = (
    "general", "nest 1x128", "nest 1x256", "nest 4x128", "nest 4x256", "stream 128", "stream 256", "pour 128",
    "pour 256", "cross 16", "cross 32", "cross 64",
)  # fmt: skip
CHOSEN = "chosen"  # what the library takes by itself
RIVALS = ("torch", "cupy", "paper")
EXTRA = (  # words of one and two bytes, and what lies between the sizes of mpi_gpu_pack
    Layout("3 B, stride 5", 3, ((1 << 22, 5),)), Layout("6 B, stride 10", 6, ((1 << 21, 10),)),
    Layout("3 B, stride 5", 3, ((1 << 16, 5),)), Layout("8 B, stride 16", 8, ((1 << 19, 16),)),
    Layout("16 B, stride 32", 16, ((1 << 19, 32),)), Layout("4 B, stride 8", 4, ((1 << 19, 8),)),
    *(Layout(f"transpose {b} B, {n}^2", b, ((n, b), (n, b * n)))
      for b, n in ((4, 256), (8, 256), (2, 2048), (4, 1024))),
    Layout("64 MiB, 128 B, stride 256", 128, ((1 << 19, 256),)),
)  # fmt: skip
FIRST = (  # the cells that were lost or short of a goal, then what must not become slower
    ("1-D 32 B", 16 * MIB), ("1-D 32 B", 256 * MIB), ("1-D 16 B", 16 * MIB), ("transpose 16 B, 64^2", 64 * KIB),
    ("transpose 16 B, 256^2", 1 * MIB), ("transpose 16 B, 1024^2", 16 * MIB), ("3-D x face 256", 512 * KIB),
    ("4-D 16^3 x 512 B", 2 * MIB), ("4 B, stride 512", 1 * MIB), ("1-D 4 B", 1 * MIB), ("1-D 8 B", 1 * MIB),
    ("1-D 4096 B", 1 * MIB), ("1-D 128 B", 1 * MIB), ("1-D 128 B", 64 * KIB), ("1-D 16 B", 64 * KIB),
    ("1-D 4 B", 16 * MIB), ("1-D 128 B", 16 * MIB), ("1-D 64 B", 16 * MIB), ("3-D inside 256", 128 * MIB),
    ("transpose 4 B, 2048^2", 16 * MIB), ("transpose 8 B, 2048^2", 32 * MIB), ("transpose 16 B, 2048^2", 64 * MIB),
    ("100 B, stride 128", 25600 * KIB), ("12 B, stride 16", 12 * MIB), ("1-D 128 B", 256 * MIB),
    ("1-D 4 B", 256 * MIB), ("1-D 4096 B", 256 * MIB), ("1-D 8 B", 256 * MIB), ("1-D 4096 B", 16 * MIB),
    ("1-D 64 B", 256 * MIB), ("3-D y face 256", 512 * KIB), ("1-D 4 B", 64 * KIB),
)  # fmt: skip

ROOF = r"""
extern "C" __global__ void read_more(uint4* to, const uint4* from, unsigned n, unsigned times) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  uint4 sum = from[i];
  for (unsigned k = 1; k < times; ++k) {
    const uint4 v = from[(size_t)k * n + i];
    sum.x ^= v.x, sum.y ^= v.y, sum.z ^= v.z, sum.w ^= v.w;
  }
  to[i] = sum;
}
extern "C" __global__ void write_more(uint4* from, uint4* to, unsigned n, unsigned times, unsigned mix) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const uint4 v = from[i];
  for (unsigned k = 0; k < times; ++k) {
    uint4 was = {};
    if (mix) was = to[(size_t)k * n + i];
    to[(size_t)k * n + i] = {was.x ^ v.x, was.y ^ v.y, was.z ^ v.z, was.w ^ v.w};
  }
}
"""


class Roof:
    """Kernels that move a layout's bytes in order."""

    def __init__(self, driver: Driver) -> None:
        self.driver, self.module = driver, ctypes.c_void_p()
        nvcc = gpu_kernels.find_nvcc()
        if not nvcc:
            return
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "roof.cu", Path(folder) / "roof.ptx"
            source.write_text(ROOF)
            major, minor = torch.cuda.get_device_capability()
            command = [nvcc, "-O3", f"-arch=compute_{major}{minor}", "-ptx", str(source), "-o", str(target)]
            subprocess.run(command, check=True)
            image = target.read_bytes() + b"\0"
        driver.must(driver.cuda.cuModuleLoadData(ctypes.byref(self.module), image))

    def arm(self, layout: Layout, packing: bool, packed: torch.Tensor) -> Callable[[], object] | None:
        """None where the layout's traffic is no whole multiple of its size, or there is no compiler."""
        read, written = bytes_moved(layout, packing)
        size = layout.size
        side = read if packing else written
        if not self.module or side % size or size % 16 or (not packing and read not in (size, size + written)):
            return None
        times, mix = side // size, 0 if packing or read == size else 1
        user = torch.empty(side, dtype=torch.uint8, device=packed.device)
        to = torch.empty_like(packed)
        name = b"read_more" if packing else b"write_more"
        function = ctypes.c_void_p()
        self.driver.must(self.driver.cuda.cuModuleGetFunction(ctypes.byref(function), self.module, name))
        n = size // 16
        first, second = (to, user) if packing else (packed, user)
        values = [ctypes.c_uint64(first.data_ptr()), ctypes.c_uint64(second.data_ptr()), ctypes.c_uint(n)]
        values += [ctypes.c_uint(times), *([] if packing else [ctypes.c_uint(mix)])]
        arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))

        def run(_keep: tuple = (values, user, to)) -> None:
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            grid = -(-n // 256)
            launch = self.driver.cuda.cuLaunchKernel
            self.driver.must(launch(function, grid, 1, 1, 256, 1, 1, 0, stream, arguments, None))

        return run


def kernels(layout: Layout, user: torch.Tensor, packed: torch.Tensor, packing: bool) -> dict[str, Callable[[], object]]:
    """An arm for each kernel that serves the layout."""
    plan = gpu.GpuPlan(layout.ir(), layout.span)
    a, b = user.data_ptr(), packed.data_ptr()

    def arm(name: str) -> Callable[[], object]:
        def run() -> None:
            gpu.use_kernel(name)
            plan.enqueue(1, a, b, packing, torch.cuda.current_stream().cuda_stream)

        return run

    return {CHOSEN: arm(""), **{name: arm(name) for name in NAMES if plan.served_by(name, 1, a, b, packing)}}


def host_answer(layout: Layout, user: torch.Tensor, packed: torch.Tensor, packing: bool) -> torch.Tensor:
    """What the written side must hold, by a strided copy in host memory."""
    user_h, packed_h = user.cpu(), packed.cpu()
    view, dense = views(layout, user_h, packed_h)
    dense.copy_(view) if packing else view.copy_(dense)
    return packed_h if packing else user_h


def measure(layout: Layout, packing: bool, driver: Driver, roof: Roof, stream: torch.cuda.Stream) -> dict:
    user = torch.randint(0, 256, (layout.span + 64,), dtype=torch.uint8, device="cuda")
    packed = torch.randint(0, 256, (layout.size,), dtype=torch.uint8, device="cuda")
    arms = kernels(layout, user, packed, packing)
    given = make(layout, user, packed, packing, driver)
    arms |= {f"!{name}": given[name] for name in RIVALS if name in given}
    written = packed if packing else user
    before, want = written.clone(), host_answer(layout, user, packed, packing).cuda()
    wrong = []
    for name, arm in arms.items():
        written.copy_(before)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            arm()
            stream.synchronize()
        if not torch.equal(written, want):
            wrong.append(name)
    copy_to = torch.empty_like(packed)
    arms["!copy"] = lambda: copy_to.copy_(packed)
    reached = roof.arm(layout, packing, packed)
    if reached:
        arms["!roof"] = reached
    graphs = {name: Graph(arm, stream) for name, arm in arms.items()}
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    turn = random.Random(layout.size)
    for _ in range(SAMPLES):
        names = list(graphs)
        turn.shuffle(names)
        for name in names:
            samples[name].append(graphs[name].sample())
    gpu.use_kernel()
    return {
        "name": layout.name, "block": layout.block, "size": layout.size, "way": "pack" if packing else "unpack",
        "wrong": wrong, "moved": list(bytes_moved(layout, packing)), "samples": samples,
    }  # fmt: skip


def line(row: dict) -> str:
    us = {name: statistics.median(taken) * 1e6 for name, taken in row["samples"].items()}
    listed = "  ".join(f"{name} {us[name]:.2f}" for name in sorted(us, key=lambda name: us[name]))
    wrong = f" WRONG: {', '.join(row['wrong'])}" if row["wrong"] else ""
    return f"{row['way']:<6} {row['name']}, {row['size'] / KIB:.0f} KiB: {listed}{wrong}"


def decided(row: dict) -> str:
    us = {name: statistics.median(taken) * 1e6 for name, taken in row["samples"].items()}
    best = min((name for name in us if name[0] != "!" and name != CHOSEN), key=lambda name: us[name])
    rival = min((name for name in us if name[1:] in RIVALS), key=lambda name: us[name])
    against = {CHOSEN: CHOSEN, "general": "general", rival[1:]: rival, "copy": "!copy", "roof": "!roof"}
    ratios = ", ".join(f"{said} / it {us[name] / us[best]:.2f}" for said, name in against.items() if name in us)
    return f"{row['way']:<6} {row['name'] + ',':<26} {row['size'] / KIB:>7.0f} KiB: {best:<12} {ratios}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=85.0, help="stop starting cells after this long")
    parser.add_argument("--only", default="", help="layouts whose name contains this")
    parser.add_argument("--fetch", type=int, help="bytes that the second-level cache reads at a time: 32, 64 or 128")
    parser.add_argument("--output", type=Path, help="folder for the JSON file")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.stderr.write("mpi_gpu_variants needs a CUDA device\n")
        return 2
    torch.cuda.init()
    driver, stream = Driver(), torch.cuda.Stream()
    roof, began = Roof(driver), time.monotonic()
    data = mpi_gpu_pages.begun("mpi_gpu_variants", "", SAMPLES, [said := fetch(driver, options.fetch)])
    sys.stdout.write(f"{said}\n{facts.hardware()}, {torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    known = {(layout.name, layout.size): layout for layout in layouts(short=False)}
    for layout in (*EXTRA, *(known[cell] for cell in FIRST)):
        for packing in (True, False):
            if options.only not in layout.name or time.monotonic() - began > options.seconds:
                continue
            data["rows"].append(measure(layout, packing, driver, roof, stream))
            sys.stdout.write(line(data["rows"][-1]) + "\n")
            sys.stdout.flush()
            if options.output:
                mpi_gpu_pages.save(data, options.output / "mpi_gpu_variants.json")
    sys.stdout.write("".join(f"{decided(row)}\n" for row in data["rows"]))
    return 1 if any(row["wrong"] for row in data["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
