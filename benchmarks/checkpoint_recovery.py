"""Lose the processes, then one rank's memory, then all GPUs but one: where sharded training goes on, and how soon.

    python -m undertow.benchmarks.checkpoint_recovery --ranks 2 --result recovery.json

FSDP2 training, started by torchrun, saves to host memory at every step and to disk at one, waits for each save, and is
killed (SIGKILL) two steps after that to disk. Then it is started again three times: as it was; with the memory of the
last rank taken away; and on one rank, which must put together what all had. A second run is killed alike that keeps
partner copies of every step and no disk, each rank in a folder of its own as if it had a machine; it is started once,
after the last rank's memory was taken away, and goes on from the step in memory. Each start restores, compares model
and optimizer state bit by bit with what the killed run had at that step, and reports what `restore` took on the slowest
rank. Exit code 1 when a start goes on from another step than it should, or a bit differs.

All launches are made at once and import torch beside each other; each waits for its turn before it touches a GPU, and
what it takes then is printed as it ends (`whole`).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
import xxhash
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from undertow.benchmarks.checkpoint_job import LARGE, MEDIUM, Size
from undertow.benchmarks.checkpoint_phases import TINY
from undertow.benchmarks.checkpoint_sharded import Sharded
from undertow.checkpointing import Checkpointer, Partner, host_tier
from undertow.dist.errors import UndertowError, UserError
from undertow.dist.launch import detect, init_process_group, local_device
from undertow.dist.log import get_logger

log = get_logger(__name__)
SIZES = {size.name: size for size in (TINY, MEDIUM, LARGE)}
FIRST, ON_DISK, LAST = 3, 4, 6  # the steps of the killed run, and the one that is saved to disk
TURN_S = 900.0  # how long a launch waits for its turn
MODULE = "undertow.benchmarks.checkpoint_recovery"
LOST = {
    "processes": "all processes",
    "memory": "and one rank's memory",
    "gpus": "and all GPUs but one",
    "partner": "one rank's memory, with partner copies",
}


@dataclass(frozen=True)
class Start:
    """One start after the kill: what was lost before it, and what came of it."""

    lost: str
    ranks: int
    expected: int
    resumed: int | None
    restore_s: float
    identical: bool
    whole_s: float  # from its turn to its end, all but Python's start

    @property
    def good(self) -> bool:
        return self.identical and self.resumed == self.expected


def digest(job: Sharded) -> str:
    """Of model and optimizer state by whole tensors: the same for any number of ranks. Collective.

    Every 32-bit word counts with an odd weight that its position gives, modulo 2^64; the sums over the parts that ranks
    hold are added, so that no tensor has to be put together.
    """
    model, optimizer = get_state_dict(job.model, job.optimizer)
    named = sorted(_tensors({"model": model, "optimizer": optimizer}).items())
    sums = torch.stack([_weighed(value, job.device) for _, value in named])
    dist.all_reduce(sums)
    found = xxhash.xxh3_128()
    for (name, value), weight in zip(named, sums.tolist()):
        found.update(f"{name} {tuple(value.shape)} {weight}".encode())
    return found.hexdigest()


def _weighed(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """This rank's part of a tensor's sum; of one that all ranks have, rank 0's."""
    begin, part = 0, value.detach()
    if isinstance(value, DTensor):
        if value.placements != (Shard(0),):
            raise UserError(f"a tensor is placed as {value.placements}", expected="FSDP2's shards of rows")
        rows = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)[1][0]
        begin, part = rows * (value.numel() // max(1, len(value))), value.to_local()
    elif dist.get_rank():
        return torch.zeros((), dtype=torch.int64, device=device)
    words = part.reshape(-1).view(torch.int32)
    weights = torch.arange(begin, begin + len(words), device=words.device).mul_(0x9E3779B97F4A7C1).mul_(2).add_(1)
    return weights.mul_(words).sum().to(device)


def _tensors(tree: object, prefix: str = "") -> dict[str, torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {name: value for key, part in parts for name, value in _tensors(part, f"{prefix}.{key}").items()}


def train(job: Sharded, ckpt: Checkpointer, folder: Path) -> None:
    """Until the last step is in host memory; then wait to be killed."""
    digests = {}
    for step in range(FIRST, LAST + 1):
        digests[step] = digest(job)
        ckpt.step(step)
        job.train()
        ckpt.wait()  # or steps would be left out of memory while the disk reads it, or a copy is sent
    if ckpt.failures or ckpt.host is None:
        raise UndertowError(f"rank {dist.get_rank()}: a save failed: {ckpt.reports}")
    in_memory = max(report.step for report in ckpt.reports if report.ok and report.tier == ckpt.host.tier)
    mine = {"pid": os.getpid(), "digests": digests, "memory": str(ckpt.host.folder.root), "in_memory": in_memory}
    written = folder / f"rank-{dist.get_rank()}.part"
    written.write_text(json.dumps(mine))
    written.rename(written.with_suffix(".json"))
    signal.pause()


def restart(job: Sharded, ckpt: Checkpointer, folder: Path) -> None:
    """Restore and say from where, how soon and what."""
    job.synchronize()
    dist.barrier()
    began_s = time.perf_counter()
    step = ckpt.restore()
    job.synchronize()
    took = torch.tensor([time.perf_counter() - began_s])
    dist.all_reduce(took, dist.ReduceOp.MAX)
    mine = {"step": step, "restore_s": float(took), "digest": digest(job)}
    job.train()
    if dist.get_rank() == 0:
        (folder / "restart.json").write_text(json.dumps(mine))


def work(folder: Path, size: Size, act: str, partners: bool) -> None:
    """One rank of a launch, when its turn has come."""
    until_s = time.monotonic() + TURN_S
    while not turn(folder, act).exists():
        if time.monotonic() > until_s or not folder.exists():
            raise UndertowError(f"nobody has called for '{act}' in {folder}")
        time.sleep(0.02)
    launch = detect()
    device = local_device(launch)
    init_process_group(launch, device=device)
    job = Sharded(size, device, folder)
    partner = None
    if partners:  # a folder of its own for each rank, as if each had a machine
        memory = Path(host_tier.SHARED_MEMORY) / f"undertow-bench-{folder.name}-{launch.rank}"
        memory.mkdir(exist_ok=True)
        partner = Partner(host=f"machine-{launch.rank}", memory=memory, across_hosts=launch.world_size > 1)
    options = {"every": 0 if partners else ON_DISK, "host_every": 1, "partner": partner, "host_generations": 2}
    ckpt = Checkpointer(folder / "run", model=job.model, optimizer=job.optimizer, **options)
    try:
        (train if act == "train" else restart)(job, ckpt, folder)
    finally:
        ckpt.close()
        dist.destroy_process_group()


def turn(folder: Path, act: str) -> Path:
    """The file that lets a launch begin."""
    return folder / f"{act}.turn"


class Torchrun:
    """A launch of this program, its output in `log`. `act`: "train", or what is started again after a kill."""

    def __init__(self, act: str, ranks: int, folder: Path, size: str, partners: bool) -> None:
        self.log = folder / f"{act}-{ranks}.log"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                [
                    *command,
                    "-m",
                    MODULE,
                    "--act",
                    act,
                    "--folder",
                    str(folder),
                    "--size",
                    size,
                    *["--partners"][:partners],
                ],
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def wait(self, timeout_s: float) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise UndertowError(f"{self.log.name} did not end within {timeout_s:g} s:\n{self.tail()}") from None

    def tail(self) -> str:
        return self.log.read_text()[-3000:]

    def stop(self) -> None:
        """Ends it and, as torchrun does upon SIGTERM, its ranks."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)


def killed_run(run: Torchrun, ranks: int, folder: Path, timeout_s: float) -> list[dict]:
    """Let `run` train, and kill every rank; what each had written down."""
    turn(folder, "train").touch()
    paths, end_s = [folder / f"rank-{rank}.json" for rank in range(ranks)], time.monotonic() + timeout_s
    while not all(path.exists() for path in paths):
        if run.process.poll() is not None or time.monotonic() > end_s:
            raise UndertowError(f"the run to be killed did not come to step {LAST}:\n{run.tail()}")
        time.sleep(0.05)
    told = [json.loads(path.read_text()) for path in paths]
    for rank in told:
        os.kill(rank["pid"], signal.SIGKILL)
    run.wait(timeout_s)
    return told


def started_again(run: Torchrun, act: str, ranks: int, told: Sequence[dict], expected: int, folder: Path) -> Start:
    """Let `run` restore, and read what it has found."""
    log.info("lost: %s; %d rank(s) go on", LOST[act], ranks)
    began_s = time.monotonic()
    turn(folder, act).touch()
    if run.wait(300):
        raise UndertowError(f"the start on {ranks} rank(s) failed:\n{run.tail()}")
    found = json.loads((folder / "restart.json").read_text())
    same = found["digest"] == told[0]["digests"].get(str(found["step"]))
    return Start(LOST[act], ranks, expected, found["step"], found["restore_s"], same, time.monotonic() - began_s)


def recover(ranks: int, folder: Path, size: str, timeout_s: float = 300.0) -> list[Start]:
    """The kill and the three starts, then the kill and the one start with partners."""
    plan = {
        False: {"train": ranks, "processes": ranks, "memory": ranks, "gpus": 1},
        True: {"train": ranks, "partner": ranks},
    }
    made = {partners: folder / f"run-{int(partners)}-{os.getpid()}" for partners in plan}
    runs: dict[bool, dict[str, Torchrun]] = {}
    found = []
    try:
        for partners, acts in plan.items():
            made[partners].mkdir()
            runs[partners] = {act: Torchrun(act, n, made[partners], size, partners) for act, n in acts.items()}
        for partners in plan:
            log.info("training %s parameters on %d ranks, to be killed at step %d", size, ranks, LAST)
            found += _recover(runs[partners], ranks, made[partners], timeout_s)
    finally:
        for run in (run for started in runs.values() for run in started.values()):
            run.stop()
        for rank in range(ranks):
            shutil.rmtree(host_tier.SHARED_MEMORY / f"undertow-bench-{made[True].name}-{rank}", ignore_errors=True)
    return found


def _recover(runs: dict[str, Torchrun], ranks: int, folder: Path, timeout_s: float) -> list[Start]:
    told = killed_run(runs["train"], ranks, folder, timeout_s)
    memories, newest = [Path(rank["memory"]) for rank in told], told[0]["in_memory"]

    def start(act: str, count: int, expected: int) -> Start:
        return started_again(runs[act], act, count, told, expected, folder)

    try:
        if "partner" in runs:
            shutil.rmtree(memories[-1])
            return [start("partner", ranks, newest)]
        found = [start("processes", ranks, newest)]
        for shard in memories[0].glob(f"*/__{ranks - 1}_*"):
            shard.unlink()
        found.append(start("memory", ranks, ON_DISK))
        shutil.rmtree(memories[0], ignore_errors=True)  # the last start may have freed it
        found.append(start("gpus", 1, ON_DISK))
        return found
    finally:
        for memory in memories:
            shutil.rmtree(memory, ignore_errors=True)


def main(
    ranks: Annotated[int, typer.Option(help="Ranks, one GPU each where there are any.")] = 2,
    size: Annotated[str, typer.Option(help=f"The model: {', '.join(SIZES)}.")] = "",
    result: Annotated[Path | None, typer.Option(help="Write the rows as JSON here.")] = None,
    act: Annotated[str, typer.Option(hidden=True)] = "",
    folder: Annotated[Path | None, typer.Option(help="A folder on the disk to measure; emptied at the end.")] = None,
    partners: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Kill sharded training, take memory and GPUs away, and start it again."""
    size = size or (LARGE if torch.cuda.is_available() else TINY).name
    if size not in SIZES or ranks < 2:
        raise UserError(f"--size '{size}' --ranks {ranks}", expected=f"2 ranks or more, one of {', '.join(SIZES)}")
    if act:
        assert folder is not None
        work(folder, SIZES[size], act, partners)
        return
    with tempfile.TemporaryDirectory(prefix="undertow-recovery-", dir=folder) as made:
        rows = recover(ranks, Path(made), size)
    from rich.console import Console
    from rich.table import Table

    from undertow.benchmarks.facts import facts

    table = Table(title=f"{size} parameters, FSDP2 on {ranks} ranks, killed at step {LAST}", title_justify="left")
    for name in ("lost", "ranks", "goes on from", "should", "restore", "bit-identical", "whole"):
        table.add_column(name)
    for row in rows:
        cells = [str(row.ranks), str(row.resumed), str(row.expected), f"{row.restore_s:.2f} s"]
        table.add_row(row.lost, *cells, "yes" if row.identical else "NO", f"{row.whole_s:.1f} s")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if result is not None:
        text = {"facts": facts(()), "size": size, "ranks": ranks, "rows": [asdict(row) for row in rows]}
        result.write_text(json.dumps(text, indent=1) + "\n")
    if not all(row.good for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
