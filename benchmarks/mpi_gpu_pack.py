"""Packing datatypes on a GPU: the interposer's kernel against copies of the driver, torch, cupy and the paper's scheme.

    python -m undertow.benchmarks.mpi_gpu_pack [--short] [--output FOLDER]

Device time: each arm's calls are captured into a CUDA graph (as many as fill about 4 ms) and replayed, so that nobody's
call from Python is measured; arms are interleaved, every answer is compared first. The columns are the median time per
call, the ratio rival/ours (above 1: ours is faster) of the fastest rival with its 95 % interval, the A/A ratio (ours
twice), and the share of the device-copy rate at the same size, which is the ceiling. Sources of up to some 50 MB stay
in the second-level cache between calls, for all arms alike. `sync us` is one pack that waits, as MPI_Pack does, beside
`floor`, an empty kernel that Python launches and waits for. `blocks`, timed apart, is one asynchronous copy for each
contiguous block and one wait, as Open MPI's CUDA support packs (of more than 8,192 blocks so many are copied, and the
time is scaled). FOLDER gets the JSON, a page and a plot (see mpi_gpu_pages); the JSON is written after each cell.
`python -m undertow.benchmarks.mpi_gpu_record FOLDER` puts them where results are kept, and into the guide.

`--fetch 32` asks the device for the least that its second-level cache reads at a time (a setting of the whole process,
so the interposer leaves it alone). With 64, blocks of 32 bytes with gaps as large move 64 bytes for 32: no kernel could
pass two thirds of the copy rate. That is the explanation that the option puts to the test.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

from undertow.benchmarks import facts, mpi_gpu_bound, mpi_gpu_pages
from undertow.benchmarks.intervals import median_interval, ratio_interval
from undertow.benchmarks.mpi_gpu_rivals import Driver, Layout, kind_of, make
from undertow.benchmarks.mpi_gpu_rooms import blocks_library
from undertow.mpi_interpose import gpu

KIB, MIB = 1 << 10, 1 << 20
SAMPLE_S = 4e-3
SAMPLES = 9
PER_BLOCK = "one copy per block"
MOST_BLOCKS = 1 << 13  # single copies that are timed
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
        arms = {name: arm for name, arm in arms.items() if name in ("ours", "again", "older", "torch")}
    arms["copy"] = lambda: copy_to.copy_(packed)
    start_user, start_packed = user.clone(), packed.clone()
    want = None
    row["wrong"], row["left out"] = [], {}
    row["moved"], row["cache bytes"] = mpi_gpu_bound.bytes_moved(layout, packing), mpi_gpu_bound.cache_bytes(layout)
    row["cache"] = torch.cuda.get_device_properties(0).L2_cache_size
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
    row["seconds"], row["samples"] = {}, samples
    for name, values in samples.items():
        spread = median_interval(values)
        row["seconds"][name] = [spread.median, spread.low, spread.high]
    ratios = {name: ratio_interval(values, samples["ours"]) for name, values in samples.items() if name != "ours"}
    row["ratio"] = {name: [ratio.median, ratio.low, ratio.high] for name, ratio in ratios.items()}
    row.update(waiting(layout, user, packed, packing, driver, arms["torch"]))
    row["sync us"] = statistics.median(row["waits"]["ours"]) * 1e6
    return row


def once(arm: Callable[[], object], stream: torch.cuda.Stream) -> float:
    """Seconds of one call that is waited for."""
    with torch.cuda.stream(stream):
        began = time.perf_counter()
        arm()
        stream.synchronize()
        return time.perf_counter() - began


def waiting(
    layout: Layout,
    user: torch.Tensor,
    packed: torch.Tensor,
    packing: bool,
    driver: Driver,
    rival: Callable[[], object],
) -> dict:
    """`waits`: seconds of calls that return when their target may be read, in turn, the host's work included."""
    plan = gpu.GpuPlan(layout.ir(), layout.span)
    a, b, stream = user.data_ptr(), packed.data_ptr(), torch.cuda.current_stream()
    gpu.use_kernel()

    def then_wait(action: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            action()
            stream.synchronize()

        return run

    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: plan.pack(1, a, b) if packing else plan.unpack(1, b, a), "torch": then_wait(rival)
    }  # fmt: skip
    empty = driver.paper(Layout("", 1, ((1, 1),)), a, b, packing)
    if empty:
        calls["launch floor"] = then_wait(empty)
    n = layout.size // layout.block
    scale, single = single_copies(layout, a, b, packing, driver, stream.cuda_stream)
    times = in_turn(calls)
    if single:  # apart: behind thousands of copies a short call takes several times as long
        times |= {name: [scale * s for s in taken] for name, taken in in_turn({PER_BLOCK: then_wait(single)}).items()}
    return {"waits": times, "waits apart": True, "blocks": n, "blocks timed": round(n / scale) if single else 0}


