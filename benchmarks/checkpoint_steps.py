"""What one checkpoint costs training, step by step: the steps after a save beside the same steps without one.

    python -m undertow.benchmarks.checkpoint_steps --result results
    python -m undertow.benchmarks.checkpoint_steps --arms ours,arena --minutes 2

A stall of a few milliseconds in a step of a hundred drowns in whole runs, whose length drifts by more: a device that
has idled is faster at first. Here every sample begins with steps that do not count, each step is timed on the device,
between two events, and a step is compared with its like: the second after a save with the second of a run without one.
The stall of a checkpoint is the sum over the steps after it, less the same sum without a save in the same round; plain
runs twice per round (A/A). `durable` is seen beside the steps, by one rule for every arm (`checkpoint_durable`). Before
anything is timed, what each arm saved is read back and compared bit by bit. Arms: `ours` (disk, and host memory),
`arena` (the disk through half and a quarter of the state's size in host memory), `parked` (the same with the rest on
the GPU, and host memory with 0.4 of the state there), `rivals` (those that copy beside training).
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
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from undertow.benchmarks.checkpoint_durable import Watch
from undertow.benchmarks.checkpoint_job import LARGE, MEDIUM, SMALL, Job, Method
from undertow.benchmarks.checkpoint_ours import Undertow
from undertow.benchmarks.checkpoint_phases import TINY
from undertow.benchmarks.checkpoint_rivals import rivals
from undertow.benchmarks.checkpoint_stall import ASYNC
from undertow.benchmarks.facts import facts, slug
from undertow.benchmarks.intervals import LEAST_SAMPLES, median_interval
from undertow.benchmarks.report import markdown_table
from undertow.benchmarks.stopping import Stopping
from undertow.dist.errors import MissingPackage, UserError
from undertow.dist.launch import detect, init_process_group

PLAIN, AGAIN = "no checkpoints", "no checkpoints (A/A)"
BEFORE = 3  # steps of a sample that do not count
SIZES = {size.name: size for size in (TINY, SMALL, MEDIUM, LARGE)}
KINDS = ("ours", "arena", "parked", "rivals")
Makers = dict[str, Callable[[], Method]]


@dataclass
class Arm:
    """One way to checkpoint, or none. `steps_ms`: of each sample, its steps in order; `costs` of each sample."""

    name: str
    method: Method | None = None
    note: str = ""  # why it was not timed
    steps_ms: list[list[float]] = field(default_factory=list)
    costs: list[dict[str, float]] = field(default_factory=list)


class Stopwatch:
    """Times steps on the device where there is one, else by the clock."""

    def __init__(self, job: Job) -> None:
        self._job, self._marks = job, []
        self.mark()

    def mark(self) -> None:
        if self._job.device.type == "cuda":
            event: Any = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def steps_ms(self) -> list[float]:
        self._job.synchronize()
        pairs = zip(self._marks, self._marks[1:])
        if self._job.device.type == "cuda":
            return [begin.elapsed_time(end) for begin, end in pairs]
        return [1e3 * (end - begin) for begin, end in pairs]


def sample(job: Job, arm: Arm, steps: int) -> None:
    """Train `steps` steps, with a save before the first of them that counts."""
    os.sync()  # nobody's sample begins with another's unwritten pages
    job.synchronize()
    for _ in range(BEFORE):
        job.train()
    clock, watch, method = Stopwatch(job), None, arm.method
    if method is not None:
        began_s = time.perf_counter()
        if method.save() is False:
            raise RuntimeError("the save was not begun")
        watch = Watch(method, began_s)
    for _ in range(steps):
        job.train()
        clock.mark()
    arm.steps_ms.append(clock.steps_ms())
    if method is None or watch is None:
        return
    method.drain()
    watch.result()
    costs = {"written_s": watch.written_s, "durable_s": watch.durable_s}
    arm.costs.append(costs | (method.costs(1) if isinstance(method, Undertow) else {}))
    method.clear()


def check(job: Job, arm: Arm) -> None:
    """One save, read back and compared; `note` says what is wrong with it."""
    if arm.method is None:
        return
    copies = {key: value.to("cpu", copy=True) for key, value in job.tensors().items()}
    arm.method.save()
    job.train()  # the state moves on while the copies leave
    arm.method.drain()
    found = arm.method.load()
    if wrong := [key for key, value in copies.items() if not torch.equal(found[key], value)]:
        arm.note = f"{len(wrong)} of {len(copies)} tensors are wrong, the first is {wrong[0]}"
    arm.method.clear()


def makers(job: Job, kinds: Sequence[str]) -> tuple[Makers, dict[str, str]]:
    """How to make each arm's method, and why others cannot be had."""
    found: Makers = {}
    missing: dict[str, str] = {}
    if "ours" in kinds or "arena" in kinds:
        found["undertow disk (fsync)"] = lambda: Undertow(job, "disk")
    if "ours" in kinds:
        found["undertow host"] = lambda: Undertow(job, "host", host=True)
    for share in (0.5, 0.25) if "arena" in kinds else ():
        found[f"undertow disk, arena {share}"] = partial(Undertow, job, f"arena{share}", arena=share)
    for share, device in ((0.5, 0.5), (0.25, 0.75)) if "parked" in kinds else ():
        ways = {"arena": share, "device": device}
        found[f"undertow disk, arena {share}, {device} parked"] = partial(Undertow, job, f"parked{device}", **ways)
    if "parked" in kinds:
        found["undertow host, 0.4 parked"] = lambda: Undertow(job, "host-parked", host=True, device=0.4)
    for name, make in rivals(job, few=True).items() if "rivals" in kinds else ():
        if name.startswith(ASYNC) or isinstance(make, str):
            (missing if isinstance(make, str) else found)[name] = make  # type: ignore[index, assignment]
    return found, missing


