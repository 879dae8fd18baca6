"""Keep what a GPU machine brought back: `python -m undertow.benchmarks.mpi_gpu_record FOLDER|ARCHIVE.tgz …`.

One command after `.ci/gpu mpi ranks_mpi`. It looks below each FOLDER (or in the .tgz) for what the mpi_gpu_* programs
wrote and

- writes each as JSON, page and plot to benchmarks/results/NAME_HARDWARE_DATE.*; a folder `fetch_32` holds an experiment
  and no part of .ci/gpu: its name comes into theirs, and nothing else follows from them;
- ships the paths that mpi_gpu_paths fitted (gpu.txt beside it) as mpi_interpose/csrc/policy/gpu.txt;
- writes docs/images/mpi-gpu-pack.png, and what stands in docs/mpi-interposer.md between `<!-- mpi_gpu_… -->` and
  `<!-- end -->`: chosen cells, goals, a link to the figures. What the guide says beside them is yours to read again.

A file with a wrong answer is not kept: the command says so and ends with 1. A run of mpi_gpu_pack that was cut short of
the chosen cells is kept, but the guide stays. Older results are never removed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from undertow.benchmarks import facts, mpi_gpu_pages
from undertow.benchmarks.intervals import median_interval
from undertow.benchmarks.report import markdown_table
from undertow.dist.errors import MissingPackage, UserError
from undertow.mpi_interpose import gpu

GUIDE, POLICY = Path("docs/mpi-interposer.md"), Path("mpi_interpose/csrc/policy/gpu.txt")
PICTURE = Path("docs/images/mpi-gpu-pack.png")
MIB = 1 << 20
CHOSEN = (  # cells of mpi_gpu_pack that the guide shows: name, bytes, words
    ("1-D 4 B", 16 * MIB, "4 B blocks, stride 8"),
    ("1-D 16 B", 16 * MIB, "16 B blocks, stride 32"),
    ("1-D 128 B", 16 * MIB, "128 B blocks, stride 256"),
    ("1-D 4096 B", 256 * MIB, "4 KiB blocks, stride 8 KiB"),
    ("3-D x face 256", 512 << 10, "3-D face of single doubles"),
    ("transpose 4 B, 2048^2", 16 * MIB, "transpose of 4 B elements"),
    ("indexed 64 B, random", 4 * MIB, "indexed, 64 B blocks"),
)
ARMS = {
    "ours": "ours",
    "torch": "torch",
    "cupy": "cupy",
    "paper": "paper",
    "memcpy": "cuMemcpy3D",
    "copy": "plain copy",
}
WAYS = ("auto", "direct", "staged", "ipc", "by hand", "kernels", "per block")


def sources(paths: Sequence[Path], stack: ExitStack) -> Iterator[Path]:
    """Every mpi_gpu_*.json below the folders or in the archives, and in archives below folders."""
    for path in paths:
        folder = path
        if path.is_file() and path.suffix == ".json":
            yield path
            continue
        if path.is_file():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            with tarfile.open(path) as archive:
                archive.extractall(folder, filter="data")
        if not folder.is_dir():
            raise UserError(f"{path} is neither a folder nor an archive; expected what .ci/gpu brought back")
        yield from sorted(folder.rglob("mpi_gpu_*.json"))
        yield from sources([inner for inner in sorted(folder.rglob("*.tgz")) if inner != path], stack)


def wrong(data: dict[str, Any]) -> list[str]:
    """The cells with a wrong answer."""
    bad = []
    for row in data["rows"]:
        found = row["wrong"]
        if any(found.values()) if isinstance(found, dict) else found:
            bad.append(str(row.get("name", f"{row.get('block')} B, {row.get('size')} B")))
    return bad


def median(row: dict[str, Any], arm: str) -> float | None:
    """Seconds of an arm of a cell of mpi_gpu_pack, its first results too, which kept no samples."""
    if arm in row.get("samples", {}):
        return median_interval(row["samples"][arm]).median
    return row["seconds"][arm][0] if arm in row.get("seconds", {}) else None


def pack_table(rows: list[dict[str, Any]]) -> list[str]:
    """The chosen cells of mpi_gpu_pack: microseconds of one pack on the device."""
    lines = []
    for name, size, words in CHOSEN:
        for row in rows:
            if (row["name"], row["size"], row["way"]) == (name, size, "pack"):
                times = [median(row, arm) for arm in ARMS]
                lines.append(
                    (words, mpi_gpu_pages.size_text(size), *("" if t is None else f"{t * 1e6:.1f}" for t in times))
                )
    return markdown_table(("layout", "size", *ARMS.values()), lines)


def exchange_table(rows: list[dict[str, Any]]) -> list[str]:
    """Every case of mpi_gpu_messages or _collectives: microseconds of the slower rank."""
    ways = [way for way in WAYS if any(way in row["samples"] for row in rows)]
    lines = []
    for row in rows:
        us = {way: median_interval(row["samples"][way]).median for way in ways if way in row["samples"]}
        hand = f"{us['by hand'] / us['auto']:.2f}" if {"by hand", "auto"} <= us.keys() else ""
        lines.append((row["name"], f"{row['blocks']:,}", *(f"{us[w]:,.0f}" if w in us else "" for w in ways), hand))
    return markdown_table(("case", "blocks", *ways, "by hand / auto"), lines)


def block(data: dict[str, Any], page: str) -> str:
    """What stands in the guide between the marks of this benchmark."""
    name, rows = data["benchmark"], data["rows"]
    pack = name == "mpi_gpu_pack"
    what = "device time in µs of one pack" if pack else "µs of the slower rank"
    machine = data["facts"]["hardware"].split(" + ")[0].replace(" x ", " × ")
    goals = [(wanted.removeprefix("(none) "), *rest) for wanted, *rest in mpi_gpu_pages.KINDS[name][3](rows)]
    lines = [
        f"Measured on {machine}, {data['facts']['date']}, {what}",
        f"([figures](../benchmarks/results/{page})):",
        "",
    ]
    lines += pack_table(rows) if pack else exchange_table(rows)
    lines += ["", f"![Rates of packing on a GPU](images/{PICTURE.name})"] if pack else []
    return "\n".join([*lines, "", *markdown_table(("goal, or figure", "measured", "met"), goals)])


def into_guide(guide: str, name: str, text: str) -> str:
    """The guide with `text` between its marks for `name`; without such marks UserError."""
    pattern = re.compile(rf"(<!-- {name}\b[^>]*-->\n).*?(\n<!-- end -->)", re.DOTALL)
    made, n = pattern.subn(lambda found: found[1] + text + found[2], guide)
    if n != 1:
        raise UserError(f"{GUIDE} has {n} places marked <!-- {name} -->; expected one, ended by <!-- end -->")
    return made


def figure(data: dict[str, Any], path: Path) -> None:
    """Packed bytes per second over the block, for the two larger sizes; `MissingPackage` without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingPackage("matplotlib", extra="plots", needed_for="drawing the guide's plot") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    from undertow.benchmarks.plot import COLOURS

    drawn, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, size in zip(axes, (16 * MIB, 256 * MIB)):
        lines = [
            row
            for row in data["rows"]
            if row["size"] == size and row["name"].startswith("1-D") and row["way"] == "pack"
        ]
        lines.sort(key=lambda row: row["block"])
        for colour, (arm, words) in zip(COLOURS, ARMS.items()):
            points = [(row["block"], size / t / 1e9) for row in lines if (t := median(row, arm)) is not None]
            style = {"linestyle": "--"} if arm == "copy" else {"marker": "o", "markersize": 4}
            if points:
                axis.plot(*zip(*points), color=colour, label=words, **style)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("bytes of a block, with gaps as large")
        axis.set_title(f"packing {size // MIB} MiB")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("GB packed per second")
    if axes[0].lines:
        axes[0].legend(frameon=False)
    where = data.get("facts", {}).get("hardware") or data["device"]
    drawn.suptitle(where, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=110)
    pyplot.close(drawn)