def in_turn(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds of each call, SAMPLES of them after two that do not count, one of each after the other."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(SAMPLES + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            took = time.perf_counter() - start
            if turn >= 2:
                times[name].append(took)
    return times


def single_copies(
    layout: Layout, user: int, packed: int, packing: bool, driver: Driver, stream: int
) -> tuple[float, Callable[[], object] | None]:
    """(all blocks / those copied, a call that queues one copy for each of the latter); None beyond two loops."""
    if layout.offsets or not 1 <= len(layout.dims) <= 2:
        return 1.0, None
    (n1, s1), (n2, s2) = layout.dims[-1], layout.dims[0] if len(layout.dims) == 2 else (1, 0)
    all_of = n1 * n2
    n1 = min(n1, MOST_BLOCKS)
    n2 = max(1, min(n2, MOST_BLOCKS // n1))
    queue = _blocks().blocks

    def run() -> None:
        driver.must(
            queue(
                driver.cuda.cuMemcpyAsync, ctypes.c_uint64(user), ctypes.c_uint64(packed), int(packing),
                ctypes.c_long(layout.block), ctypes.c_long(n2), ctypes.c_long(s2), ctypes.c_long(n1),
                ctypes.c_long(s1), ctypes.c_void_p(stream),
            )
        )  # fmt: skip

    return all_of / (n1 * n2), run


@lru_cache(maxsize=1)
def _blocks() -> ctypes.CDLL:
    return blocks_library()


RIVALS = ("memcpy", "torch", "cupy", "paper")


def line(row: dict) -> str:
    """One line of the table."""
    us = {name: values[0] * 1e6 for name, values in row["seconds"].items()}
    rivals = [name for name in RIVALS if name in us]
    best = min(rivals, key=lambda name: us[name]) if rivals else ""
    median, low, high = row["ratio"][best] if best else (float("nan"),) * 3
    cells = [f"{us[name]:>9.1f}" if name in us else f"{'-':>9}" for name in ("ours", "older", *RIVALS, "copy")]
    waits = {name: statistics.median(times) * 1e6 for name, times in row["waits"].items()}
    asked = ("launch floor", PER_BLOCK)
    others = " ".join(f"{waits[name]:>9.1f}" if name in waits else f"{'-':>9}" for name in asked)
    share = us["copy"] / us["ours"]
    return (
        f"{row['way']:<6} {row['name']:<22} {row['size'] / KIB:>7.0f} {' '.join(cells)} {row['sync us']:>7.1f} "
        f"{others} {row['ratio']['again'][0]:>5.2f} {share:>5.0%} {best:>7} {median:>6.2f} [{low:.2f}, {high:.2f}]"
        f"{' WRONG ' + ','.join(row['wrong']) if row['wrong'] else ''}"
    )


HEAD = (
    f"{'way':<6} {'layout':<22} {'KiB':>7} "
    + " ".join(f"{name:>9}" for name in ("ours us", "older", *RIVALS, "copy"))
    + f" {'sync us':>7} {'floor':>9} {'blocks':>9} {'A/A':>5} {'rate':>5} {'fastest':>7} {'ratio':>6} [95 %]"
)


KEEP = 0.97  # a newer kernel may not lose more than this to the one before it, in any cell


def verdicts(rows: list[dict]) -> list[str]:
    """One line per newer kernel and direction: the gains over the older one, and whether the kernel stays."""
    lines = []
    for kind, way in itertools.product(("single piece", "transpose"), ("pack", "unpack")):
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


def fetch(driver: Driver, wanted: int | None) -> str:
    """What the second-level cache reads at a time, in words; set to `wanted` bytes before, if given."""
    granularity, found = ctypes.c_int(5), ctypes.c_size_t()  # CU_LIMIT_MAX_L2_FETCH_GRANULARITY
    if wanted is not None:
        driver.must(driver.cuda.cuCtxSetLimit(granularity, ctypes.c_size_t(wanted)))
    driver.must(driver.cuda.cuCtxGetLimit(ctypes.byref(found), granularity))
    return (
        f"the second-level cache reads up to {found.value} bytes at a time{'' if wanted is None else ', as asked for'}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--short", action="store_true", help="fewer cells")
    parser.add_argument("--ways", nargs="+", default=["pack", "unpack"], choices=["pack", "unpack"])
    parser.add_argument("--only", default="", help="layouts whose name contains this")
    parser.add_argument("--mib", type=float, help="only layouts of this size")
    parser.add_argument("--alone", action="store_true", help="torch is the only rival (for trying kernels)")
    parser.add_argument("--fetch", type=int, help="bytes that the second-level cache reads at a time: 32, 64 or 128")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop starting cells after this long")
    parser.add_argument("--output", type=Path, help="folder for the JSON file")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.stderr.write("mpi_gpu_pack needs a CUDA device\n")
        return 2
    torch.cuda.init()
    driver, stream = Driver(), torch.cuda.Stream()
    data, began = mpi_gpu_pages.begun("mpi_gpu_pack", "", SAMPLES), time.monotonic()
    rows = data["rows"]
    data["remarks"] = [said := fetch(driver, options.fetch)]
    sys.stdout.write(f"{said}\n{facts.hardware()}, {torch.cuda.get_device_name()}, torch {torch.__version__}\n{HEAD}\n")
    for layout in layouts(options.short):
        for way in options.ways:
            if options.mib and layout.size != options.mib * MIB:
                continue
            if options.only not in layout.name or time.monotonic() - began > options.seconds:
                continue
            rows.append(measure(layout, way == "pack", driver, stream, options.alone))
            if options.output:
                mpi_gpu_pages.save(data, options.output / "mpi_gpu_pack.json")
            sys.stdout.write(line(rows[-1]) + "\n")
            sys.stdout.flush()
    decided = verdicts(rows)
    sys.stdout.write("".join(f"{said}\n" for said in decided))
    if options.output and rows:
        data["remarks"] += decided
        mpi_gpu_pages.save(data, options.output / "mpi_gpu_pack.json")
        mpi_gpu_pages.write(data, options.output / "mpi_gpu_pack.json")
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
