"""`undertow demo`: the promise in five minutes. Train on real text, kill a rank, go on, and lose nothing.

Three runs of the same recipe: one without checkpoints or disturbance; one with checkpoints in which rank 1 is killed
by SIGKILL while a checkpoint is being written; and its continuation. The losses and the final weights of the first and
the last are compared bit for bit.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..dist.command_line import application, run_application
from ..dist.errors import UserError
from ..dist.progress import Progress
from ..dist.trace import trace_path
from ..dist.trace_read import read_attempts
from .kill_and_resume import IN_FLIGHT, Kill, Outcome, compare, finish, kill_inside, start, stop
from .recipes import recipe

ATTEMPTS = 5  # runs that are begun until one is killed inside a checkpoint; small ones can be too quick


def main(argv: list[str]) -> int:
    app = application()
    app.command()(command)
    return run_application(app, argv, "undertow demo")


def command(
    out: Annotated[Path, typer.Option(help="Folder for the runs; an old demo there is replaced.")] = Path("runs/demo"),
    ranks: Annotated[int, typer.Option(help="Processes per run.")] = 2,
    recipe_name: Annotated[str, typer.Option("--recipe", help="The recipe to train.")] = "demo",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
) -> int:
    """Train, kill a rank inside a checkpoint, restart, and show that the runs are bit-identical."""
    config = recipe(recipe_name)
    if out.exists():
        if not (out / ".undertow-demo").exists() and any(out.iterdir()):
            raise UserError(f"{out} holds other files", expected="a new folder or an old demo", remedy="pass --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / ".undertow-demo").touch()
    options = ["--recipe", recipe_name, "--device", device]
    undisturbed, killed = out / "undisturbed", out / "killed"
    console = Console()

    console.print(f"[1/3] {config.steps} steps on {ranks} ranks, without checkpoints")
    _run(undisturbed, ranks, [*options, "--checkpoint-every", "0"], out / "undisturbed.log", config.steps)

    console.print(f"[2/3] the same with checkpoints; rank {min(1, ranks - 1)} is killed while one is being written")
    log = out / "killed.log"
    victim = None
    for _ in range(ATTEMPTS):
        shutil.rmtree(killed, ignore_errors=True)
        if (victim := _run_and_kill(killed, ranks, options, log, config.steps // 2)) is not None:
            break
        console.print("      the run ended before it could be killed inside a checkpoint; once more")
    if victim is None:
        raise UserError(
            f"{ATTEMPTS} runs of recipe {recipe_name} ended before rank {min(1, ranks - 1)} could be killed",
            remedy="a longer recipe, for example --recipe demo",
        )
    console.print(f"      killed rank {victim.rank} in step {victim.step}, inside: {', '.join(victim.inside)}")

    console.print("[3/3] restart with --resume")
    _run(killed, ranks, [*options, "--resume"], log, config.steps)

    outcome = compare(undisturbed, killed)
    _show(console, outcome, killed, undisturbed)
    if (killed / "loss.png").exists():  # drawn where matplotlib is installed
        console.print(f"loss curve: {killed / 'loss.png'}")
    return 0 if outcome.identical else 1


def _run_and_kill(out: Path, ranks: int, options: list[str], log: Path, from_step: int) -> Kill | None:
    """A run whose second rank is killed inside a checkpoint; None if it was too quick for that."""
    process = start(out, ranks, options, log=log)
    try:
        rank = min(1, ranks - 1)
        return kill_inside(process, out, rank=rank, from_step=from_step, inside=IN_FLIGHT, timeout_s=1200)
    finally:
        stop(process)


def _run(out: Path, ranks: int, options: list[str], log: Path, steps: int) -> None:
    """One run to its end, with a bar that follows its metrics."""
    process = start(out, ranks, options, log=log)
    try:
        with Progress(steps, out.name) as bar:
            seen = 0
            while process.poll() is None:
                path = out / "metrics.jsonl"
                now = len(path.read_bytes().splitlines()) if path.exists() else 0
                bar.update(advance=max(0, min(now, steps) - seen))
                seen = max(seen, min(now, steps))
                try:
                    process.wait(0.5)
                except subprocess.TimeoutExpired:
                    continue
        finish(process, log, timeout_s=60)
    finally:
        stop(process)


def _show(console: Console, outcome: Outcome, killed: Path, undisturbed: Path) -> None:
    table = Table(title="killed and resumed against undisturbed")
    table.add_column("compared")
    table.add_column("result")
    losses = "bit-identical" if outcome.first_difference is None else f"differ from step {outcome.first_difference}"
    table.add_row(f"{outcome.losses} losses", losses)
    table.add_row("final weights", "bit-identical" if outcome.weights_equal else "different")
    table.add_row("optimizer state", "bit-identical" if outcome.state_equal else "different")
    stalls = stalls_ms(killed)
    if stalls:
        table.add_row(
            "blocked per checkpoint",
            f"median {statistics.median(stalls):.1f} ms, worst {max(stalls):.1f} ms over {len(stalls)}",
        )
    table.add_row("seconds per step, without checkpoints", f"{step_seconds(undisturbed):.3f}")
    table.add_row("seconds per step, with (as run here)", f"{step_seconds(killed):.3f}")
    console.print(table)


def _spans(run: Path, name: str) -> list[float]:
    """The lengths in ms of rank 0's spans called `name`."""
    lengths = []
    for attempt in read_attempts(trace_path(run / "trace", 0)):
        begun: list[float] = []
        for event in attempt.events:
            if event["name"] == name and event["ph"] == "B":
                begun.append(event["ts"])
            elif event["name"] == name and event["ph"] == "E" and begun:
                lengths.append((event["ts"] - begun.pop()) / 1e3)
    return lengths


def stalls_ms(run: Path) -> list[float]:
    """For each checkpoint of a run, how long training was blocked: in the call and at the fence."""
    calls, fences = _spans(run, "snapshot"), _spans(run, "fence")
    return [call + fence for call, fence in zip(calls, fences)]


def step_seconds(run: Path) -> float:
    """The median time of a step, in seconds."""
    lengths = _spans(run, "step")
    return statistics.median(lengths) / 1e3 if lengths else float("nan")
