"""Where the time of a save to host memory goes, phase by phase, when one is made at every step.

Arms take parts of a save away: one leaves the bytes where they are (what remains is the training thread's own work and
the background's files), one leaves the files out, one is a bare copy without a single line of undertow. So the gap
between two arms is the cost of what the second lacks. Beside each time stand the milliseconds that the training thread
spent in each phase of the call and, on a GPU, how long the copy took there (`gpu_copy_ms`), how long the optimizer's
kernels were held up by it (`gpu_wait_ms`), and how far the training thread was ahead of the GPU when it reached the
optimizer (`lead_ms`; near zero means that launching is the bottleneck).
"""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Measured, Trial
from undertow.benchmarks.checkpoint_job import MEDIUM, Job, Size
from undertow.benchmarks.checkpoint_ours import Undertow
from undertow.benchmarks.checkpoint_stall import keep_open
from undertow.checkpointing.arena import register
from undertow.checkpointing.copies import copier_for
from undertow.dist.launch import detect, init_process_group
from undertow.examples.lm import LMConfig

STEPS = 8
TINY = Size("5 M", LMConfig(layers=2, width=384, heads=6, kv_heads=6, hidden=1024, vocab=256), 1, 32, 1)


class GpuClock:
    """Events of the steps of one sample; nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.on = device.type == "cuda"
        self.device = device
        self.reset()

    def reset(self) -> None:
        self._pairs: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._leads: list[tuple[Any, float]] = []
        self._open: Any = None
        if self.on:
            torch.cuda.synchronize(self.device)
            self._zero, self._zero_s = self._event(), time.perf_counter()

    def _event(self, stream: Any = None) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream if stream is not None else torch.cuda.current_stream(self.device))
        return event

    def copies_begin(self, stream: Any) -> None:
        if self.on:
            self._open = self._event(stream)

    def around_wait(self, stream: Any, wait: Callable[[], None]) -> None:
        """`wait` makes the training stream wait for what `stream` holds so far."""
        if not self.on:
            wait()
            return
        if self._open is not None:
            self._pairs["gpu_copy_ms"].append((self._open, self._event(stream)))
            self._open = None
        before = self._event()
        self._leads.append((before, time.perf_counter()))
        wait()
        self._pairs["gpu_wait_ms"].append((before, self._event()))

    def sums(self) -> dict[str, float]:
        """Means per step, once the device has finished."""
        found = {name: float(np.mean([a.elapsed_time(b) for a, b in pairs])) for name, pairs in self._pairs.items()}
        if self._leads:
            leads = [self._zero.elapsed_time(event) - 1e3 * (at - self._zero_s) for event, at in self._leads]
            found["lead_ms"] = float(np.mean(leads))
        return found


class HostClock:
    """Milliseconds of the training thread in named methods of live objects."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, thing: Any, method: str, name: str) -> None:
        plain = getattr(thing, method)

        def timed(*args: Any, **options: Any) -> Any:
            began_s = time.perf_counter()
            try:
                return plain(*args, **options)
            finally:
                self.seconds[name] += time.perf_counter() - began_s

        setattr(thing, method, timed)


