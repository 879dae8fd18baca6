"""What a checkpoint costs a training loop: a GPT with fp32 AdamW, the same steps with and without saves, interleaved.

Stall per checkpoint is (time of N steps with K checkpoints - time of the same N steps without) / K; the time of a
sample is that of its steps until the device has finished them. In the cases `end to end` a save and its steps go before
the timed ones, so that what a save leaves to do while later steps run, and what later saves wait for, is in the time.
`written_s` and `durable_s` are seen beside the steps, by one rule for every arm (`checkpoint_durable`), which also
makes every arm's last save equally durable. Before it is timed, every arm saves once and its file is read back and
compared bit for bit with a copy of the state taken when it was saved. Only arms marked `fsync` have their bytes on the
disk when they say so themselves, and only ours has checksums and a commit.
"""

from __future__ import annotations

import atexit
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Measured, Trial
from undertow.benchmarks.checkpoint_durable import Watch
from undertow.benchmarks.checkpoint_job import (
    CPU,
    CPU_LARGE,
    LARGE,
    MANY,
    MEDIUM,
    SMALL,
    Job,
    Method,
    Size,
    SmallTensors,
)
from undertow.benchmarks.checkpoint_ours import Undertow
from undertow.benchmarks.checkpoint_rivals import DcpAsync, TorchSave, rivals
from undertow.dist.launch import detect, init_process_group

ASYNC = ("dcp.async_save, reused stager (fsync)", "torchsnapshot async", "torch_checkpointing", "NVRx async")
ENDS = (1, 5, 10, 50)  # steps between checkpoints in the cases `end to end`


def sample(job: Job, method: Method | None, *, steps: int, every: int, check: bool, lead: bool = False) -> Measured:
    """Train `steps` steps, saving before every `every`-th; the answer is the number of tensors read back wrong. `lead`:
    a save and `every` steps go before, untimed."""
    job.synchronize()
    copies: dict[str, torch.Tensor] = {}
    saves, watch = 0, None
    if lead and method is not None:
        method.save()
        for _ in range(every):
            job.train()
        job.synchronize()
    began_s = time.perf_counter()
    for index in range(steps):
        if method is not None and index % every == 0:
            if check:
                copies = {key: value.to("cpu", copy=True) for key, value in job.tensors().items()}
            save_s = time.perf_counter()
            if method.save() is not False:
                saves += 1
                watch = Watch(method, save_s) if index + every >= steps else None
        job.train()
    job.synchronize()
    seconds = time.perf_counter() - began_s
    extras = {"step_ms": 1e3 * seconds / steps, "saves": float(saves)}
    if method is not None:
        method.drain()
        if isinstance(method, Undertow) and saves:
            extras |= method.costs(saves)
    if watch is not None:
        watch.result()
        extras |= {"written_s": watch.written_s, "durable_s": watch.durable_s}  # of the last save, from its call
    wrong = 0
    if check and method is not None:
        found = method.load()
        wrong = sum(not torch.equal(found[key], value) for key, value in copies.items())
        del found
    if method is not None:
        method.clear()
    return Measured(float(wrong), seconds, extras)


def _arm(name: str, job: Job, make: Callable[[], Method] | None, steps: int, every: int, *, lead: bool) -> Arm:
    made: list[Method] = []

    def run() -> Measured:
        if made or make is None:
            return sample(job, made[0] if made else None, steps=steps, every=every, check=False, lead=lead)
        made.append(make())
        return sample(job, made[0], steps=1, every=1, check=True)  # whatever is allocated once is allocated now

    return Arm(name, run, prepare=os.sync)  # nobody's sample begins with another's unwritten pages


_jobs: list[Any] = []  # the case at hand; its threads, pinned memory and files go when the next one comes


@atexit.register
def _close_jobs() -> None:
    while _jobs:
        _jobs.pop().close()


def keep_open(job: Any) -> None:
    """Close `job` when the next case's comes, or at the end."""
    _close_jobs()
    _jobs.append(job)


