"""`undertow probe`: measure what this machine can do and write it to a Machine file, which all planning reads.

Alone it measures one process and starts ranks of its own for the links; under torchrun, srun or mpirun it measures the
links of that job, and rank 0 measures the rest when the other ranks have gone. With --only, the other numbers of an
existing file stay as they are. What cannot be measured here is left out and named, never guessed.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer

from . import probe_compute, probe_copies, probe_disk, probe_links, probe_report, probe_spawn
from .command_line import application, run_application
from .errors import UserError
from .host import nvidia_smi, read_host
from .launch import detect, init_process_group, local_device
from .log import get_logger
from .machine import Link, Machine
from .measure import Measurement, Skipped
from .progress import Progress
from .units import format_bytes
from .version import __version__

PARTS = ("copies", "disk", "links", "compute")
log = get_logger(__name__)
app = application()


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code."""
    return run_application(app, argv, "undertow probe")


@app.command()
def command(
    output: Annotated[Path | None, typer.Option(help="the Machine file to write", show_default="user cache")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="small sizes, few repeats: a look only")] = False,
    only: Annotated[str, typer.Option(help=f"some of {','.join(PARTS)}", show_default=False)] = ",".join(PARTS),
    disk_path: Annotated[Path, typer.Option(help="folder on the disk to measure")] = Path(),
    ranks: Annotated[int | None, typer.Option(help="ranks to start for links", show_default="GPUs, or 2")] = None,
    name: Annotated[str, typer.Option(help="name of the machine", show_default="its hardware")] = "",
) -> None:
    """Measure copies, disk, links and arithmetic of this machine and write them to a JSON file."""
    path = output or Machine.default_path()
    parts = _parts(only)
    _check_writable(path, make_folder=output is None)
    former = Machine.load(path) if set(parts) != set(PARTS) and path.exists() else None
    launch = detect()
    device = local_device(launch)
    found, load = Findings(), os.getloadavg()[0]
    if load > len(os.sched_getaffinity(0)) / 2 and launch.rank == 0:
        log.warning("this machine is busy (load average %.1f); the rates will look lower than they are", load)
    if launch.world_size > 1:
        if ranks not in (None, launch.world_size):
            raise UserError(f"--ranks {ranks} under {launch.launcher}, which started {launch.world_size}")
        init_process_group(launch, device=device)
        if "links" in parts:
            found.links.update(probe_links.measure(launch, device, quick=quick))
        dist.barrier()
        dist.destroy_process_group()
        if launch.rank != 0:
            return
    with contextlib.ExitStack() as stack:
        plan: list[Measurement] = []
        if "copies" in parts:
            plan += probe_copies.plan(device, quick)
        if "disk" in parts:
            scratch = stack.enter_context(
                contextlib.closing(probe_disk.ScratchFile(disk_path, probe_disk.scratch_bytes(quick)))
            )
            plan += probe_disk.plan(scratch, quick)
        if "compute" in parts:
            plan += probe_compute.plan(device, quick)
        if "links" in parts and launch.world_size == 1:
            plan += probe_spawn.plan(_ranks(ranks), cuda=torch.cuda.device_count() > 1, quick=quick)
        found.take(plan)
    machine = found.machine(name, _facts(device, load, disk_path if "disk" in parts else None))
    machine = machine if former is None else former.updated(machine)
    machine.dump(path)
    probe_report.show(machine, found.skipped)
    typer.echo(f"written to {path}")


@dataclass
class Findings:
    """What was measured so far, by table of the Machine; `skipped` says why a number is missing."""

    links: dict[str, Link] = field(default_factory=dict)
    copies: dict[str, float] = field(default_factory=dict)
    disks: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def take(self, plan: list[Measurement]) -> None:
        """Measure everything in `plan`, one after another, with a progress bar."""
        with Progress(len(plan), "probe", unit="number") as bar:
            for measurement in plan:
                bar.update(0, now=f"{measurement.table} {measurement.key}")
                try:
                    getattr(self, measurement.table)[measurement.key] = measurement.run()
                except (Skipped, torch.OutOfMemoryError) as reason:
                    self.skipped[f"{measurement.table} {measurement.key}"] = str(reason).splitlines()[0]
                bar.update(1, now=None)

    def machine(self, name: str, facts: dict[str, str]) -> Machine:
        return Machine(name or facts["name"], self.links, self.copies, self.disks, self.flops, facts)


def _parts(only: str) -> list[str]:
    parts = [part.strip() for part in only.split(",") if part.strip()]
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise UserError(f"--only '{only}'", expected=f"some of {','.join(PARTS)}")
    return parts


def _ranks(asked: int | None) -> int:
    devices, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    ranks = max(2, devices) if asked is None else asked
    if ranks < 2:
        raise UserError(f"--ranks {ranks}", expected="2 or more: a link has two ends")
    if ranks > cores:
        log.warning("%d ranks share %d cores: the links will look slower than they are", ranks, cores)
    return ranks


def _check_writable(path: Path, *, make_folder: bool) -> None:
    """Fail before the work rather than after it."""
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create {path.parent} ({error.strerror})", remedy="name a file with --output FILE"
        ) from error
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write {path}", expected="a file in a folder that exists and may be written")


def _facts(device: torch.device, load: float, disk_path: Path | None) -> dict[str, str]:
    host = read_host()
    gpus = sorted({gpu.name for gpu in host.gpus})
    name = f"{len(host.gpus)} × {', '.join(gpus)}" if gpus else f"{host.cpu}, {host.cores} cores"
    facts = {
        "name": name,
        "host": host.name,
        "cpu": host.cpu,
        "cores": str(host.cores),
        "memory": format_bytes(host.memory_bytes),
        "gpus": name if gpus else "none",
        "driver": nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0].strip(),
        "device": str(device),
        "torch": torch.__version__,
        "torch_threads": str(torch.get_num_threads()),
        "cuda": str(torch.version.cuda or ""),
        "float32_matmul": torch.get_float32_matmul_precision(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "undertow": __version__,
        "load_before": f"{load:.1f}",
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if disk_path is not None:
        facts["disk"] = str(disk_path.resolve())
    return {key: value for key, value in facts.items() if value}