class Rig:
    """One job, one `Checkpointer` with parts that can be left out, and memory for the bare copies."""

    def __init__(self, size: Size, device: torch.device, folder: Path) -> None:
        self.job = Job(size, device, folder)
        self.gpu, self.host = GpuClock(device), HostClock()
        self.without: frozenset[str] = frozenset()
        self._bare: dict[str, tuple[int, object]] = {}
        tensors = [tensor for tensor in self.job.tensors().values() if tensor.device == device]
        self.nbytes = np.array([t.numel() * t.element_size() for t in tensors], dtype=np.int64)
        self.sources = np.array([t.data_ptr() for t in tensors], dtype=np.int64)
        self.tensors = tensors
        self.copier = copier_for(tensors)
        self._fence: Callable[[], None] = lambda: None
        self.job.optimizer.register_step_pre_hook(lambda *unused: self._fence())
        self.method = Undertow(self.job, "host", host=True)
        self.method.save()
        self.job.train()
        self.method.drain()
        self._instrument()

    def _instrument(self) -> None:
        ckpt = self.method.ckpt
        live, host, copier = ckpt._live, ckpt.host, ckpt._live.copier
        assert host is not None
        self.host.watch(live, "values", "values_ms")
        self.host.watch(host, "claim", "claim_ms")
        self.host.watch(live.staging, "fill", "staging_ms")
        for part in live._watched:
            self.host.watch(part.sampler, "before", "sample_ms")
            self.host.watch(part.sampler, "changed", "sample_again_ms")
        self.host.watch(ckpt._tiers, "route", "route_ms")
        self.host.watch(ckpt._pipeline, "submit", "submit_ms")
        self._leave_out_copies(copier)
        self._leave_out_files(host, ckpt._tiers._committers["host"])
        self.host.watch(copier, "copy_many", "copies_ms")
        self.host.watch(ckpt._saver, "begin", "call_ms")
        begin, order_after = copier.begin, copier.order_after

        def begun() -> None:
            begin()
            self.gpu.copies_begin(getattr(copier, "stream", None))

        copier.begin = begun
        copier.order_after = lambda mark: self.gpu.around_wait(
            getattr(copier, "stream", None), partial(order_after, mark)
        )

    def _leave_out_copies(self, copier: Any) -> None:
        copy, copy_many = copier.copy, copier.copy_many
        copier.copy = lambda *where: None if "copies" in self.without else copy(*where)
        copier.copy_many = lambda *where: None if "copies" in self.without else copy_many(*where)

    def _leave_out_files(self, host: Any, committer: Any) -> None:
        claim, commit, done, folders = host.claim, committer._commit, host.done, itertools.count()

        def claimed(attempt: Any, **ways: bool) -> Any:
            if "files" not in self.without:
                return claim(attempt, **ways)
            slots = host.turns.slots
            index = next(folders) % len(slots)
            return index, slots[index].folder

        def committed(part: Any, name: str) -> float:
            if "files" not in self.without:
                return commit(part, name)
            part.save.snapshot.wait_filled()
            part.file.wait()
            part.save.snapshot.finish()
            return 0.0

        host.claim, committer._commit = claimed, committed
        host.done = lambda *what: None if "files" in self.without else done(*what)

    def _memory(self, kind: str) -> int:
        """The address of as many bytes as the state has: pinned by torch, or shared and registered."""
        if kind not in self._bare:
            total = int(self.nbytes.sum())
            if kind == "pinned":
                memory = torch.empty(total, dtype=torch.uint8, pin_memory=self.gpu.on)
                self._bare[kind] = memory.data_ptr(), memory
            else:
                with tempfile.TemporaryFile(dir="/dev/shm") as file:
                    os.posix_fallocate(file.fileno(), 0, total)
                    mapped = mmap.mmap(file.fileno(), total)
                view = np.frombuffer(mapped, dtype=np.uint8)
                view[:: mmap.PAGESIZE] |= 0
                if self.gpu.on:
                    register(self, view.ctypes.data, total)
                self._bare[kind] = view.ctypes.data, view
        return self._bare[kind][0]

    def copy_bare(self, kind: str, share: float, one_by_one: bool) -> None:
        """Begin to copy `share` of the state's tensors; the fence comes with the optimizer's step."""
        address, copier = self._memory(kind), self.copier
        targets = address + np.concatenate(([0], np.cumsum(self.nbytes)[:-1]))
        count = max(1, int(np.searchsorted(np.cumsum(self.nbytes), share * self.nbytes.sum())))
        copier.begin()
        stream = getattr(copier, "stream", None)
        self.gpu.copies_begin(stream)
        if one_by_one:
            for target, source, nbytes in zip(targets.tolist(), self.sources.tolist(), self.nbytes.tolist()):
                copier.copy(target, source, nbytes)
        else:
            copier.copy_many(targets[:count], self.sources[:count], self.nbytes[:count])

        def fence() -> None:
            self.gpu.around_wait(stream, lambda: copier.order_after(copier.mark()))
            self._fence = lambda: None

        self._fence = fence

    def sample(self, save: Callable[[], object]) -> Measured:
        """Train a few steps, with `save` before each."""
        self.job.train()
        self.gpu.reset()
        self.host.seconds.clear()
        began_s = time.perf_counter()
        for _ in range(STEPS):
            save()
            self.job.train()
        launched_s = time.perf_counter() - began_s
        self.job.synchronize()
        seconds = time.perf_counter() - began_s
        extras = {"step_ms": 1e3 * seconds / STEPS, "launch_ms": 1e3 * launched_s / STEPS, **self.gpu.sums()}
        self.method.drain()
        extras |= {name: 1e3 * value / STEPS for name, value in self.host.seconds.items()}
        return Measured(0.0, seconds, extras)

    def save(self, *without: str) -> None:
        self.without = frozenset(without)
        self.method.save()

    def close(self) -> None:
        self.without = frozenset()
        self.method.save()  # leaves the tier with a checkpoint that it knows
        self.job.train()
        self.method.drain()
        self.job.close()


def _trial(size: Size, device: torch.device) -> Trial:
    if not dist.is_initialized():
        init_process_group(detect({}), device=device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # leaves the other cores to the copies and the files
    rig = Rig(size, device, Path(tempfile.mkdtemp(prefix="undertow-bench-")))
    keep_open(rig)
    saves: dict[str, Callable[[], object]] = {
        "no checkpoints": lambda: None,
        "undertow host": rig.save,
        "undertow host, bytes stay": lambda: rig.save("copies"),
        "undertow host, no files": lambda: rig.save("files"),
        "undertow host, neither": lambda: rig.save("copies", "files"),
        "bare copy": lambda: rig.copy_bare("pinned", 1.0, False),
        "bare copy, shared memory": lambda: rig.copy_bare("shared", 1.0, False),
        "bare copy, call by call": lambda: rig.copy_bare("pinned", 1.0, True),
        "bare copy, half": lambda: rig.copy_bare("pinned", 0.5, False),
    }
    return Trial([Arm(name, partial(rig.sample, save)) for name, save in saves.items()], lambda: 0.0)


def _cases(context: Context) -> Sequence[Case]:
    cuda = torch.cuda.is_available()
    size, device = (MEDIUM, torch.device("cuda", 0)) if cuda else (TINY, torch.device("cpu"))
    return [Case(size.name, partial(_trial, size, device), "no checkpoints", "undertow host", warm_ups=1)]


BENCHMARK = Benchmark(
    "checkpoint_phases",
    "A save to host memory at every step costs a training step at most 3 % on a GPU.",
    _cases,
    rounds=8,
    packages=("torch",),
)
