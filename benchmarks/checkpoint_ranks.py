"""Checkpoints of FSDP2 training on the GPUs of one host: what they cost the slowest rank, at every step or every k-th.

Each arm trains the same model for a few steps, with its saves, and all ranks wait for the slowest. A case is one model
and one place: host memory that outlives the processes, at every step; the same with a copy in the next rank's memory,
at every step at which the last copy has arrived (on one host, by TCP on the loopback: a machine's network is another);
or the disk, at every 8th step, ours with fsync, checksums and a commit that all ranks agree on, beside torch's own
`dcp.async_save` without these. `saves` is how many of a sample were committed. Before anything is timed, what each arm
saved is read back (by stock `dcp.load`, from partners by our own) and compared bit by bit, on every rank.

    torchrun --nproc-per-node 2 -m undertow bench checkpoint_ranks --minutes 6

Without GPUs it trains a tiny model over gloo, to see that it works. UNDERTOW_BENCH_DIR names the disk's folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard

from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Measured, Trial
from undertow.benchmarks.checkpoint_job import LARGE, MEDIUM, Loop, Size
from undertow.benchmarks.checkpoint_phases import TINY
from undertow.checkpointing import Checkpointer, Partner
from undertow.dist.errors import UserError
from undertow.examples.lm import ByteLM

# Of one sample; a save to disk at the first of them. Few where every step saves: the speed of the machine drifts within
# seconds, and many short samples in turns tell arms apart that few long ones do not.
STEPS = {"host": 6, "partner": 16, "disk": 8}


class Sharded(Loop):
    """One FSDP2 training job on this rank; `folder` is the same on all ranks."""

    def __init__(self, size: Size, device: torch.device, folder: Path) -> None:
        torch.manual_seed(0)
        self.device, self.folder = device, folder
        with device:
            self.model = ByteLM(size.model)
        for layer in self.model.blocks:
            fully_shard(layer)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        torch.manual_seed(1 + dist.get_rank())
        self.tokens = torch.randint(0, 256, (size.batch, size.length + 1), device=device)
        self.closing = contextlib.ExitStack()
        self.train()

    def state(self) -> dict[str, Any]:
        """As dcp keeps it: sharded, by names."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}


class Ours:
    """`Checkpointer` on the host tier, on that with partners, or on the disk."""

    def __init__(self, job: Sharded, place: str) -> None:
        self.host, self.partner = place != "disk", place == "partner"
        options: dict[str, Any] = {"keep": 1, "host_every": int(self.host)}
        if self.partner:  # nothing is flushed to a disk: two generations do
            options |= {"partner": Partner(across_hosts=False), "host_generations": 2}
        self.ckpt = job.closing.enter_context(
            Checkpointer(job.folder / place, model=job.model, optimizer=job.optimizer, **options)
        )
        self.job = job

    def save(self) -> None:
        self.ckpt.save(self.job.step, disk=not self.host, host=self.host)

    def drain(self) -> None:
        self.ckpt.wait()
        if self.ckpt.failures:
            raise RuntimeError(self.ckpt.reports[-1].reason)

    @property
    def saves(self) -> int:
        return len(self.ckpt.reports)

    def read(self, found: dict[str, torch.Tensor]) -> None:
        if not self.partner:
            dcp.load(found, checkpoint_id=self.path())
            return
        self.ckpt.restore()
        for name, value in _named(self.job).items():
            found[name].copy_(value)

    def path(self) -> Path:
        host = self.ckpt.host
        folder = host.folder if self.host and host is not None else self.ckpt.folder
        return folder.final(folder.committed()[-1])


class Dcp:
    """torch's asynchronous save, its pinned stager kept from save to save."""

    def __init__(self, job: Sharded, name: str) -> None:
        self.job, self.folder, self.count = job, job.folder / name, 0
        self.future: Any = None
        self.group: Any = dist.new_group(backend="gloo")

    def save(self) -> None:
        self.drain()
        if self.count and dist.get_rank() == 0:
            shutil.rmtree(self.path())
        self.count += 1
        self.future = dcp.async_save(self.job.state(), checkpoint_id=self.path(), process_group=self.group)

    def drain(self) -> None:
        if self.future is not None:
            self.future.result()
        self.future = None

    @property
    def saves(self) -> int:
        return self.count

    def read(self, found: dict[str, torch.Tensor]) -> None:
        dcp.load(found, checkpoint_id=self.path())

    def path(self) -> Path:
        return self.folder / str(self.count)


