"""Checkpoints of FSDP2 training on the GPUs of one host: what they cost the slowest rank, at every step or every k-th.

Each arm trains the same model for a few steps, with its saves, and all ranks wait for the slowest. A case is one model
and one place. Host memory that outlives the processes: at every step, and on GPUs once more with a share of the state
parked there (`device_bytes`). The same with a copy in the next rank's memory, at every step at which the last copy has
arrived (on one host, by TCP on the loopback: a machine's network is another). The disk: at every 8th step, ours with
fsync, checksums and a commit that all ranks agree on, beside torch's own `dcp.async_save` without these. `saves` is how
many of a sample were committed, `call_ms` and `fence_ms` what a save took of the training thread, on the rank where it
took most; on rank 0, `gpu_copy_ms` is how long the device copied, `gpu_wait_ms` how long training waited for it there,
and `lead_ms` how far the processor was ahead then. Before anything is timed, what each arm saved is read back (by stock
`dcp.load`, from partners by our own) and compared bit by bit, on every rank.

Every rank has its own cores, and AdamW is fused, as trainers of FSDP2 have it, so that the GPU and not the processor
sets the pace; `twice the batch` sees to it. `AdamW not fused` is torch's default, which is the processor's pace: there
all that Python does for a save shows. With `--machine` the cost model's stall stands beside: the time of a step until
the optimizer's first write (`predicted_window_ms`) is measured before, without saves, and the copy has to fit into it.

    torchrun --nproc-per-node 2 -m undertow bench checkpoint_ranks --minutes 6

Without GPUs it trains a tiny model over gloo, to see that it works. UNDERTOW_BENCH_DIR names the disk's folder.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Measured, Trial
from undertow.benchmarks.checkpoint_job import LARGE, MEDIUM, Size
from undertow.benchmarks.checkpoint_phases import TINY, GpuClock
from undertow.benchmarks.checkpoint_sharded import Sharded, bind_cores, local
from undertow.checkpointing import Checkpointer, Partner
from undertow.checkpointing.cost import Prediction, predict
from undertow.dist.errors import UserError
from undertow.dist.machine import Machine

# Of one sample; a save to disk at the first of them. Few where every step saves: the speed of the machine drifts within
# seconds, and many short samples in turns tell arms apart that few long ones do not.
STEPS = {"host": 6, "partner": 16, "disk": 8}


class Ours:
    """`Checkpointer` on the host tier, on that with partners, or on the disk; `parked`: a share of the rank's state."""

    def __init__(self, job: Sharded, place: str, *, parked: float = 0.0) -> None:
        self.host, self.partner = place != "disk", place == "partner"
        options: dict[str, Any] = {"keep": 1, "host_every": int(self.host)}
        options["device_bytes"] = int(parked * job.state_bytes)
        if self.partner:  # nothing is flushed to a disk: two generations do
            options |= {"partner": Partner(across_hosts=False), "host_generations": 2}
        self.ckpt = job.closing.enter_context(
            Checkpointer(job.folder / f"{place}-{parked}", model=job.model, optimizer=job.optimizer, **options)
        )
        self.job, self.gpu = job, GpuClock(job.device)

    def watch(self) -> None:
        """From now on note when the device copies, and when training waits for that. A save has been made."""
        copier: Any = self.ckpt._live.copier
        begin, order_after = copier.begin, copier.order_after
        stream = getattr(copier, "stream", None)

        def begun() -> None:
            begin()
            self.gpu.copies_begin(stream)

        copier.begin = begun
        copier.order_after = lambda mark: self.gpu.around_wait(stream, partial(order_after, mark))

    def save(self) -> None:
        self.ckpt.save(self.job.step, disk=not self.host, host=self.host)

    def drain(self) -> None:
        self.ckpt.wait()
        if self.ckpt.failures:
            raise RuntimeError(self.ckpt.reports[-1].reason)

    @property
    def saves(self) -> int:
        return len(self.ckpt.reports)

    def blocked(self, saves: int) -> dict[str, float]:
        """What the last `saves` took of the training thread, in the call and at the fence; mean, of the rank where it
        is most. Collective."""
        last = self.ckpt.reports[-saves:]
        spent = [sum(getattr(report, name) for report in last) / saves for name in ("call_s", "fence_s")]
        cell = 1e3 * torch.tensor(spent, device=self.job.device)
        dist.all_reduce(cell, dist.ReduceOp.MAX)
        return dict(zip(("call_ms", "fence_ms"), cell.tolist())) | self.gpu.sums()

    def predict(self, machine: Machine, window_s: float) -> Prediction:
        """By the cost model, of the state as the last save found it."""
        live = self.ckpt._live
        ways: dict[str, Any] = {"cuda": live.pinned, "window_s": window_s, "eager_bytes": live.plan.image.eager_bytes}
        return predict(live.plan.image.size, machine, ranks_per_disk=dist.get_world_size(), **ways)

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
    differ = sum(not torch.equal(local(found[name]), local(value)) for name, value in kept.items())
    cell = torch.tensor([differ], device=job.device)
    dist.all_reduce(cell)
    return int(cell)


