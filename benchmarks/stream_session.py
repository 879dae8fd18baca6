"""Everything still to be measured of streamed backpropagation on one GPU: parts, each in a process with a time limit.

    python benchmarks/stream_session.py --list
    python benchmarks/stream_session.py --out build/stream --group missing # what no result has yet, one process
    python benchmarks/stream_session.py --out build/stream --group 1      # the most telling, under five minutes
    python benchmarks/stream_session.py --out build/stream --group 2      # groups of at most 9.5 minutes
    python benchmarks/stream_session.py --out build/stream products batches
    python benchmarks/stream_session.py --out build/stream --quick        # every part on a CPU, a tiny model

A part that fails or runs into its limit does not stop the others, and keeps the cells that it had finished (its
benchmark saves after each). Results: PART.json and PART.log in OUT, and a table and a plot of all parts there, written
anew after each part. All parts may use 80 GB of a device that has more. Lengths that would take minutes a step at full
depth are measured with one or four layers, and one full-depth step confirms.

The parts of the group `missing` run one after another in one process within `TOGETHER_S`, so that nothing is imported
and no host memory pinned twice; a part begins when the one before ends, and gets what is left where that is less than
its own limit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from undertow.benchmarks import stream_report

HERE = Path(__file__).parent
FEW = "ours auto,hf+ce,hf+ce+offload,alst,ours+offload+stash,plain+ce"  # the most telling first
CURVE = f"{FEW},ours+stash,ours+offload,ours"
SWEEP = "ours auto,ours+offload+stash," + ",".join(f"ours+stash#{rows}" for rows in (8192, 16384, 32768))


@dataclass(frozen=True)
class Part:
    """`words` for `program`; `quick` replaces some of them for a CPU. `seconds`: no new cell after that, and the
    process is ended `GRACE_S` later."""

    name: str
    group: str
    seconds: int
    what: str
    words: dict[str, str]
    quick: dict[str, str]
    program: str = "stream_backprop.py"


GRACE_S = 20
TOGETHER, TOGETHER_S = "missing", 530
PINNING = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"  # several threads find the pages
GIGABYTES = "80"
TINY = {"model": "tiny", "layers": "2", "chunk": "64"}
PARTS = (
    Part(
        "curve", "1", 105, "Llama-3-8B shape, four layers: time, peak and prediction from 8K to 128K tokens",
        {
            "model": "llama3-8b", "layers": "4", "tokens": "131072,8192,32768", "arms": FEW, "repeats": "2",
            "check-tokens": "0",
        },
        {**TINY, "tokens": "128,64", "arms": "hf+ce,ours auto", "repeats": "1"},
    ),
    Part(
        "length", "1", 90, "one full-width layer: 384K and 512K tokens, and who runs out of memory there",
        {
            "model": "llama3-8b", "layers": "1", "tokens": "393216,524288", "check-tokens": "0", "repeats": "1",
            "arms": "ours+offload+stash,hf+ce,hf+ce+offload,alst",
        },
        {**TINY, "layers": "1", "tokens": "512", "arms": "ours+offload+stash", "repeats": "1"},
    ),
    Part(
        "depth", "1", 85, "Llama-3-8B at full depth, 64K tokens",
        {
            "model": "llama3-8b", "layers": "32", "tokens": "65536", "check-tokens": "0", "repeats": "1",
            "arms": "ours auto,hf+ce+offload,hf+ce",
        },
        {**TINY, "layers": "4", "tokens": "128", "arms": "ours auto,hf+ce", "repeats": "1"},
    ),
    Part(
        "qwen3-8b", "2", 200, "Qwen3-8B shape, four layers: gradients checked, time and memory by length",
        {"model": "qwen3-8b", "layers": "4", "tokens": "8192,32768,131072", "arms": CURVE, "repeats": "2"},
        {**TINY, "tokens": "128", "check-tokens": "128", "arms": "hf+ce,ours auto", "repeats": "1"},
    ),
    Part(
        "chunks", "2", 130, "256K tokens, one layer: the planner's choice against fixed chunk lengths",
        {"model": "llama3-8b", "layers": "1", "tokens": "262144", "arms": SWEEP, "repeats": "2", "check-tokens": "0"},
        {**TINY, "tokens": "256", "arms": "ours auto,ours+stash#64,ours+stash#128", "repeats": "1"},
    ),
    Part(
        "batches", "2", 120, "16K tokens, batches of 1 to 8, four layers",
        {
            "model": "llama3-8b", "layers": "4", "tokens": "16384", "batches": "1,2,4,8", "check-tokens": "0",
            "arms": "ours auto,hf+ce,hf+ce+offload,ours+stash",
        },
        {**TINY, "tokens": "128", "batches": "1,2", "arms": "hf+ce,ours+stash", "repeats": "1"},
    ),
    Part(
        "products", "2", 60, "sums of weight gradients by rows of one product",
        {"model": "llama3-8b", "rows": "8192,131072"}, {"model": "tiny", "rows": "300", "repeats": "1"},
        "stream_products.py",
    ),
    Part(
        "qwen3-4b", "3", 200, "Qwen3-4B shape, likewise",
        {"model": "qwen3-4b", "layers": "4", "tokens": "8192,32768,131072", "arms": CURVE, "repeats": "2"},
        {**TINY, "tokens": "64,128", "arms": "hf+ce,ours+offload+stash", "repeats": "1", "check-tokens": "0"},
    ),
    Part(
        "quarter", "3", 200, "Llama-3-8B shape, four layers, 256K tokens",
        {
            "model": "llama3-8b", "layers": "4", "tokens": "262144", "check-tokens": "0", "repeats": "1",
            "arms": "ours auto,hf+ce+offload,ours+offload+stash,alst",
        },
        {**TINY, "tokens": "128", "arms": "ours auto", "repeats": "1", "check-tokens": "0"},
    ),
    Part(
        "deep", "3", 130, "Llama-3-8B at full depth, 96K tokens",
        {
            "model": "llama3-8b", "layers": "32", "tokens": "98304", "check-tokens": "0", "repeats": "1",
            "arms": "ours auto,hf+ce+offload",
        },
        {**TINY, "layers": "4", "tokens": "128", "arms": "ours auto", "repeats": "1"},
    ),
    Part(
        "full-depth", TOGETHER, 150, "Llama-3-8B with all 32 layers, 32K and 64K tokens",
        {
            "model": "llama3-8b", "layers": "32", "tokens": "32768,65536", "check-tokens": "0", "repeats": "1",
            "arms": "ours auto,hf+ce,hf+ce+offload", "pinned": "24",
        },
        {**TINY, "layers": "4", "tokens": "64,128", "arms": "ours auto,hf+ce", "repeats": "1"},
    ),
    Part(
        "half-million", TOGETHER, 75, "one full-width layer of Llama-3-8B, 512K tokens",
        {
            "model": "llama3-8b", "layers": "1", "tokens": "524288", "check-tokens": "0", "repeats": "1",
            "arms": "ours+offload+stash",
        },
        {**TINY, "layers": "1", "tokens": "512", "arms": "ours+offload+stash", "repeats": "1"},
    ),
    Part(
        "batch-sizes", TOGETHER, 50, "8K tokens, batches of 1 to 8, four layers of Llama-3-8B",
        {
            "model": "llama3-8b", "layers": "4", "tokens": "8192", "batches": "1,2,4,8", "check-tokens": "0",
            "arms": "ours auto,hf+ce,ours+offload+stash,hf+ce+offload", "repeats": "2",
        },
        {**TINY, "tokens": "64", "batches": "1,2", "arms": "hf+ce,ours auto", "repeats": "1"},
    ),
    Part(
        "8b", TOGETHER, 110, "Qwen3-8B shape, four layers: gradients checked, 32K and 128K, longest by slope",
        {
            "model": "qwen3-8b", "layers": "4", "tokens": "32768,131072", "check-tokens": "4096", "repeats": "2",
            "arms": "ours auto,hf+ce,ours+offload+stash,hf+ce+offload",
        },
        {**TINY, "tokens": "64,128", "check-tokens": "64", "arms": "hf+ce,ours auto", "repeats": "1"},
    ),
    Part(
        "4b", TOGETHER, 85, "Qwen3-4B shape, likewise",
        {
            "model": "qwen3-4b", "layers": "4", "tokens": "32768,131072", "check-tokens": "0", "repeats": "2",
            "arms": "ours auto,hf+ce,ours+offload+stash,hf+ce+offload",
        },
        {**TINY, "tokens": "64", "arms": "ours+offload+stash", "repeats": "1"},
    ),
    Part(
        "256k", TOGETHER, 180, "Llama-3-8B shape, four layers, 256K tokens, in what is left of the time",
        {
            "model": "llama3-8b", "layers": "4", "tokens": "262144", "check-tokens": "0", "repeats": "1",
            "arms": "ours+offload+stash,alst,ours auto",
        },
        {**TINY, "tokens": "256", "arms": "ours+offload+stash", "repeats": "1"},
    ),
)  # fmt: skip


def words_of(part: Part, out: Path, quick: bool, seconds: float) -> list[str]:
    """The words of one part that is to end within `seconds`."""
    words = {**part.words, **(part.quick if quick else {}), "json": str(out / f"{part.name}.json")}
    if part.program == "stream_backprop.py":
        words |= {"seconds": f"{seconds:.0f}", "gigabytes": GIGABYTES}
        words |= {"check-tokens": part.quick.get("check-tokens", "0")} if quick else {}
    if quick:
        words["device"] = "cpu"
    return [f"--{name}={value}" for name, value in words.items()]


def command(part: Part, out: Path, quick: bool) -> list[str]:
    """The command line of one part."""
    return [sys.executable, str(HERE / part.program), *words_of(part, out, quick, part.seconds)]


def run(part: Part, out: Path, quick: bool) -> str:
    """'done', 'failed with code …' or 'ended at its limit'; its output goes to PART.log."""
    with (out / f"{part.name}.log").open("w") as log:
        try:
            done = subprocess.run(
                command(part, out, quick), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                timeout=part.seconds + GRACE_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"ended at its limit of {part.seconds + GRACE_S} s"
    return "done" if done.returncode == 0 else f"failed with code {done.returncode}, see {log.name}"


def one_after_another(parts: list[Part], out: Path, quick: bool, end: float) -> int:
    """The parts in this process, until `end` of the clock `time.monotonic`; the number that failed."""
    from undertow.benchmarks import stream_backprop

    failed = 0
    for part in parts:
        left = end - time.monotonic()
        if left < 15 and not quick:
            print(f"{part.name}: no time left", flush=True)
            continue
        begin = time.monotonic()
        print(f"{part.name}: {part.what}", flush=True)
        try:
            code = stream_backprop.main(words_of(part, out, quick, part.seconds if quick else min(left, part.seconds)))
        except Exception:  # the next part may be well
            traceback.print_exc()
            code = 1
        failed += code != 0
        print(f"{part.name}: {'failed' if code else 'done'} after {time.monotonic() - begin:.0f} s", flush=True)
    return failed


def together(parts: list[Part], out: Path, quick: bool) -> bool:
    """The parts in one process of its own, whose output is this one's; whether all is well. `PINNING` must be in the
    environment before torch is loaded."""
    words = [sys.executable, __file__, "--here", "--out", str(out), *(["--quick"] if quick else [])]
    environment = {"PYTORCH_CUDA_ALLOC_CONF": PINNING, **os.environ}
    try:
        done = subprocess.run(
            [*words, *(part.name for part in parts)], env=environment, stdin=subprocess.DEVNULL,
            timeout=TOGETHER_S + GRACE_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        print(f"ended at its limit of {TOGETHER_S + GRACE_S} s", flush=True)
        return False
    return done.returncode == 0


def gather(out: Path) -> list[Path]:
    """The files of parts in `out` that hold cells, in the order of the parts."""
    files = [out / f"{part.name}.json" for part in PARTS if part.program == "stream_backprop.py"]
    return [file for file in files if file.exists() and json.loads(file.read_text()).get("rows")]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", help=f"default: all but those of the group {TOGETHER}")
    parser.add_argument("--group", choices=sorted({part.group for part in PARTS}), help="only its parts")
    parser.add_argument("--out", type=Path, default=Path("build/stream"))
    parser.add_argument("--quick", action="store_true", help="on a CPU, in seconds: to see that it runs")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # in this process, one after another
    options = parser.parse_args(argv)
    start = time.monotonic()
    unknown = set(options.parts) - {part.name for part in PARTS}
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; expected some of {', '.join(part.name for part in PARTS)}")
    chosen = [p for p in PARTS if (not options.parts or p.name in options.parts) and options.group in (None, p.group)]
    if not (options.parts or options.group or options.list):
        chosen = [part for part in chosen if part.group != TOGETHER]
    if options.list:
        for part in chosen:
            print(f"group {part.group:<9}{part.name:<13}{part.seconds:>5} s  {part.what}")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    if options.here:
        return int(one_after_another(chosen, options.out, options.quick, start + TOGETHER_S) > 0)
    failed = False
    joint = [part for part in chosen if part.group == TOGETHER]
    for part in chosen:
        if part in joint:
            continue
        start = time.monotonic()
        verdict = run(part, options.out, options.quick)
        failed |= verdict != "done"
        print(f"{part.name}: {verdict} after {time.monotonic() - start:.0f} s", flush=True)
        report(options.out)
    if joint:
        failed |= not together(joint, options.out, options.quick)
        report(options.out)
    return int(failed)


def report(out: Path) -> None:
    """The table and the plot of all parts in `out`, written anew."""
    files = gather(out)
    if files:
        stream_report.main([*map(str, files), "--out", str(out / "report")])
        print(out / "report.md", flush=True)


if __name__ == "__main__":
    sys.exit(main())
