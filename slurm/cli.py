"""`undertow slurm`: print a ready sbatch file and say what it chose; check a node."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..dist.command_line import application, run_application
from ..dist.units import parse_bytes, parse_seconds
from .request import TEMPLATES, Request

app = application()


def main(argv: list[str]) -> int:
    """Run the command line; the exit code."""
    return run_application(app, argv, "undertow slurm")


@app.callback()
def slurm() -> None:
    """Slurm: templates that save, requeue and resume, and the check of a node."""


@app.command(context_settings={"allow_interspersed_args": True})
def render(
    template: Annotated[str, typer.Argument(help="; ".join(f"{name}: {text}" for name, text in TEMPLATES.items()))],
    command: Annotated[
        list[str] | None, typer.Argument(help="after --: what a rank runs; default: -m undertow train")
    ] = None,
    nodes: Annotated[int, typer.Option(help="nodes")] = 1,
    min_nodes: Annotated[int, typer.Option(help="torchrun: go on with as few as these; 0: all are needed")] = 0,
    tasks_per_node: Annotated[int, typer.Option(help="ranks per node; 0: one per GPU, or one")] = 0,
    cpus_per_task: Annotated[int, typer.Option(help="CPUs per rank")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs per node")] = 0,
    time: Annotated[str, typer.Option(help="time limit, such as 30min or 24h")] = "24h",
    signal_before: Annotated[str, typer.Option(help="how long before the limit the ranks are told to save")] = "120s",
    job_name: Annotated[str, typer.Option(help="the job's name")] = "undertow",
    run_dir: Annotated[str, typer.Option(help="the run's folder; %x is the job's name")] = "runs/%x",
    log_dir: Annotated[str, typer.Option(help="logs per rank (default RUN_DIR-logs)")] = "",
    partition: Annotated[str, typer.Option(help="partition(s)")] = "",
    account: Annotated[str, typer.Option(help="account")] = "",
    interface: Annotated[str, typer.Option(help="network interface of NCCL and gloo")] = "",
    mpi: Annotated[
        str, typer.Option(help="mpi: srun --mpi=THIS starts the ranks (pmix: Open MPI, pmi2: MPICH), not mpirun")
    ] = "",
    max_restarts: Annotated[int, typer.Option(help="restarts within one start of the job")] = 3,
    max_requeues: Annotated[int, typer.Option(help="times the job may go back into the queue")] = 20,
    min_disk: Annotated[str, typer.Option(help="room that the run's folder must have")] = "1GiB",
    python: Annotated[str, typer.Option(help="the interpreter on the nodes")] = "python",
    setup: Annotated[list[str] | None, typer.Option(help="a shell line to run first; may be repeated")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help="another #SBATCH option; may be repeated")] = None,
    case: Annotated[list[str] | None, typer.Option(help="array: arguments of `undertow bench`; repeated")] = None,
    output: Annotated[Path | None, typer.Option(help="write the file here instead of printing it")] = None,
) -> None:
    """Print a ready sbatch file; what was chosen is said on stderr."""
    from .render import explain
    from .render import render as fill

    request = Request(
        template=template,
        nodes=nodes,
        min_nodes=min_nodes,
        tasks_per_node=tasks_per_node or max(1, gpus_per_node if template != "array" else 1),
        cpus_per_task=cpus_per_task,
        gpus_per_node=gpus_per_node,
        time_s=round(parse_seconds(time, name="--time")),
        signal_before_s=round(parse_seconds(signal_before, name="--signal-before")),
        job_name=job_name,
        run_dir=run_dir,
        log_dir=log_dir,
        partition=partition,
        account=account,
        interface=interface,
        mpi=mpi,
        max_restarts=max_restarts,
        max_requeues=max_requeues,
        min_disk=min_disk,
        python=python,
        setup=tuple(setup or ()),
        directives=tuple(sbatch or ()),
        command=tuple(command or ()),
        cases=tuple(case or ()),
    )
    text = fill(request)
    if output:
        output.write_text(text)
    else:
        sys.stdout.write(text)
    for line in explain(request):
        sys.stderr.write(f"undertow slurm: {line}\n")


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="the run's folder")],
    gpus: Annotated[int, typer.Option(help="CUDA devices that must work", min=0)] = 0,
    disk: Annotated[str, typer.Option(help="room that the folder must have")] = "1GiB",
) -> None:
    """Say whether this node is fit to train; exit code 1 when it is not."""
    from .check import faults, node_name

    found = faults(folder, gpus=gpus, disk_bytes=parse_bytes(disk, name="--disk"))
    for fault in found:
        sys.stderr.write(f"node {node_name()}: {fault}\n")
    if found:
        raise typer.Exit(1)
    sys.stdout.write(f"node {node_name()}: fit\n")
