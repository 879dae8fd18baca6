"""Packing datatypes on a GPU: the interposer's kernel against copies of the driver, torch, cupy and the paper's scheme.

    python -m undertow.benchmarks.mpi_gpu_pack [--short] [--output FOLDER]

Device time: each arm's calls are captured into a CUDA graph (as many as fill about 4 ms) and replayed, so that nobody's
call from Python is measured; arms are interleaved, every answer is compared first. The columns are the median time per
call, the ratio rival/ours (above 1: ours is faster) of the fastest rival with its 95 % interval, the A/A ratio (ours
twice), and the share of the device-copy rate at the same size, which is the ceiling. Sources of up to some 50 MB stay
in the second-level cache between calls, for all arms alike. `sync us` is one pack that waits, as MPI_Pack does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from undertow.benchmarks import facts
from undertow.benchmarks.intervals import median_interval, ratio_interval
from undertow.benchmarks.mpi_gpu_rivals import Driver, Layout, kind_of, make
from undertow.mpi_interpose import gpu

KIB, MIB = 1 << 10, 1 << 20
SAMPLE_S = 4e-3
SAMPLES = 9
PATIENCE_S = 0.1  # an arm whose single call takes longer is reported once and not repeated


def layouts(short: bool) -> list[Layout]:
    blocks = [4, 8, 16, 32, 64, 128, 256, 1 * KIB, 4 * KIB, 64 * KIB]
    if short:
        blocks = [4, 8, 16, 32, 128, 4 * KIB, 64 * KIB]

    def lines(size: int) -> list[Layout]:
        return [Layout(f"1-D {block} B", block, ((size // block, 2 * block),)) for block in blocks if size > block]

    special = [
        Layout("4 B, stride 512", 4, ((1 << 18, 512),)),
        Layout("12 B, stride 16", 12, ((1 << 20, 16),)),
        Layout("100 B, stride 128", 100, ((1 << 18, 128),)),
        *(face for n in ((256,) if short else (64, 256, 512)) for face in faces(n)),
        Layout("4-D 16^3 x 512 B", 512, ((16, 1 << 21), (16, 1 << 16), (16, 2048))),
        Layout("transpose 4 B, 2048^2", 4, ((2048, 4), (2048, 8192))),
        Layout("transpose 8 B, 2048^2", 8, ((2048, 8), (2048, 16384))),
        *(Layout(f"transpose 16 B, {n}^2", 16, ((n, 16), (n, 16 * n))) for n in (64, 256, 1024, 2048)),
        indexed(4, 1 << 18), indexed(8, 1 << 18), indexed(64, 1 << 16),
    ]  # fmt: skip
    return [*special, *lines(16 * MIB), *lines(1 * MIB), *lines(64 * KIB), *lines(256 * MIB)]


def faces(n: int) -> list[Layout]:
    """Faces and a block of an (n + 2)³ array of doubles."""
    row, plane = 8 * (n + 2), 8 * (n + 2) ** 2
    return [
        Layout(f"3-D x face {n}", 8, ((n, plane), (n, row))),
        Layout(f"3-D y face {n}", 8 * n, ((n, plane),)),
        Layout(f"3-D z face {n}", 8 * n, ((n, row),)),
        Layout(f"3-D inside {n}", 8 * n, ((n, plane), (n, row))),
    ]


def indexed(block: int, n: int) -> Layout:
    rng = random.Random(block)
    slots = rng.sample(range(4 * n), n)
    return Layout(f"indexed {block} B, random", block, (), tuple(slot * block for slot in slots))


class Graph:
    """`calls` calls of an arm as one CUDA graph; `sample` gives seconds per call."""

    def __init__(self, arm: Callable[[], object], stream: torch.cuda.Stream) -> None:
        self.start, self.stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(stream):
            arm()
            stream.synchronize()
            once = self.timed(arm, stream)
            self.once = min(once, self.timed(arm, stream))
        self.calls = max(1, min(400, int(SAMPLE_S / max(self.once, 2e-6))))
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            for _ in range(self.calls):
                arm()
        self.graph.replay()
        torch.cuda.synchronize()

    def timed(self, arm: Callable[[], object], stream: torch.cuda.Stream) -> float:
        self.start.record(stream)
        arm()
        self.stop.record(stream)
        self.stop.synchronize()
        return self.start.elapsed_time(self.stop) * 1e-3

    def sample(self) -> float:
        self.start.record()
        self.graph.replay()
        self.stop.record()
        self.stop.synchronize()
        return self.start.elapsed_time(self.stop) * 1e-3 / self.calls


def measure(layout: Layout, packing: bool, driver: Driver, stream: torch.cuda.Stream, alone: bool = False) -> dict:
    """One row: seconds of every arm (median, low, high), and what was left out."""
    user = torch.randint(0, 256, (layout.span + 64,), dtype=torch.uint8, device="cuda")
    packed = torch.randint(0, 256, (layout.size,), dtype=torch.uint8, device="cuda")
    copy_to = torch.empty_like(packed)
    row: dict = {
        "name": layout.name,
        "block": layout.block,
        "size": layout.size,
        "way": "pack" if packing else "unpack",
        "kind": kind_of(gpu.GpuPlan(layout.ir(), layout.span).describe(1, user.data_ptr(), packed.data_ptr())),
    }
    graphs: dict[str, Graph] = {}
    arms = make(layout, user, packed, packing, driver)
    if alone:
        arms = {name: arm for name, arm in arms.items() if name in ("ours", "again", "older", "flat", "torch")}
    arms["copy"] = lambda: copy_to.copy_(packed)
    start_user, start_packed = user.clone(), packed.clone()
    want = None
    row["wrong"], row["left out"] = [], {}
    order = ["torch", *(name for name in arms if name != "torch")]
    for name in order:
        user.copy_(start_user)
        packed.copy_(start_packed)
        torch.cuda.synchronize()
        took = once(arms[name], stream)
        if took > PATIENCE_S:  # the first call may have compiled something
            took = once(arms[name], stream)
        if name != "copy":
            answer = packed if packing else user
            if want is None:
                want = answer.clone()
            elif not torch.equal(answer, want):
                row["wrong"].append(name)
        if took > PATIENCE_S and name not in ("ours", "older", "copy"):
            row["left out"][name] = took
            continue
        try:
            graphs[name] = Graph(arms[name], stream)
        except RuntimeError as error:
            row["left out"][name] = str(error).splitlines()[0][:80]
            torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    turn = random.Random(layout.size + layout.block)
    for _ in range(SAMPLES):
        names = list(graphs)
        turn.shuffle(names)
        for name in names:
            samples[name].append(graphs[name].sample())
    row["seconds"] = {}
    for name, values in samples.items():
        spread = median_interval(values)
        row["seconds"][name] = [spread.median, spread.low, spread.high]
    ratios = {name: ratio_interval(values, samples["ours"]) for name, values in samples.items() if name != "ours"}
    row["ratio"] = {name: [ratio.median, ratio.low, ratio.high] for name, ratio in ratios.items()}
    row["sync us"] = synchronous(layout, user, packed, packing)
    return row


def once(arm: Callable[[], object], stream: torch.cuda.Stream) -> float:
    """Seconds of one call that is waited for."""
    with torch.cuda.stream(stream):
        began = time.perf_counter()
        arm()
        stream.synchronize()
        return time.perf_counter() - began


def synchronous(layout: Layout, user: torch.Tensor, packed: torch.Tensor, packing: bool) -> float:
    """Microseconds of a call that waits for its end (median of 30), the host's work included."""
    plan = gpu.GpuPlan(layout.ir(), layout.span)
    gpu.use_kernels()
    a, b = user.data_ptr(), packed.data_ptr()
    times = []
    for _ in range(35):
        start = time.perf_counter()
        plan.pack(1, a, b) if packing else plan.unpack(1, b, a)
        times.append(time.perf_counter() - start)
    return sorted(times[5:])[15] * 1e6


