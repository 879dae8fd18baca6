"""What a save takes of the processor, thread by thread, where Python sets the pace of the steps.

On a GPU the bytes leave by a copy engine, and what a save costs is its Python: on the training thread, and in the other
threads that take the interpreter from it. Here the bytes stay (`copy_many` does nothing, and copies are issued as they
are for a GPU), so that this cost is all there is, and no GPU is needed. Arms save to host memory or to disk
at every step of a model of many tensors on one core. Beside the steps' time stand the processor time of a save in its
call and at its fence (`call_us`, `fence_us`), of the other threads (`copier_us`, which issues the copies, `commit_us`,
`writers_us`), and of all but the writers for one tensor (`tensor_us`), from the threads' own clocks, which other
processes disturb less.

    undertow bench checkpoint_threads --rounds 8
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Measured, Trial
from undertow.benchmarks.checkpoint_job import Job, Size
from undertow.benchmarks.checkpoint_stall import keep_open
from undertow.checkpointing import Checkpointer
from undertow.examples.lm import LMConfig

STEPS = 8
CHUNK_BYTES = 2 * 2**20  # about as many chunks as a rank of a 355 M-parameter model has of 16 MiB


class Saves:
    """A `Checkpointer` of the job that issues all copies at once and copies nothing."""

    def __init__(self, job: Job, folder: str, *, host: bool) -> None:
        self.job, self.host = job, host
        self.ckpt = Checkpointer(
            job.folder / folder,
            model=job.model,
            optimizer=job.optimizer,
            keep=1,
            host_every=int(host),
            chunk_bytes=CHUNK_BYTES,
        )
        job._open.append(self.ckpt.close)
        self.clocks: dict[str, float] = defaultdict(float)
        self.save()
        self.job.train()
        self.ckpt.wait()
        copier: Any = self.ckpt._live.copier
        copier.copy_many, copier.queues, copier.chunks_at_once = lambda *where: None, True, 16
        fences: Any = self.ckpt._fences
        wait = fences._wait

        def timed(*args: Any) -> None:
            began_s = time.thread_time()
            wait(*args)
            self.clocks["fence_us"] += time.thread_time() - began_s

        fences._wait = timed

    def save(self) -> None:
        began_s = time.thread_time()
        self.ckpt.save(self.job.step, disk=not self.host, host=self.host)
        self.clocks["call_us"] += time.thread_time() - began_s

    def tensors(self) -> int:
        plan = self.ckpt._live.plan
        return len(plan.eager) + len(plan.lazy)


def others() -> dict[str, float]:
    """Processor seconds of the threads of checkpoints so far, by what they do."""
    found: dict[str, float] = defaultdict(float)
    for thread in threading.enumerate():
        if thread.name.startswith("undertow-") and thread.ident is not None:
            name = next((name for name in ("commit", "copier") if name in thread.name), "writers")
            found[f"{name}_us"] += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return found


def sample(job: Job, saves: Saves | None) -> Measured:
    """A few steps, with a save before each; the answer is the number of saves that were not committed."""
    before = others()
    if saves is not None:
        saves.clocks.clear()
    began_s = time.perf_counter()
    for _ in range(STEPS):
        if saves is not None:
            saves.save()
        job.train()
    seconds = time.perf_counter() - began_s
    extras = {"step_ms": 1e3 * seconds / STEPS}
    if saves is None:
        return Measured(0.0, seconds, extras)
    ended = len(saves.ckpt.reports)
    new = saves.ckpt.wait()[ended:]
    spent = {name: value - before[name] for name, value in others().items()} | saves.clocks
    extras |= {name: 1e6 * value / STEPS for name, value in spent.items()}
    python_s = sum(value for name, value in spent.items() if name != "writers_us")  # they hash bytes
    extras["tensor_us"] = 1e6 * python_s / STEPS / saves.tensors()
    return Measured(float(sum(not report.ok for report in new)), seconds, extras)


def _trial(size: Size) -> Trial:
    torch.set_num_threads(1)
    job = Job(size, torch.device("cpu"), Path(tempfile.mkdtemp(prefix="undertow-bench-")))
    keep_open(job)
    ways = {"undertow host, every step": Saves(job, "host", host=True), "undertow disk": Saves(job, "disk", host=False)}
    arms = [Arm("no checkpoints", partial(sample, job, None))]
    arms += [Arm(name, partial(sample, job, way)) for name, way in ways.items()]
    return Trial(arms, lambda: 0.0)


def cases(context: Context) -> Sequence[Case]:
    layers = [2] if context.quick else [12, 48]
    # its matrices are just large enough to leave late
    models = [LMConfig(layers=layer, width=256, heads=4, kv_heads=4, hidden=704) for layer in layers]
    sizes = [Size(f"{model.layers} layers", model, 1, 8, 1) for model in models]
    return [
        Case(size.name, partial(_trial, size), "no checkpoints", "undertow host, every step", warm_ups=1)
        for size in sizes
    ]


BENCHMARK = Benchmark(
    "checkpoint_threads",
    "A save to host memory takes a few microseconds of processor time for each tensor.",
    cases,
    rounds=8,
    packages=("torch",),
    x_label="",
)
