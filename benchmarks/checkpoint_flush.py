"""How fast saves that follow one another reach the disk, against the disk's own rate in the same rounds.

Nothing is trained: each sample saves the same state several times, the next as soon as the way allows it, and ends when
the last is durable (`checkpoint_durable`: by the same rule for every arm). `raw O_DIRECT` writes as many bytes from
aligned memory to one file, in blocks of 16 MiB, and fsyncs; no format, no checksum, no copy. Saves that follow one
another also remove one another, and a disk has work with that (`discard`): `raw O_DIRECT, removing` writes one file per
save and removes the one before beside it, as retention does; `raw O_DIRECT, recycled` writes over files that are there,
as ours does where it recycles (`checkpointing/recycle.py`), and `undertow disk, removing` is ours without that.
After a pause, the first two saves that overlap need one file more than the pool holds, which is made and removed: the
case `in a row` has so many saves that the rate is near that of a long run, beside the raw disk only. Predicted, where
`--machine` names what `undertow probe` measured, is the cost model's shortest interval of saves, times their number.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Measured, Trial
from undertow.benchmarks.checkpoint_durable import Watch
from undertow.benchmarks.checkpoint_job import CPU, CPU_LARGE, LARGE, MEDIUM, SMALL, Job, Method, Size
from undertow.benchmarks.checkpoint_ours import Undertow
from undertow.benchmarks.checkpoint_rivals import Dcp, DcpAsync, TorchSave
from undertow.benchmarks.checkpoint_stall import keep_open
from undertow.checkpointing.cost import predict
from undertow.dist.errors import UserError
from undertow.dist.machine import Machine

SAVES, ROW, RIVAL = 3, 5, "dcp.save (fsync)"
BLOCK_BYTES = 16 * 2**20


class Raw:
    """Writes `files` files of `nbytes`, past the page cache, and makes them durable. `removing`: each is removed beside
    the next one. `recycled`: two files that stay are written over in turn."""

    def __init__(
        self, folder: Path, nbytes: int, files: int, *, removing: bool = False, recycled: bool = False
    ) -> None:
        self.folder, self.blocks, self.files, self.removing = folder, -(-nbytes // BLOCK_BYTES), files, removing
        self.block = mmap.mmap(-1, BLOCK_BYTES)  # whole pages: aligned as O_DIRECT wants
        self.block.write(os.urandom(BLOCK_BYTES))
        self.kept = [folder / f"kept-{index}" for index in range(2)] if recycled else []

    def run(self) -> Measured:
        paths = [self.folder / f"raw-{index}" for index in range(self.files if self.removing else 1)]
        if self.kept:
            for path in self.kept:
                if not path.exists():
                    self._write(path, self.blocks)
            paths = [self.kept[index % 2] for index in range(self.files)]
        blocks = self.blocks * self.files // len(paths)
        removal, short = threading.Thread(target=lambda: None), 0
        began_s = time.perf_counter()
        for index, path in enumerate(paths):
            removal.start()
            self._write(path, blocks)
            removal.join()
            short += abs(path.stat().st_size - blocks * BLOCK_BYTES)
            removal = threading.Thread(target=paths[index].unlink if self.removing else lambda: None)
        seconds = time.perf_counter() - began_s
        if not self.kept:
            paths[-1].unlink()
        return Measured(float(short), seconds)

    def _write(self, path: Path, blocks: int) -> None:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o666)
        except OSError as error:
            raise UserError(
                f"{path.parent} refuses O_DIRECT ({error.strerror})",
                remedy="name a folder of a disk in UNDERTOW_BENCH_DIR",
            ) from error
        try:
            for _ in range(blocks):
                done = os.write(handle, self.block)
                if done != BLOCK_BYTES:
                    raise OSError(f"wrote {done} of {BLOCK_BYTES} bytes")
            os.fsync(handle)
        finally:
            os.close(handle)


def _flush(job: Job, method: Method, saves: int) -> Measured:
    """`saves` saves of a state that changes in between; the answer is the number of tensors read back wrong."""
    watches = []
    began_s = time.perf_counter()
    for _ in range(saves):
        job.step += 1
        method.save()
        watches.append(Watch(method, began_s))
    method.drain()
    for watch in watches:
        watch.result()
    seconds = max(watch.durable_s for watch in watches)
    found = method.load()
    wrong = sum(not torch.equal(found[key], value.cpu()) for key, value in job.tensors().items())
    del found
    method.clear()
    job.train()
    job.synchronize()
    return Measured(float(wrong), seconds, {"save_s": seconds / saves})


def _trial(
    size: Size,
    device: torch.device,
    base: Path,
    machine: Machine | None,
    saves: int,
    *,
    rivals: bool,
    removing: bool = True,
) -> Trial:
    job = Job(size, device, Path(tempfile.mkdtemp(prefix="undertow-bench-", dir=base)))
    keep_open(job)

    def arm(name: str, make: Callable[[], Method], predicted_s: float | None = None) -> Arm:
        made: list[Method] = []

        def run() -> Measured:
            if not made:
                made.append(make())
                _flush(job, made[0], saves)  # whatever is allocated once is allocated now
            return _flush(job, made[0], saves)

        return Arm(name, run, prepare=os.sync, predicted_s=predicted_s)

    def raw(**way: bool) -> Callable[[], Measured]:
        return Raw(job.folder, job.state_bytes, saves, **way).run

    arms = [
        Arm("raw O_DIRECT", raw(), prepare=os.sync),
        Arm("raw O_DIRECT, recycled", raw(recycled=True), prepare=os.sync),
    ]
    if removing:
        arms.append(Arm("raw O_DIRECT, removing", raw(removing=True), prepare=os.sync))
    if rivals:
        arms += [
            arm(RIVAL, lambda: Dcp(job, "dcp")),
            arm("dcp.async_save, reused stager (fsync)", lambda: DcpAsync(job, "dcp-stager", reused=True)),
            arm("torch.save", lambda: TorchSave(job, "torch")),
        ]
    predicted_s = _predicted_s(job, machine, saves)
    arms.append(arm("undertow disk (fsync)", lambda: Undertow(job, "disk"), predicted_s))
    if removing and not rivals:
        arms.append(arm("undertow disk, removing", lambda: Undertow(job, "removing", recycle=False), predicted_s))
    return Trial(arms, lambda: 0.0)


def _predicted_s(job: Job, machine: Machine | None, saves: int) -> float | None:
    if machine is None:
        return None
    interval_s = predict(job.state_bytes, machine, cuda=job.device.type == "cuda").interval_s
    return None if interval_s is None else saves * interval_s


def _cases(context: Context) -> Sequence[Case]:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    base = Path(os.environ.get("UNDERTOW_BENCH_DIR", tempfile.gettempdir()))
    sizes = ([MEDIUM] if context.quick else [SMALL, MEDIUM, LARGE]) if cuda else [CPU if context.quick else CPU_LARGE]
    cases = []

    def add(size: Size, saves: int, plain: str, *, row: bool = False) -> None:
        beside = plain != RIVAL
        build = partial(_trial, size, device, base, context.machine, saves, rivals=not beside, removing=not row)
        nbytes = saves * 12 * _parameters(size)  # parameter and two moments in fp32
        options = {"nbytes": nbytes, "hardware": "raw O_DIRECT", "group": "flush", "warm_ups": 0}
        name = f"{size.name}, {saves} saves{' in a row' if row else ' beside the raw disk' if beside else ''}"
        cases.append(Case(name, build, plain, "undertow disk (fsync)", **options))

    for size in sizes:
        add(size, SAVES, RIVAL)
        if cuda or not context.quick:
            add(size, SAVES, "raw O_DIRECT")  # a quarter of the time
    if not context.quick:
        add(SMALL if cuda else CPU_LARGE, ROW, "raw O_DIRECT", row=True)
    if cuda and not context.quick:
        add(SMALL, 2, "raw O_DIRECT")  # a fifth of the time of the 355 M
    return cases


def _parameters(size: Size) -> int:
    from undertow.examples.lm import ByteLM

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in ByteLM(size.model).parameters())


BENCHMARK = Benchmark(
    "checkpoint_flush",
    "Saves that follow one another reach the disk at 0.9 of its raw O_DIRECT rate.",
    _cases,
    rounds=6,
    packages=("torch", "xxhash"),
    x_label="bytes",
)