RIVALS = ("memcpy", "torch", "cupy", "paper")


def line(row: dict) -> str:
    """One line of the table."""
    us = {name: values[0] * 1e6 for name, values in row["seconds"].items()}
    rivals = [name for name in RIVALS if name in us]
    best = min(rivals, key=lambda name: us[name]) if rivals else ""
    median, low, high = row["ratio"][best] if best else (float("nan"),) * 3
    cells = [f"{us[name]:>9.1f}" if name in us else f"{'-':>9}" for name in ("ours", "older", *RIVALS, "copy")]
    share = us["copy"] / us["ours"]
    return (
        f"{row['way']:<6} {row['name']:<22} {row['size'] / KIB:>7.0f} {' '.join(cells)} {row['sync us']:>7.1f} "
        f"{row['ratio']['again'][0]:>5.2f} {share:>5.0%} {best:>7} {median:>6.2f} [{low:.2f}, {high:.2f}]"
        f"{' WRONG ' + ','.join(row['wrong']) if row['wrong'] else ''}"
    )


HEAD = (
    f"{'way':<6} {'layout':<22} {'KiB':>7} "
    + " ".join(f"{name:>9}" for name in ("ours us", "older", *RIVALS, "copy"))
    + f" {'sync us':>7} {'A/A':>5} {'rate':>5} {'fastest':>7} {'ratio':>6} [95 %]"
)


