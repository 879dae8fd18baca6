"""What a job asks of Slurm, as one frozen value that checks itself, so that a bad option is found before the queue.

The decisions a reader could not guess: a step's CPUs are counted per rank and multiplied where one task holds several
ranks (torchrun), and the signal comes early enough for the ranks' grace time and the file system's.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..dist.errors import UserError
from ..dist.units import format_seconds, parse_bytes

TEMPLATES = {
    "torchrun": "one torchrun per node, which restarts its workers; elastic with --min-nodes",
    "srun": "one task per rank, no torchrun",
    "mpi": "an MPI program under mpirun, or srun with --mpi; with the datatype preload",
    "array": "one benchmark per array task",
}
WORD = re.compile(r"[A-Za-z0-9._+:/%=-]+")
NAME = re.compile(r"[A-Za-z0-9._+-]+")


@dataclass(frozen=True)
class Request:
    """One job. Times in seconds; `command` is what each rank runs, without the interpreter (torchrun, srun) or with
    the program (mpi); `cases` are the lines of an array. `mpi`: srun starts the
    ranks by this of its plugins, not mpirun. `directives` are further #SBATCH options, such as
    'constraint=h100'. Raises `UserError` for what Slurm would refuse or silently bend."""

    template: str
    nodes: int = 1
    min_nodes: int = 0
    tasks_per_node: int = 1
    cpus_per_task: int = 1
    gpus_per_node: int = 0
    time_s: int = 24 * 3600
    signal_before_s: int = 120
    job_name: str = "undertow"
    run_dir: str = "runs/%x"
    log_dir: str = ""
    partition: str = ""
    account: str = ""
    interface: str = ""
    mpi: str = ""
    max_restarts: int = 3
    max_requeues: int = 20
    min_disk: str = "1GiB"
    python: str = "python"
    setup: tuple[str, ...] = ()
    directives: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise UserError(f"no template is called '{self.template}'", expected=f"one of {', '.join(TEMPLATES)}")
        for option in ("nodes", "tasks_per_node", "cpus_per_task", "time_s", "signal_before_s"):
            if getattr(self, option) < 1:
                raise UserError(f"{_dashed(option)} is {getattr(self, option)}", expected="at least 1")
        for option in ("gpus_per_node", "max_restarts", "max_requeues", "min_nodes"):
            if getattr(self, option) < 0:
                raise UserError(f"{_dashed(option)} is {getattr(self, option)}", expected="0 or more")
        self._check_time()
        self._check_template()
        for option in ("job_name", "partition", "account", "interface", "mpi"):
            value, optional = getattr(self, option), option != "job_name"
            if not (NAME.fullmatch(value) or (optional and not value)) and option != "partition":
                raise UserError(f"{_dashed(option)} is '{value}'", expected="letters, digits and . _ + -")
        if self.partition and not re.fullmatch(r"[A-Za-z0-9._+,-]+", self.partition):
            raise UserError(f"--partition is '{self.partition}'", expected="names of partitions, joined by commas")
        for option in ("run_dir", "log_dir"):
            if not WORD.fullmatch(getattr(self, option) or "x"):
                raise UserError(f"{_dashed(option)} is '{getattr(self, option)}'", expected="a path without spaces")
        for line in self.directives:
            if not re.fullmatch(r"[a-z][a-z0-9-]*(=\S+)?", line):
                raise UserError(f"--sbatch '{line}'", expected="a long option of sbatch, such as constraint=h100")
        parse_bytes(self.min_disk, name="--min-disk")

    def _check_time(self) -> None:
        if self.time_s < 60:
            raise UserError(f"--time is {format_seconds(self.time_s)}", expected="a minute or more: Slurm counts those")
        if self.signal_before_s >= self.time_s:
            raise UserError(
                f"the signal would come {format_seconds(self.signal_before_s)} before the end of a job of "
                f"{format_seconds(self.time_s)}",
                expected="--signal-before shorter than --time",
            )

    def _check_template(self) -> None:
        if self.min_nodes > self.nodes:
            raise UserError(f"--min-nodes {self.min_nodes} of --nodes {self.nodes}", expected="no more than --nodes")
        if self.min_nodes and self.template != "torchrun":
            raise UserError(f"--min-nodes with {self.template}", remedy="only torchrun is elastic; leave it out")
        if 0 < self.gpus_per_node < self.tasks_per_node and self.template != "array":
            raise UserError(
                f"{self.tasks_per_node} ranks on {self.gpus_per_node} GPUs of a node",
                expected="at most one rank per GPU",
                remedy=f"--tasks-per-node {self.gpus_per_node}, or --gpus-per-node 0",
            )
        if (self.template == "array") != bool(self.cases):
            raise UserError(
                "an array needs cases" if self.template == "array" else f"cases for the template {self.template}",
                expected="--case for the template array, once per task, and only there",
                remedy="--case 'checksum --quick' --case 'schedules --quick'",
            )
        if self.template == "array" and (self.nodes > 1 or self.command):
            raise UserError("an array task is one benchmark on one node", remedy="leave out --nodes and the command")
        if self.mpi and self.template != "mpi":
            raise UserError(
                f"--mpi {self.mpi} with {self.template}", remedy="only the template mpi has it; leave it out"
            )
        if self.template == "mpi" and not self.command:
            raise UserError("no program for mpirun", remedy="undertow slurm render mpi --nodes 2 -- ./app ARGUMENTS")

    @property
    def ntasks(self) -> int:
        return self.nodes * self.tasks_per_node

    @property
    def cpus_of_a_task(self) -> int:
        """As Slurm counts: torchrun's task holds all ranks of its node."""
        return self.cpus_per_task * (self.tasks_per_node if self.template == "torchrun" else 1)

    @property
    def minutes(self) -> int:
        return math.ceil(self.time_s / 60)


def _dashed(option: str) -> str:
    return "--" + option.removesuffix("_s").replace("_", "-")