def _trial(size: Size, device: torch.device, folder: Path, every: int, kinds: str) -> Trial:
    if not dist.is_initialized():
        init_process_group(detect({}), device=device)
    _close_jobs()  # before the next one takes memory
    handles = 0
    if kinds == "many":  # torch's stagers share every tensor with a process by a handle of its own
        handles = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (handles, handles))
    make_job = SmallTensors if kinds == "many" else Job
    job = make_job(size, device, Path(tempfile.mkdtemp(prefix="undertow-bench-", dir=folder)))
    _jobs.append(job)
    steps = max(4, size.interval // 2) if kinds == "host" else size.interval

    if kinds == "end to end":
        steps = every

    def arm(name: str, make: Callable[[], Method] | None) -> Arm:
        return _arm(name, job, make, steps, every, lead=kinds == "end to end")

    arms = [arm("no checkpoints", None)]
    if kinds == "host":
        arms.append(arm("undertow host", lambda: Undertow(job, "host", host=True)))
        return Trial(arms, lambda: 0.0)
    arms.append(arm("undertow disk (fsync)", lambda: Undertow(job, "disk")))
    if kinds == "end to end":
        arms.append(arm("undertow host", lambda: Undertow(job, "host", host=True)))
        arms.append(arm("dcp.async_save, reused stager (fsync)", lambda: DcpAsync(job, "dcp-stager", reused=True)))
        if size is not LARGE:  # of whose state every save takes a quarter of a minute
            arms.append(arm("torch.save", lambda: TorchSave(job, "torch")))
        return Trial(arms, lambda: 0.0)
    if kinds == "arena":
        for share in (0.5, 0.25):
            name = f"undertow disk, arena {share}"
            arms.append(arm(name, lambda share=share: Undertow(job, f"arena{share}", arena=share)))
        return Trial(arms, lambda: 0.0)
    for name, make in rivals(job, few=kinds != "disk").items():
        if kinds == "stall" and name not in ASYNC:
            continue
        if kinds == "many" and ("stager" in name or "process" in name) and handles < 3 * MANY:
            make = f"needs a handle for each of {MANY:,} tensors, and this user may hold {handles:,}"
        arms.append(Arm.missing(name, make) if isinstance(make, str) else arm(name, make))
    return Trial(arms, lambda: 0.0)


def _cases(context: Context) -> Sequence[Case]:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    folder = Path(os.environ.get("UNDERTOW_BENCH_DIR", tempfile.gettempdir()))
    sizes = (
        ([MEDIUM] if context.quick else [SMALL, MEDIUM, LARGE]) if cuda else ([CPU] if context.quick else [CPU_LARGE])
    )
    cases = []
    for size in sizes:
        intervals = ENDS if cuda and not context.quick else ENDS[:1] if context.quick else ENDS[:3]
        for kinds, every, ours in (
            ("host", 1, "undertow host"),
            ("disk", size.interval, "undertow disk (fsync)"),
            ("arena", size.interval, "undertow disk (fsync)"),
            *([("stall", size.interval, "undertow disk (fsync)")] if cuda else []),
            *(("end to end", every, "undertow disk (fsync)") for every in intervals),
        ):

            def build(size: Size = size, every: int = every, kinds: str = kinds) -> Trial:
                return _trial(size, device, folder, every, kinds)

            name = f"{size.name}, {kinds} every {every}"
            cases.append(Case(name, build, "no checkpoints", ours, group=kinds, warm_ups=0))
    if not context.quick:
        many = Size(f"{MANY:,} tensors", CPU.model, 1, 1, 12)
        build_many = partial(_trial, many, device, folder, many.interval, "many")
        cases.append(Case(many.name, build_many, "no checkpoints", "undertow disk (fsync)", group="many", warm_ups=0))
    return cases


BENCHMARK = Benchmark(
    "checkpoint_stall",
    "A checkpoint stalls training less than any rival's, and is durable sooner than those that also fsync.",
    _cases,
    rounds=6,
    packages=("torch", "torchsnapshot", "torch-checkpointing", "nvidia-resiliency-ext", "xxhash"),
    x_label="parameters",
)