def wrong(job: Sharded, way: Any) -> int:
    """Tensors of one save that are read back differently, of all ranks."""
    kept = {name: value.detach().clone() for name, value in _named(job).items()}
    way.save()
    job.train()  # the state moves on while the copies leave
    way.drain()
    found = {name: torch.zeros_like(value) for name, value in kept.items()}
    way.read(found)
    differ = sum(not torch.equal(_local(found[name]), _local(value)) for name, value in kept.items())
    cell = torch.tensor([differ], device=job.device)
    dist.all_reduce(cell)
    return int(cell)


def _named(job: Sharded) -> dict[str, torch.Tensor]:
    """The sharded tensors by the names that all arms' files hold."""
    return {f"model.{name}": value for name, value in job.state()["model"].items()}


def _local(value: Any) -> torch.Tensor:
    return value.to_local() if hasattr(value, "to_local") else value


def sample(job: Sharded, way: Any, host: bool, steps: int) -> Measured:
    job.synchronize()
    dist.barrier()
    before = 0 if way is None else way.saves
    began_s = time.perf_counter()
    for index in range(steps):
        if way is not None and (host or index == 0):
            way.save()
        job.train()
    job.synchronize()
    seconds = time.perf_counter() - began_s
    if way is not None:
        way.drain()
    durable_s = time.perf_counter() - began_s
    saves = 0 if way is None else way.saves - before
    return Measured(0, seconds, {"step_ms": 1e3 * seconds / steps, "all_saved_s": durable_s, "saves": float(saves)})


OURS = {
    "host": "undertow host, every step",
    "partner": "undertow host and partner, as often as copies arrive",
    "disk": f"undertow disk, every {STEPS['disk']}",
}
_open: list[Sharded] = []


def trial(size: Size, place: str, device: torch.device) -> Trial:
    while _open:
        _close(_open.pop())
    base = os.environ.get("UNDERTOW_BENCH_DIR") or None
    made = [tempfile.mkdtemp(prefix="undertow-bench-", dir=base) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made, 0)
    job = Sharded(size, device, Path(str(made[0])))
    _open.append(job)
    host, steps = place != "disk", STEPS[place]
    ways: dict[str, Any] = {"no checkpoints": None, OURS[place]: Ours(job, place)}
    if not host:
        ways[f"dcp.async_save, every {steps}"] = Dcp(job, "dcp")
    checks = {name: wrong(job, way) if way is not None else 0 for name, way in ways.items()}

    def arm(name: str, way: Any) -> Arm:
        run: Callable[[], Measured] = partial(sample, job, way, host, steps)
        return Arm(name, run, reference=lambda: checks[name])

    return Trial([arm(name, way) for name, way in ways.items()], reference=lambda: 0)


def _close(job: Sharded) -> None:
    job.closing.close()
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(job.folder, ignore_errors=True)


def cases(context: Context) -> Sequence[Case]:
    if context.world_size < 2:
        raise UserError(
            "this benchmark needs several ranks",
            remedy="torchrun --nproc-per-node 2 -m undertow bench checkpoint_ranks",
        )
    cuda = torch.cuda.is_available()
    sizes = [MEDIUM, LARGE] if cuda else [TINY]
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return [
        Case(f"{size.name}, {place}", partial(trial, size, place, device), "no checkpoints", OURS[place], warm_ups=1)
        for size in (sizes[:1] if context.quick else sizes)
        for place in OURS
    ]


BENCHMARK = Benchmark(
    name="checkpoint_ranks",
    claim="FSDP2 training with a save to host memory at every step takes at most 3 % longer",
    cases=cases,
    rounds=8,
    packages=("torch",),
    x_label="",
)

if __name__ == "__main__":
    from undertow.benchmarks.cli import main

    sys.exit(main(["checkpoint_ranks", *sys.argv[1:]]))