def keep(path: Path, root: Path) -> list[Path]:
    """Everything that follows from one file; what was written."""
    data = json.loads(path.read_text())
    if data.get("benchmark") not in mpi_gpu_pages.KINDS or not data["rows"] or "facts" not in data:
        raise UserError(f"{path.name}: no result of {', '.join(mpi_gpu_pages.KINDS)} as they are now")
    bad = wrong(data)
    if bad:
        raise UserError(f"{path.name}: wrong answers in {', '.join(bad[:5])}; nothing of it is kept")
    experiment = data.setdefault("experiment", path.parent.name if path.parent.name.startswith("fetch_") else "")
    name = data["benchmark"] + (f"-{experiment}" if experiment else "")
    target = (
        root / "benchmarks" / "results" / f"{name}_{facts.slug(data['facts']['hardware'])}_{data['facts']['date']}.json"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    mpi_gpu_pages.save(data, target)
    made = [target, *mpi_gpu_pages.write(data, target)]
    shown = {(row["name"], row["size"]) for row in data["rows"] if row.get("way") == "pack"}
    part = data["benchmark"] == "mpi_gpu_pack" and not shown >= {(name, size) for name, size, _ in CHOSEN}
    if experiment or part:
        return made
    if data["benchmark"] == "mpi_gpu_paths":
        model = path.with_name("gpu.txt")
        if model.exists():
            text = model.read_text()
            gpu.direct_up_to(text, True, 1)  # the library itself reads it
            (root / POLICY).write_text(text)
            made.append(root / POLICY)
        return made
    guide = root / GUIDE
    guide.write_text(into_guide(guide.read_text(), data["benchmark"], block(data, target.with_suffix(".md").name)))
    if data["benchmark"] == "mpi_gpu_pack":
        figure(data, root / PICTURE)
        made.append(root / PICTURE)
    return [*made, guide]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("found", nargs="+", type=Path, help="folders, .tgz archives or JSON files of a GPU run")
    parser.add_argument("--root", type=Path, default=facts.ROOT, help="the checkout to write to")
    options = parser.parse_args(argv)
    status, seen = 0, 0
    with ExitStack() as stack:
        for path in sources(options.found, stack):
            seen += 1
            try:
                sys.stdout.write("".join(f"{made.relative_to(options.root)}\n" for made in keep(path, options.root)))
            except UserError as error:
                sys.stderr.write(f"mpi_gpu_record: {error}\n")
                status = 1
    if not seen:
        sys.stderr.write("mpi_gpu_record: no mpi_gpu_*.json there; expected what .ci/gpu mpi ranks_mpi wrote\n")
    return status if seen else 1


if __name__ == "__main__":
    sys.exit(main())
