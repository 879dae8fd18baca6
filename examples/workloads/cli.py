"""`undertow workloads list | train | claim | compare`: learning methods with any of the systems on or off."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console

from ...dist import launch
from ...dist.errors import UserError
from ...dist.launch import Launch
from ...dist.progress import Progress
from . import report
from .contract import PRESETS, Place, Workload
from .faults import killed_and_whole
from .journal import JOURNAL, Journal
from .judge import Verdict, judge
from .loop import Outcome, run
from .plots import plot
from .registry import MODULES, all_workloads, get
from .switches import Switches

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
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
        bar = Progress(config.steps, f"{name}: {variant}", enabled=here.rank == 0)
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
) -> None:
    """Check one workload's claims; exit status 1 when one fails that is expected to hold."""
    verdicts = comparison([name], preset, seeds, out or Path("runs/workloads/claims"), device, checkpoint)
    if any(not verdict.holds and verdict.claim.expected for verdict in verdicts):
        raise typer.Exit(1)


@app.command()
def compare(
    names: Annotated[list[str] | None, typer.Argument(help="Which workloads (default: all).")] = None,
    preset: Preset = "small",
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0.")] = 3,
    out: Annotated[Path | None, typer.Option(help="Folder (default runs/workloads/PRESET).")] = None,
    device: Device = "cpu",
    checkpoint: Lazy = "lazy",
) -> None:
    """Run every variant of every workload over seeds; print the table of claims, what failed shown as failed."""
    comparison(names or list(MODULES), preset, seeds, out or Path("runs/workloads") / preset, device, checkpoint)


@app.command()
def table(
    folders: Annotated[list[Path], typer.Argument(help="Folders of comparisons at one preset.")],
    out: Annotated[Path, typer.Option(help="Folder for table.md, result.json and the plots.")],
) -> None:
    """One table of comparisons that were run one by one."""
    presets, runs = zip(*(report.read(folder) for folder in folders))
    if len(set(presets)) > 1:
        raise UserError(f"comparisons at presets {', '.join(presets)}", expected="one preset")
    outcomes = [outcome for part in runs for outcome in part]
    known = [workload for workload in all_workloads() if any(o.workload == workload.name for o in outcomes)]
    done = [(workload, [o for o in outcomes if o.workload == workload.name]) for workload in known]
    verdicts = [verdict for workload, own in done for verdict in judge(workload, presets[0], own)]
    folder_for(out, launch.detect(), {"tables": [str(folder) for folder in folders]}, False)
    report.write(out, presets[0], done, verdicts)
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


def comparison(names: Sequence[str], preset: str, seeds: int, out: Path, device: str, checkpoint: str) -> list[Verdict]:
    """All variants and seeds of `names`, reported on the terminal and under `out`."""
    if seeds < 1:
        raise UserError(f"--seeds {seeds}", expected="at least 1")
    known(preset)
    workloads, switches = [get(name) for name in names], Switches(checkpoint)
    done: list[tuple[Workload, list[Outcome]]] = []
    verdicts: list[Verdict] = []
    with job(device) as (here, where):
        folder_for(out, here, {"workloads": list(names), "preset": preset, "seeds": seeds}, False)
        for workload in workloads:
            outcomes = everything(workload, preset, seeds, out, here, where, switches)
            done.append((workload, outcomes))
            verdicts += judge(workload, preset, outcomes)
            if here.rank == 0:
                head, rows = report.variant_rows(workload, outcomes)
                report.show(head, rows, workload.title)
                report.write(out, preset, done, verdicts)
        if here.rank == 0:
            report.show(report.CLAIM_HEAD, report.claim_rows(verdicts), f"claims at preset {preset}")
            Console(stderr=True).print(f"written: {out / 'table.md'}, {out / 'result.json'}", highlight=False)
    return verdicts


def everything(
    workload: Workload, preset: str, seeds: int, out: Path, here: Launch, where: torch.device, switches: Switches
) -> list[Outcome]:
    outcomes = []
    runs = [(seed, variant) for seed in range(seeds) for variant in workload.compared(preset)]
    configs = [workload.config(preset, variant, seed=seed) for seed, variant in runs]
    with Progress(sum(c.steps for c in configs), workload.name, enabled=here.rank == 0, unit="update") as bar:
        for config, (seed, variant) in zip(configs, runs):
            home = report.home(out, workload.name, seed)
            folder = home / report.variant_name(variant)
            place = Place(here, folder, home / "shared", switches, where)
            bar.update(0, variant=variant, seed=seed)
            with Journal(folder / JOURNAL if here.rank == 0 else None) as note:
                outcome = run(workload, variant, preset, config, place, tell=bar.update, note=note)
            if here.rank == 0:
                outcome.dump(place)
            outcomes.append(outcome)
    return outcomes


def known(preset: str) -> str:
    if preset in PRESETS:
        return preset
    raise UserError(f"--preset {preset}", expected=f"one of {', '.join(PRESETS)}")


@contextmanager
def job(device: str) -> Iterator[tuple[Launch, torch.device]]:
    """The process group of this job, if it has more than one rank."""
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device {device}", expected="cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device", remedy="pass --device cpu")
    here = launch.detect()
    where = launch.local_device(here, device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS's sums differ from run to run
    torch.set_num_threads(1)  # the models are small: a second thread costs more than it does, and sums in another order
    if here.world_size > 1:
        launch.init_process_group(here, device=where)
    try:
        yield here, where
    finally:
        if here.world_size > 1:
            dist.destroy_process_group()


def folder_for(out: Path, here: Launch, content: dict[str, Any], resume: bool) -> None:
    """Rank 0 makes the run's folder, or refuses one that holds another run; its verdict is every rank's."""
    problem = [""]
    if here.rank == 0:
        path, now = out / "config.json", json.loads(json.dumps(content))
        try:
            if path.exists() and not resume:
                problem = [f"{out} holds a run already; to mend it: pass another --out, or --resume (train only)"]
            elif path.exists() and json.loads(path.read_text()) != now:
                problem = [f"{out} holds a run of another configuration; to mend it: pass another --out"]
            elif not path.exists() and out.exists() and any(out.iterdir()):
                problem = [f"{out} holds other files; to mend it: pass another --out"]
            else:
                out.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(now, indent=2) + "\n")
        except (OSError, ValueError) as error:
            problem = [f"cannot use the folder {out} ({error}); to mend it: pass another --out"]
    if here.world_size > 1:
        dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise UserError(problem[0])


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
    return app(args=argv, prog_name="undertow workloads", standalone_mode=False) or 0
