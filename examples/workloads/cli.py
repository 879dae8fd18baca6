"""`undertow workloads list | train | claim | compare`: learning methods with any of the systems on or off."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ...dist import launch
from ...dist.command_line import application, run_application
from ...dist.errors import UserError
from ...dist.progress import Progress
from . import report
from .contract import PRESETS, Place, Workload
from .faults import killed_and_whole
from .job import folder_for, job
from .journal import JOURNAL, Journal
from .judge import Verdict, judge
from .keeper import saved_step
from .loop import Outcome, run
from .plots import plot
from .registry import MODULES, all_workloads, get
from .series import Budget, Series, everything
from .switches import Switches

app = application(
    no_args_is_help=True,
    help="Learning methods as workloads: each checks its paper's claim, and the toolkit, at small scale.",
)
Preset = Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}: seconds, minutes, or a GPU.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Changes = Annotated[list[str] | None, typer.Option("--set", help="Change an option, e.g. --set steps=50.")]
Lazy = Annotated[str, typer.Option("--checkpoint", help="lazy: asynchronous checkpoints; off.")]
Stream = Annotated[bool, typer.Option("--stream", help="Streamed backpropagation.")]
Chunk = Annotated[int | None, typer.Option("--stream-chunk", help="Rows of a chunk (default: planned).")]
Context = Annotated[int, typer.Option("--context-parallel", help="Ranks that share each sequence.")]
Overlap = Annotated[str, typer.Option("--overlap", help="auto, on or off: overlapped tensor parallelism.")]
Minutes = Annotated[float | None, typer.Option(help="Stop in an orderly way after that long; see --resume.")]
Resume = Annotated[bool, typer.Option("--resume", help="Take over what has ended in --out, and go on.")]
Variants = Annotated[list[str] | None, typer.Option("--variant", help="Only this one (several: repeat it).")]
Tracked = Annotated[str, typer.Option("--gradients", help="whole, or tracked: entries leave when complete.")]
Halo = Annotated[str, typer.Option("--halo", help="off, gloo, or mpi (under `undertow mpi run -- mpirun`).")]


@app.command("list")
def list_() -> None:
    """The workloads, their claims and the systems they exercise."""
    report.show(report.LIST_HEAD, [report.list_row(workload) for workload in all_workloads()], "workloads", lines=True)


@app.command()
def train(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(MODULES)}.")],
    variant: Annotated[str | None, typer.Option(help="Default: the method itself.")] = None,
    preset: Preset = "ci",
    seed: Annotated[int, typer.Option(help="Seed of data, weights and order.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The run's folder (default runs/workloads/NAME).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    changes: Changes = None,
    device: Device = "cpu",
    checkpoint: Lazy = "lazy",
    stream: Stream = False,
    stream_chunk: Chunk = None,
    context_parallel: Context = 1,
    overlap: Overlap = "off",
    halo: Halo = "off",
    gradients: Tracked = "whole",
) -> None:
    """Run one variant of one workload; alone, or under torchrun or mpirun."""
    workload = get(name)
    switches = Switches(checkpoint, stream, stream_chunk, context_parallel, overlap, halo, gradients)
    variant = variant or workload.method(known(preset))
    config = workload.config(preset, variant, **{"seed": seed, **parse(changes or [])})
    out = out or Path("runs/workloads") / name
    with job(device) as (here, where):
        folder_for(out, here, {"workload": name, "variant": variant, "preset": preset, **asdict(config)}, resume)
        place = Place(here, out, out / "shared", switches, where)
        began = min(saved_step(out), config.steps) if resume else 0
        bar = Progress(config.steps, f"{name}: {variant}", enabled=here.rank == 0, initial=began)
        with bar, Journal(out / JOURNAL if here.rank == 0 else None) as note:
            outcome = run(workload, variant, preset, config, place, resume=resume, tell=bar.update, note=note)
        if here.rank == 0:
            outcome.dump(place)
            plot(out, [(workload, [outcome])])
            head, rows = report.variant_rows(workload, [outcome])
            report.show(head, rows, workload.title)
            for system, counts in outcome.evidence.items():
                typer.echo(f"{system}: " + ", ".join(f"{key} {value:g}" for key, value in counts.items()))
            if config == workload.config(preset, variant, seed=config.seed):
                report.show_claims_of(workload, preset, outcome, device)


@app.command()
def claim(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(MODULES)}.")],
    preset: Preset = "ci",
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder (default runs/workloads/claims).")] = None,
    device: Device = "cpu",
    checkpoint: Lazy = "lazy",
    minutes: Minutes = None,
    resume: Resume = False,
    variant: Variants = None,
) -> None:
    """Check one workload's claims; exit status 1 when one fails that is expected to hold, 3 when one is open."""
    out = out or Path("runs/workloads/claims")
    series = Series(known(preset), seeds, out, Switches(checkpoint), tuple(variant or ()), resume)
    due = [verdict for verdict in comparison([name], series, device, minutes) if verdict.claim.expected]
    if any(not verdict.holds and not verdict.open for verdict in due):
        raise typer.Exit(1)
    if any(verdict.open for verdict in due):
        raise typer.Exit(3)


@app.command()
def compare(
    names: Annotated[list[str] | None, typer.Argument(help="Which workloads (default: all).")] = None,
    preset: Preset = "small",
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Folder (default runs/workloads/PRESET).")] = None,
    device: Device = "cpu",
    checkpoint: Lazy = "lazy",
    minutes: Minutes = None,
    resume: Resume = False,
    variant: Variants = None,
) -> None:
    """Run every variant of every workload over seeds; print the table of claims, what failed shown as failed."""
    out = out or Path("runs/workloads") / known(preset)
    series = Series(preset, seeds, out, Switches(checkpoint), tuple(variant or ()), resume)
    comparison(names or list(MODULES), series, device, minutes)


