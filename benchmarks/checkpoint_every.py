"""End to end: training with a checkpoint every k steps, whatever later steps wait for included, for several sizes.

    python -m undertow.benchmarks.checkpoint_every --sizes '125 M' --every 1,5,10,50 --result results

A sample is a row of intervals of k steps, each begun by a save; the first interval does not count, so that what a save
leaves to do while later steps run, and what a later save waits for, is in the time of the rest. Steps are timed on the
device, between two events, and set beside as many times the median step without saves in the same round: that step is
steady to a thousandth on a GPU, so a cell needs no run of its own without saves. Ways that lose by multiples need few
rounds and take long, hence `--rival-rounds`, and no interval is begun in a sample of more than `LONG_S`. The cells of a
round come in random order. Every arm's file is read back and compared bit by bit before anything is timed. A save that
was not begun because others were still under way counts as none: `saves` says how many were.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from undertow.benchmarks.checkpoint_job import Job, Method
from undertow.benchmarks.checkpoint_ours import Undertow
from undertow.benchmarks.checkpoint_rivals import DcpAsync, Nvrx, TorchCheckpointing, TorchSave, TorchSnapshot
from undertow.benchmarks.checkpoint_steps import BEFORE, SIZES, Arm, Stopwatch, check
from undertow.benchmarks.facts import facts, slug
from undertow.benchmarks.intervals import LEAST_SAMPLES, median_interval
from undertow.benchmarks.report import markdown_table
from undertow.benchmarks.stopping import Stopping
from undertow.dist.errors import UserError
from undertow.dist.launch import detect, init_process_group

INTERVALS = {1: 6, 5: 3, 10: 2}  # steps between saves → timed intervals; one, where they are longer
LONG_S = 15.0  # of a sample: then the interval at hand is its last, if one has been timed
STEPS_OF_PLAIN = 16
PACKAGES = ("torch-checkpointing", "nvidia-resiliency-ext", "torchsnapshot", "xxhash")
WAYS: dict[str, Callable[[Job], Method]] = {
    "undertow disk (fsync)": lambda job: Undertow(job, "disk"),
    "undertow host": lambda job: Undertow(job, "host", host=True),
    "undertow disk, 0.4 parked": lambda job: Undertow(job, "disk-parked", device=0.4),
    "undertow host, 0.4 parked": lambda job: Undertow(job, "host-parked", host=True, device=0.4),
    "dcp.async_save, reused stager (fsync)": lambda job: DcpAsync(job, "dcp-stager", reused=True),
    "torch_checkpointing": lambda job: TorchCheckpointing(job, "manager"),
    "NVRx async": lambda job: Nvrx(job, "nvrx"),
    "torchsnapshot async": lambda job: TorchSnapshot(job, "snapshot"),
    "torch.save": lambda job: TorchSave(job, "torch"),
}


@dataclass
class Cell:
    """One way at one interval: of each round, the time without saves over the time with them, and the saves made."""

    size: str
    every: int
    arm: str
    ratios: list[float] = field(default_factory=list)
    saves: list[int] = field(default_factory=list)
    intervals: list[int] = field(default_factory=list)  # timed, each of which should have begun with a save
    note: str = ""

    def text(self) -> str:
        if self.note or not self.ratios:
            return self.note or "not timed"
        if len(self.ratios) >= LEAST_SAMPLES:
            found = median_interval(self.ratios)
            text = f"{found.median:.3f} [{found.low:.3f}, {found.high:.3f}]"
        else:
            text = f"{median(self.ratios):.3f} ({min(self.ratios):.3f} to {max(self.ratios):.3f})"
        made, wanted = sum(self.saves), sum(self.intervals)
        return text if made >= wanted else f"{text}, {made} of {wanted} saves"


def step_ms(job: Job) -> float:
    """The median step without saves."""
    job.synchronize()
    for _ in range(BEFORE):
        job.train()
    clock = Stopwatch(job)
    for _ in range(STEPS_OF_PLAIN):
        job.train()
        clock.mark()
    return median(clock.steps_ms())


def sample(job: Job, method: Method, every: int, intervals: int) -> tuple[float, int, int]:
    """Milliseconds a step of up to `intervals` times `every` steps that a save begins; saves begun; intervals."""
    os.sync()  # nobody's sample begins with another's unwritten pages
    job.synchronize()
    clock, saves, timed, began_s = Stopwatch(job), 0, 0, time.monotonic()
    for index in range(1 + intervals):
        if timed and time.monotonic() - began_s > LONG_S:
            break
        begun = method.save() is not False
        timed, saves = index, saves + (begun and index > 0)
        for _ in range(every):
            job.train()
            clock.mark()
    found = sum(clock.steps_ms()[every:]) / (timed * every)
    method.drain()
    method.clear()
    return found, saves, timed


def run(
    job: Job, every: Sequence[int], rounds: int, rival_rounds: int, *, ways: Sequence[str] = tuple(WAYS), seed: int = 0,
    keep: Callable[[list[Cell]], object] = lambda cells: None,
) -> list[Cell]:  # fmt: skip
    """All cells of one size. A failure takes a way out of the rest, and the others go on. `keep` is called with all of
    them whenever one has been timed: a way may hang, and a machine be taken away."""
    arms = [Arm(name) for name in ways]
    cells = [Cell(job.size.name, k, arm.name) for k in every for arm in arms]
    for arm in arms:
        try:
            arm.method = WAYS[arm.name](job)
            check(job, arm)
        except ImportError:
            arm.note = "not installed"
        except Exception as error:  # a rival that fails is a finding
            arm.note = f"failed: {type(error).__name__}: {error}"
    by_name, began_s, order = {arm.name: arm for arm in arms}, time.monotonic(), random.Random(seed)
    with Stopping() as stopping:
        for turn in range(max(rounds, rival_rounds)):
            for cell in order.sample(cells, len(cells)):
                arm = by_name[cell.arm]
                cell.note = arm.note
                wanted = rounds if isinstance(arm.method, Undertow) else rival_rounds
                if stopping.signal or arm.note or arm.method is None or turn >= wanted:
                    continue
                try:
                    plain = step_ms(job)
                    with_saves, saves, timed = sample(job, arm.method, cell.every, INTERVALS.get(cell.every, 1))
                except Exception as error:
                    arm.note = cell.note = f"failed: {type(error).__name__}: {error}"
                    continue
                cell.ratios.append(plain / with_saves)
                cell.saves.append(saves)
                cell.intervals.append(timed)
                keep(cells)
                at_s = time.monotonic() - began_s
                typer.echo(
                    f"{at_s:4.0f} s, round {turn + 1}: every {cell.every}, {cell.arm}: {cell.ratios[-1]:.3f}", err=True
                )
    return cells


def table(cells: Sequence[Cell]) -> list[str]:
    """A line for each size and way, a column for each interval."""
    every = list(dict.fromkeys(cell.every for cell in cells))
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for cell in cells:
        rows.setdefault((cell.size, cell.arm), {})[cell.every] = cell.text()
    lines = [(size, f"**{arm}**" if arm.startswith("undertow") else arm, *(found[k] for k in every))
             for (size, arm), found in rows.items()]  # fmt: skip
    return markdown_table(("parameters", "way", *(f"every {k}" for k in every)), lines)


def write(folder: Path, cells: Sequence[Cell], text: dict[str, Any]) -> Path:
    """JSON and a page with the table; the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    about, sizes = text["facts"], list(dict.fromkeys(cell.size for cell in cells))
    stem = f"checkpoint_every-{slug('-'.join(sizes))}_{slug(about['hardware'])}_{date.today().isoformat()}"
    (folder / f"{stem}.json").write_text(
        json.dumps(text | {"cells": [asdict(cell) for cell in cells]}, indent=1) + "\n"
    )
    lines = ["# checkpoint_every: training with a checkpoint every k steps, end to end", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    lines += [f"- steps without saves: {', '.join(f'{k} {v:.2f} ms' for k, v in text['step_ms'].items())}", ""]
    lines += table(cells)
    lines += [
        "",
        "Time without saves / with them: median [95 % interval from order statistics], or the median and the ",
    ]
    lines[-1] += "range of fewer than six rounds."
    (folder / f"{stem}.md").write_text("\n".join(lines) + "\n")
    return folder / f"{stem}.md"


def main(
    sizes: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(SIZES)}.")] = "",
    every: Annotated[str, typer.Option(help="Steps between saves, comma-separated.")] = "1,5,10,50",
    rounds: Annotated[int, typer.Option(help="Rounds of our arms.")] = 6,
    rival_rounds: Annotated[int, typer.Option(help="Rounds of the rivals.")] = 2,
    ways: Annotated[str, typer.Option(help="Substrings of the ways to run, comma-separated; all when empty.")] = "",
    folder: Annotated[Path | None, typer.Option(help="Where the disk is that is to be measured.")] = None,
    result: Annotated[Path | None, typer.Option(help="Write JSON and Markdown into this folder.")] = None,
) -> None:
    """Time training with a save every k steps beside training without."""
    cuda = torch.cuda.is_available()
    names = sizes.split(",") if sizes else ["125 M", "355 M"] if cuda else ["5 M"]
    wanted = [name for name in WAYS if not ways or any(part in name for part in ways.split(","))]
    intervals = [int(k) if k.strip().isdigit() else 0 for k in every.split(",")]
    if set(names) - set(SIZES) or not wanted or min(intervals) < 1:
        raise UserError(
            f"--sizes '{sizes}' --every '{every}' --ways '{ways}'",
            expected=f"some of {', '.join(SIZES)}; numbers from 1; parts of {', '.join(WAYS)}",
        )
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    init_process_group(detect({}), device=device)
    cells: list[Cell] = []
    plain: dict[str, float] = {}
    about = facts(PACKAGES)

    def keep(more: list[Cell]) -> Path | None:
        text = {"facts": about, "step_ms": plain, "rounds": rounds}
        return None if result is None else write(result, cells + more, text)

    for name in names:
        job = Job(SIZES[name], device, Path(tempfile.mkdtemp(prefix="undertow-bench-", dir=folder)))
        try:
            plain[name] = step_ms(job)
            cells += run(job, intervals, rounds, rival_rounds, ways=wanted, keep=keep)
        finally:
            job.close()
            shutil.rmtree(job.folder, ignore_errors=True)
        if page := keep([]):
            typer.echo(f"written: {page.name}")
    typer.echo("\n".join(table(cells)))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"undertow: {error}")
