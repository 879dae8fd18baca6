"""Everything still to be measured of streamed backpropagation on one GPU: parts, each in a process with a time limit.

    python benchmarks/stream_session.py --list
    python benchmarks/stream_session.py --out build/stream --group 1      # the most telling, under five minutes
    python benchmarks/stream_session.py --out build/stream --group 2      # groups of at most 9.5 minutes
    python benchmarks/stream_session.py --out build/stream products batches
    python benchmarks/stream_session.py --out build/stream --quick        # every part on a CPU, a tiny model

A part that fails or runs into its limit does not stop the others, and keeps the cells that it had finished (its
benchmark saves after each). Results: PART.json and PART.log in OUT, and a table and a plot of all parts there, written
anew after each part. All parts may use 80 GB of a device that has more. Lengths that would take minutes a step at full
depth are measured with one or four layers, and one full-depth step confirms.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
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
    group: int
    seconds: int
    what: str
    words: dict[str, str]
    quick: dict[str, str]
    program: str = "stream_backprop.py"


GRACE_S = 20
GIGABYTES = "80"
TINY = {"model": "tiny", "layers": "2", "chunk": "64"}
PARTS = (
    Part(
        "curve", 1, 105, "Llama-3-8B shape, four layers: time, peak and prediction from 8K to 128K tokens",
        {
            "model": "llama3-8b", "layers": "4", "tokens": "131072,8192,32768", "arms": FEW, "repeats": "2",
            "check-tokens": "0",
        },
        {**TINY, "tokens": "128,64", "arms": "hf+ce,ours auto", "repeats": "1"},
    ),
    Part(
        "length", 1, 90, "one full-width layer: 384K and 512K tokens, and who runs out of memory there",
        {
            "model": "llama3-8b", "layers": "1", "tokens": "393216,524288", "check-tokens": "0", "repeats": "1",
            "arms": "ours+offload+stash,hf+ce,hf+ce+offload,alst",
        },
        {**TINY, "layers": "1", "tokens": "512", "arms": "ours+offload+stash", "repeats": "1"},
    ),
    Part(
        "depth", 1, 85, "Llama-3-8B at full depth, 64K tokens",
        {
            "model": "llama3-8b", "layers": "32", "tokens": "65536", "check-tokens": "0", "repeats": "1",
            "arms": "ours auto,hf+ce+offload,hf+ce",
        },
        {**TINY, "layers": "4", "tokens": "128", "arms": "ours auto,hf+ce", "repeats": "1"},
    ),
    Part(
        "qwen3-8b", 2, 200, "Qwen3-8B shape, four layers: gradients checked, time and memory by length",
        {"model": "qwen3-8b", "layers": "4", "tokens": "8192,32768,131072", "arms": CURVE, "repeats": "2"},
        {**TINY, "tokens": "128", "check-tokens": "128", "arms": "hf+ce,ours auto", "repeats": "1"},
    ),
    Part(
        "chunks", 2, 130, "256K tokens, one layer: the planner's choice against fixed chunk lengths",
        {"model": "llama3-8b", "layers": "1", "tokens": "262144", "arms": SWEEP, "repeats": "2", "check-tokens": "0"},
        {**TINY, "tokens": "256", "arms": "ours auto,ours+stash#64,ours+stash#128", "repeats": "1"},
    ),
    Part(
        "batches", 2, 120, "16K tokens, batches of 1 to 8, four layers",
        {
            "model": "llama3-8b", "layers": "4", "tokens": "16384", "batches": "1,2,4,8", "check-tokens": "0",
            "arms": "ours auto,hf+ce,hf+ce+offload,ours+stash",
        },
        {**TINY, "tokens": "128", "batches": "1,2", "arms": "hf+ce,ours+stash", "repeats": "1"},
    ),
    Part(
        "products", 2, 60, "sums of weight gradients by rows of one product",
        {"model": "llama3-8b", "rows": "8192,131072"}, {"model": "tiny", "rows": "300", "repeats": "1"},
        "stream_products.py",
    ),
    Part(
        "qwen3-4b", 3, 200, "Qwen3-4B shape, likewise",
        {"model": "qwen3-4b", "layers": "4", "tokens": "8192,32768,131072", "arms": CURVE, "repeats": "2"},
        {**TINY, "tokens": "64,128", "arms": "hf+ce,ours+offload+stash", "repeats": "1", "check-tokens": "0"},
    ),
    Part(
        "quarter", 3, 200, "Llama-3-8B shape, four layers, 256K tokens",
        {
            "model": "llama3-8b", "layers": "4", "tokens": "262144", "check-tokens": "0", "repeats": "1",
            "arms": "ours auto,hf+ce+offload,ours+offload+stash,alst",
        },
        {**TINY, "tokens": "128", "arms": "ours auto", "repeats": "1", "check-tokens": "0"},
    ),
    Part(
        "deep", 3, 130, "Llama-3-8B at full depth, 96K tokens",
        {
            "model": "llama3-8b", "layers": "32", "tokens": "98304", "check-tokens": "0", "repeats": "1",
            "arms": "ours auto,hf+ce+offload",
        },
        {**TINY, "layers": "4", "tokens": "128", "arms": "ours auto", "repeats": "1"},
    ),
)  # fmt: skip


def command(part: Part, out: Path, quick: bool) -> list[str]:
    """The command line of one part."""
    words = {**part.words, **(part.quick if quick else {}), "json": str(out / f"{part.name}.json")}
    if part.program == "stream_backprop.py":
        words |= {"seconds": str(part.seconds), "gigabytes": GIGABYTES}
        words |= {"check-tokens": part.quick.get("check-tokens", "0")} if quick else {}
    if quick:
        words["device"] = "cpu"
    return [sys.executable, str(HERE / part.program), *(f"--{name}={value}" for name, value in words.items())]


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


def gather(out: Path) -> list[Path]:
    """The files of parts in `out` that hold cells, in the order of the parts."""
    files = [out / f"{part.name}.json" for part in PARTS if part.program == "stream_backprop.py"]
    return [file for file in files if file.exists() and json.loads(file.read_text()).get("rows")]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", help="default: all")
    parser.add_argument("--group", type=int, choices=sorted({part.group for part in PARTS}), help="only its parts")
    parser.add_argument("--out", type=Path, default=Path("build/stream"))
    parser.add_argument("--quick", action="store_true", help="on a CPU, in seconds: to see that it runs")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(argv)
    unknown = set(options.parts) - {part.name for part in PARTS}
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; expected some of {', '.join(part.name for part in PARTS)}")
    chosen = [p for p in PARTS if (not options.parts or p.name in options.parts) and options.group in (None, p.group)]
    if options.list:
        for part in chosen:
            print(f"group {part.group}  {part.name:<10}{part.seconds:>5} s  {part.what}")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    failed, files = False, list[Path]()
    for part in chosen:
        start = time.monotonic()
        verdict = run(part, options.out, options.quick)
        failed |= verdict != "done"
        print(f"{part.name}: {verdict} after {time.monotonic() - start:.0f} s", flush=True)
        files = gather(options.out)
        if files:
            stream_report.main([*map(str, files), "--out", str(options.out / "report")])
    if files:
        print(f"{options.out / 'report.md'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