@app.command()
def table(
    folders: Annotated[list[Path], typer.Argument(help="Folders of comparisons at one preset.")],
    out: Annotated[Path, typer.Option(help="Folder for table.md, result.json and the plots.")],
) -> None:
    """One table of comparisons that were run one by one."""
    presets, runs, asked = zip(*(report.read(folder) for folder in folders))
    if len(set(presets)) > 1:
        raise UserError(f"comparisons at presets {', '.join(presets)}", expected="one preset")
    outcomes = [outcome for part in runs for outcome in part]
    known = [workload for workload in all_workloads() if any(o.workload == workload.name for o in outcomes)]
    done = [(workload, [o for o in outcomes if o.workload == workload.name]) for workload in known]
    seeds = sorted({seed for part in asked for seed in part})
    verdicts = [verdict for workload, own in done for verdict in judge(workload, presets[0], own, seeds)]
    folder_for(out, launch.detect(), {"tables": [str(folder) for folder in folders]}, False)
    report.write(out, presets[0], done, verdicts, seeds)
    report.show(report.CLAIM_HEAD, report.claim_rows(verdicts), f"claims at preset {presets[0]}")


@app.command()
def kill(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(MODULES)}.")],
    at: Annotated[list[int], typer.Option(help="After which update (several: --at 150 --at 450).")],
    variant: Annotated[str | None, typer.Option(help="Default: the method itself.")] = None,
    preset: Preset = "ci",
    seed: Annotated[int, typer.Option(help="Seed of data, weights and order.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder (default runs/workloads/killed/NAME).")] = None,
    changes: Changes = None,
) -> None:
    """SIGKILL a run at some updates and resume it each time; exit status 1 unless it ends as one left in peace."""
    workload = get(name)
    variant = variant or workload.method(known(preset))
    config = workload.config(preset, variant, **{"seed": seed, **parse(changes or [])})
    if not all(0 < step < config.steps for step in at):
        raise UserError(f"--at {', '.join(map(str, at))}", expected=f"updates between 1 and {config.steps - 1}")
    out = out or Path("runs/workloads/killed") / name
    if out.exists():
        raise UserError(f"{out} exists already", remedy="pass another --out")
    options = ["--variant", variant, "--preset", preset, "--seed", str(seed)]
    options += [word for change in changes or () for word in ("--set", change)]
    found = killed_and_whole(name, options, at, out)
    for fault in found.faults:
        typer.echo(f"killed by SIGKILL after update {fault.killed}, went on from update {fault.resumed}")
    for part, same in found.same.items():
        typer.echo(f"{part}: {'identical' if same else 'DIFFERENT'}")
    typer.echo(f"{found.updates} updates in peace, {found.repeated} repeated after the kills")
    if not all(found.same.values()):
        raise typer.Exit(1)


def comparison(names: Sequence[str], series: Series, device: str, minutes: float | None) -> list[Verdict]:
    """All variants and seeds of `names`, or as many as `minutes` allow, reported on the terminal and under its folder.

    The table is written after every run, the plots after every workload.
    """
    if series.seeds < 1:
        raise UserError(f"--seeds {series.seeds}", expected="at least 1")
    workloads, seeds, out, preset = [get(name) for name in names], range(series.seeds), series.out, series.preset
    done: dict[str, list[Outcome]] = {workload.name: [] for workload in workloads}
    for workload in workloads:
        series.of(workload)

    def verdicts() -> list[Verdict]:
        return [verdict for workload in workloads for verdict in judge(workload, preset, done[workload.name], seeds)]

    def written(workload: Workload, outcomes: list[Outcome], plots: bool = False) -> None:
        done[workload.name] = outcomes
        pairs = [(workload, done[workload.name]) for workload in workloads]
        report.write(out, preset, pairs, verdicts(), seeds, plots=plots)

    with job(device) as (here, where):
        budget = Budget(minutes, here, where)
        content = {"workloads": list(names), "preset": preset, "seeds": series.seeds, "variants": list(series.variants)}
        folder_for(out, here, content, series.resume)
        for workload in workloads:
            outcomes = everything(series, workload, here, where, budget, partial(written, workload))
            done[workload.name] = outcomes
            if here.rank == 0:
                written(workload, outcomes, plots=True)
                if outcomes:
                    head, rows = report.variant_rows(workload, outcomes)
                    report.show(head, rows, workload.title)
        if here.rank == 0:
            report.show(report.CLAIM_HEAD, report.claim_rows(verdicts()), f"claims at preset {preset}")
            Console(stderr=True).print(f"written: {out / 'table.md'}, {out / 'result.json'}", highlight=False)
            if any(len(done[w.name]) < len(series.of(w)) or not all(o.ended for o in done[w.name]) for w in workloads):
                typer.echo(f"stopped after --minutes {minutes:g}; the same command with --resume goes on", err=True)
    return verdicts()


def known(preset: str) -> str:
    if preset in PRESETS:
        return preset
    raise UserError(f"--preset {preset}", expected=f"one of {', '.join(PRESETS)}")


def parse(changes: Sequence[str]) -> dict[str, Any]:
    """`name=value` pairs; values as JSON where they are, else as text."""
    found: dict[str, Any] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise UserError(f"--set {change}", expected="name=value")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def main(argv: list[str]) -> int:
    return run_application(app, argv, "undertow workloads")