def run(job: Job, kinds: Sequence[str], steps: int, rounds: int, seconds: float, seed: int) -> list[Arm]:
    """All arms, in turns; after `seconds` no round is begun beyond the fewest that give an interval."""
    ways, missing = makers(job, kinds)
    arms = [Arm(PLAIN), Arm(AGAIN)]
    for name, make in ways.items():
        arms.append(Arm(name))
        _guarded(arms[-1], lambda arm=arms[-1], make=make: setattr(arm, "method", make()))
        _guarded(arms[-1], lambda arm=arms[-1]: check(job, arm))
    began_s, order = time.monotonic(), random.Random(seed)
    with Stopping() as stopping:
        for done in range(rounds):
            if stopping.signal or (done >= LEAST_SAMPLES and time.monotonic() - began_s > seconds):
                break
            for arm in order.sample(arms, len(arms)):
                _guarded(arm, lambda arm=arm: sample(job, arm, steps))
            typer.echo(f"round {done + 1} of {rounds}, {time.monotonic() - began_s:.0f} s", err=True)
    return arms + [Arm(name, note=why) for name, why in missing.items()]


def _guarded(arm: Arm, act: Callable[[], None]) -> None:
    if arm.note:
        return
    try:
        act()
    except Exception as error:  # a rival that fails is a finding, and the others go on
        arm.note = f"failed: {type(error).__name__}: {error}"


def over_ms(arm: Arm, plain: Arm) -> list[float]:
    """By how much each step was longer than its like without a save; median over the rounds."""
    return [median(mine) - median(theirs) for mine, theirs in zip(zip(*arm.steps_ms), zip(*plain.steps_ms))]


def stall_text(arm: Arm, plain: Arm) -> str:
    """The stall of a checkpoint, in ms: median of the rounds' differences and its interval."""
    differences = [sum(mine) - sum(theirs) for mine, theirs in zip(arm.steps_ms, plain.steps_ms)]
    if len(differences) < LEAST_SAMPLES:
        return f"{median(differences):.1f} (few rounds)"
    found = median_interval(differences)
    return f"{found.median:.1f} [{found.low:.1f}, {found.high:.1f}]"


def table(arms: Sequence[Arm]) -> list[str]:
    """The arms that were timed, as lines of Markdown, and the others below."""
    plain, rows = arms[0], []
    for arm in arms[1:]:
        if arm.note:
            continue
        over = over_ms(arm, plain)
        cost = {key: median(one[key] for one in arm.costs) for key in (arm.costs[0] if arm.costs else ())}
        cells = [stall_text(arm, plain), f"{sum(over):.1f}", f"{max(over):.1f}", f"{over.index(max(over)) + 1}"]
        cells += [f"{cost[key]:.2f}" if key in cost else "" for key in ("durable_s", "call_ms", "fence_ms")]
        rows.append([f"**{arm.name}**" if arm.name.startswith("undertow") else arm.name, *cells])
    names = ("arm", "stall, ms", "sum of medians, ms", "longest, ms", "in step", "durable, s", "call, ms", "fence, ms")
    lines = markdown_table(names, rows)
    return lines + [""] + [f"- not timed: {arm.name}: {arm.note}" for arm in arms if arm.note]