def _named(job: Sharded) -> dict[str, torch.Tensor]:
    """The sharded tensors by the names that all arms' files hold."""
    return {f"model.{name}": value for name, value in job.state()["model"].items()}


def sample(job: Sharded, way: Any, host: bool, steps: int) -> Measured:
    job.synchronize()
    if isinstance(way, Ours):
        way.gpu.reset()
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
    extras = {"step_ms": 1e3 * seconds / steps, "all_saved_s": durable_s, "saves": float(saves)}
    if isinstance(way, Ours) and saves:
        extras |= way.blocked(saves)
    return Measured(0, seconds, extras)


PARKED = 0.4  # of a rank's state
OURS = {
    "host": "undertow host, every step",
    "partner": "undertow host and partner, as often as copies arrive",
    "disk": f"undertow disk, every {STEPS['disk']}",
}
_open: list[Sharded] = []


def trial(size: Size, place: str, device: torch.device, machine: Machine | None = None, *, fused: bool = True) -> Trial:
    while _open:
        _close(_open.pop())
    base = os.environ.get("UNDERTOW_BENCH_DIR") or None
    made = [tempfile.mkdtemp(prefix="undertow-bench-", dir=base) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(made, 0)
    job = Sharded(size, device, Path(str(made[0])), fused=fused)
    _open.append(job)
    host, steps = place != "disk", STEPS[place]
    ours = Ours(job, place)
    ways: dict[str, Any] = {"no checkpoints": None, OURS[place]: ours}
    if place == "host" and device.type == "cuda":
        ways[f"{OURS[place]}, {PARKED} parked"] = Ours(job, place, parked=PARKED)
    if not host:
        ways[f"dcp.async_save, every {steps}"] = Dcp(job, "dcp")
    checks = {name: wrong(job, way) if way is not None else 0 for name, way in ways.items()}
    for way in ways.values():
        if isinstance(way, Ours):
            way.watch()
    predicted_s, facts = None, {}
    if machine is not None:
        window_s, step_s = job.pace()
        cost = ours.predict(machine, window_s)
        if cost.stall_s is not None and cost.copy_s is not None:
            predicted_s = steps * step_s + (steps if host else 1) * cost.stall_s
            found = {"window": window_s, "copy": cost.copy_s, "stall": cost.stall_s}
            facts = {f"predicted_{name}_ms": 1e3 * seconds for name, seconds in found.items()}

    def arm(name: str, way: Any) -> Arm:
        run: Callable[[], Measured] = partial(sample, job, way, host, steps)
        known: dict[str, Any] = {"predicted_s": predicted_s, "facts": facts} if way is ours else {}
        return Arm(name, run, reference=lambda: checks[name], **known)

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

    def case(size: Size, place: str, note: str = "", *, fused: bool = True) -> Case:
        def build() -> Trial:
            bind_cores()  # not before the report has counted them
            return trial(size, place, device, context.machine, fused=fused)

        return Case(f"{size.name}, {place}{note}", build, "no checkpoints", OURS[place], warm_ups=1)

    found = [case(size, place) for size in (sizes[:1] if context.quick else sizes) for place in OURS]
    if not context.quick:
        twice = replace(sizes[0], batch=2 * sizes[0].batch)
        found += [case(twice, "host", ", twice the batch"), case(sizes[0], "host", ", AdamW not fused", fused=False)]
    return found


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