KEEP = 0.97  # a newer kernel may not lose more than this to the one before it, in any cell


def verdicts(rows: list[dict]) -> list[str]:
    """One line per newer kernel and direction: the gains over the older one, and whether the kernel stays."""
    lines = []
    for kind, way in itertools.product(("single piece", "wide transpose"), ("pack", "unpack")):
        cells = [row for row in rows if row["kind"] == kind and row["way"] == way and "older" in row["ratio"]]
        if not cells:
            continue
        mean = statistics.geometric_mean(row["ratio"]["older"][0] for row in cells)
        worst = min(cells, key=lambda row: row["ratio"]["older"][2])
        median, low, high = worst["ratio"]["older"]
        lost = [row["name"] for row in cells if row["ratio"]["older"][2] < KEEP]
        said = "keep" if mean >= 1 and not lost else f"reconsider ({', '.join(lost) or 'no gain on the whole'})"
        lines.append(
            f"{kind}, {way}: older / ours {mean:.2f} over {len(cells)} cells, "
            f"least {median:.2f} [{low:.2f}, {high:.2f}] ({worst['name']}, {worst['size'] / KIB:.0f} KiB): {said}"
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--short", action="store_true", help="fewer cells")
    parser.add_argument("--ways", nargs="+", default=["pack", "unpack"], choices=["pack", "unpack"])
    parser.add_argument("--only", default="", help="layouts whose name contains this")
    parser.add_argument("--mib", type=float, help="only layouts of this size")
    parser.add_argument("--alone", action="store_true", help="torch is the only rival (for trying kernels)")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop starting cells after this long")
    parser.add_argument("--output", type=Path, help="folder for the JSON file")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.stderr.write("mpi_gpu_pack needs a CUDA device\n")
        return 2
    torch.cuda.init()
    driver, stream = Driver(), torch.cuda.Stream()
    rows, began = [], time.monotonic()
    sys.stdout.write(f"{facts.hardware()}, {torch.cuda.get_device_name()}, torch {torch.__version__}\n{HEAD}\n")
    for layout in layouts(options.short):
        for way in options.ways:
            if options.mib and layout.size != options.mib * MIB:
                continue
            if options.only not in layout.name or time.monotonic() - began > options.seconds:
                continue
            rows.append(measure(layout, way == "pack", driver, stream, options.alone))
            sys.stdout.write(line(rows[-1]) + "\n")
            sys.stdout.flush()
    decided = verdicts(rows)
    sys.stdout.write("".join(f"{said}\n" for said in decided))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        data = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "kernels": decided, "rows": rows}
        (options.output / "mpi_gpu_pack.json").write_text(json.dumps(data, indent=1) + "\n")
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