def draw(arms: Sequence[Arm], title: str, path: Path) -> None:
    """How much longer each step after a save was, for every arm."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingPackage("matplotlib", extra="plots", needed_for="drawing the benchmark's plot") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    from undertow.benchmarks.plot import COLOURS

    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    colours = iter(COLOURS)
    for arm in arms[1:]:
        if not arm.note:
            over = over_ms(arm, arms[0])
            style: dict[str, Any] = {"color": "0.6"} if arm.name == AGAIN else {"color": next(colours)}
            axis.plot(range(1, len(over) + 1), over, marker=".", label=arm.name, **style)
    axis.set_yscale("symlog", linthresh=1)
    axis.set(xlabel="step after the save", ylabel="longer than without, ms")
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write(folder: Path, size: str, text: dict[str, Any], arms: Sequence[Arm], kinds: Sequence[str]) -> Path:
    """JSON with every step's time, a page and its picture; the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    about = text["facts"]
    stem = f"checkpoint_steps-{slug(size)}-{'-'.join(kinds)}_{slug(about['hardware'])}_{date.today().isoformat()}"
    kept = [{key: value for key, value in asdict(_bare(arm)).items() if key != "method"} for arm in arms]
    (folder / f"{stem}.json").write_text(json.dumps(text | {"arms": kept}, indent=1) + "\n")
    title = f"{size} parameters, one save before the first step\n{about['hardware']}, {about['date']}"
    draw(arms, title, folder / f"{stem}.png")
    lines = [f"# checkpoint_steps: what one save costs the {text['steps']} steps after it, {size} parameters", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    lines += [f"- seed {text['seed']}, {len(arms[0].steps_ms)} rounds, {text['state_bytes']:,} bytes of state"]
    lines += [f"- a step without saves: {median(sum(arms[0].steps_ms, [])):.2f} ms", "", f"![steps]({stem}.png)", ""]
    lines += table(arms)
    lines += [
        "",
        "Stall: the steps' sum less that without a save, formed within each round: median [95 % interval from",
    ]
    lines += ["order statistics]. Sum of medians: each step by itself, median over the rounds, less its like."]
    (folder / f"{stem}.md").write_text("\n".join(lines) + "\n")
    return folder / f"{stem}.md"


def _bare(arm: Arm) -> Arm:
    return Arm(arm.name, None, arm.note, arm.steps_ms, arm.costs)


def main(
    size: Annotated[str, typer.Option(help=f"The model: {', '.join(SIZES)}.")] = "",
    arms: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(KINDS)}.")] = "ours,rivals",
    steps: Annotated[int, typer.Option(help="Steps after the save; a save should be durable within them.")] = 24,
    rounds: Annotated[int, typer.Option(help="Every arm once in each.")] = 12,
    minutes: Annotated[float, typer.Option(help="No round is begun after them, but the least six.")] = 4.0,
    seed: Annotated[int, typer.Option(help="Of the arms' order.")] = 0,
    folder: Annotated[Path | None, typer.Option(help="Where the disk is that is to be measured.")] = None,
    result: Annotated[Path | None, typer.Option(help="Write JSON, Markdown and picture into this folder.")] = None,
) -> None:
    """Time the steps after a save, for each way to checkpoint."""
    cuda = torch.cuda.is_available()
    size = size or (MEDIUM if cuda else TINY).name
    kinds = [kind for kind in arms.split(",") if kind]
    if size not in SIZES or not kinds or set(kinds) - set(KINDS):
        raise UserError(f"--size '{size}' --arms '{arms}'", expected=f"one of {', '.join(SIZES)}, some of {KINDS}")
    if steps < 1 or rounds < 1:
        raise UserError(f"--steps {steps} --rounds {rounds}", expected="at least 1 of each")
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    init_process_group(detect({}), device=device)
    job = Job(SIZES[size], device, Path(tempfile.mkdtemp(prefix="undertow-bench-", dir=folder)))
    try:
        found = run(job, kinds, steps, rounds, 60 * minutes, seed)
    finally:
        job.close()
        shutil.rmtree(job.folder, ignore_errors=True)
    typer.echo("\n".join(table(found)))
    if result is not None:
        packages = ("torch-checkpointing", "nvidia-resiliency-ext", "torchsnapshot", "xxhash")
        text = {"facts": facts(packages), "steps": steps, "seed": seed, "state_bytes": job.state_bytes}
        typer.echo(f"written: {write(result, size, text, found, kinds).name}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"undertow: {error}")
