"""What a checkpoint costs a training loop: a GPT with fp32 AdamW, the same steps with and without saves, interleaved.

Stall per checkpoint is (time of N steps with K checkpoints - time of the same N steps without) / K; the time of a
sample is that of its steps until the device has finished them, and what is still under way then is waited for outside
the sample and reported as `durable_s`. Before it is timed, every arm saves once and its file is read back and compared
bit for bit with a copy of the state taken when it was saved. Arms differ in what they leave behind, which their names
say: only those marked `fsync` have their bytes on the disk when they say so, and only ours has checksums and a commit.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Measured, Trial
from undertow.checkpointing import Checkpointer
from undertow.dist.launch import detect, init_process_group
from undertow.examples.lm import ByteLM, LMConfig


@dataclass(frozen=True)
class Size:
    """A model, its batch, and the steps between saves to disk, long enough for a save to reach it."""

    name: str
    model: LMConfig
    batch: int
    length: int
    interval: int


GPT2 = {"vocab": 50304, "tied": True}
CPU = Size("21 M", LMConfig(layers=6, width=512, heads=8, kv_heads=8, hidden=1408, vocab=512), 1, 128, 4)
CPU_LARGE = Size("90 M", LMConfig(layers=12, width=768, heads=12, kv_heads=12, hidden=2304, vocab=512), 1, 128, 6)
SMALL = Size("125 M", LMConfig(layers=12, width=768, heads=12, kv_heads=12, hidden=2048, **GPT2), 16, 1024, 64)
MEDIUM = Size("355 M", LMConfig(layers=24, width=1024, heads=16, kv_heads=16, hidden=2816, **GPT2), 12, 1024, 32)
LARGE = Size("1.3 B", LMConfig(layers=24, width=2048, heads=16, kv_heads=16, hidden=5504, **GPT2), 8, 1024, 48)
MANY, SMALL_TENSOR = 20_000, 800  # 64 MB of float32


@dataclass
class Job:
    """The training loop that all arms share: same model, same optimizer, one step after the other."""

    size: Size
    device: torch.device
    folder: Path
    step: int = 0
    state_bytes: int = 0
    _open: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = ByteLM(self.size.model).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        shape = (self.size.batch, self.size.length + 1)
        self.tokens = torch.randint(0, 256, shape, device=self.device)
        self.train()
        self.synchronize()
        self.state_bytes = sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """What every arm has to save, by name."""
        found = {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                found[f"optimizer.state.{name}.{key}"] = value
        return found

    def train(self) -> None:
        """Forward, backward and update of one step."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.model(self.tokens[:, :-1], self.tokens[:, 1:])
        loss.backward()
        self.optimizer.step()
        self.step += 1

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        for close in self._open:
            close()
        shutil.rmtree(self.folder, ignore_errors=True)


class SmallTensors(Job):
    """Many tensors of a few kilobytes: what names, records and single copies cost, not bytes."""

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.ParameterList([torch.randn(SMALL_TENSOR, device=self.device) for _ in range(MANY)])
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-5)
        for parameter in self.model:
            parameter.grad = torch.full_like(parameter, 1e-3)
        self.train()
        self.state_bytes = sum(t.numel() * t.element_size() for t in self.tensors().values())

    def train(self) -> None:
        self.optimizer.step()
        self.step += 1


class Method:
    """One way to checkpoint. `save` is called before the step; `drain` waits until the last save is complete."""

    def __init__(self, job: Job, folder: str) -> None:
        self.job, self.folder = job, job.folder / folder
        self.path = self.folder

    def save(self) -> None: ...

    def drain(self) -> None: ...

    def load(self) -> dict[str, torch.Tensor]:
        """The last save read back from its files, by the names of `Job.tensors`."""
        raise LookupError

    def fresh(self) -> Path:
        """A new name for a save, and the one before the last removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        old = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for path in old[:-1]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.path = self.folder / f"save-{self.job.step}"
        return self.path


class Undertow(Method):
    """Ours: `disk` (fsync, checksums, commit) or `host` (shared memory that outlives the process)."""

    def __init__(self, job: Job, folder: str, *, host: bool = False, arena: float | None = None) -> None:
        super().__init__(job, folder)
        self.host = host
        self.ckpt = Checkpointer(
            self.folder,
            model=job.model,
            optimizer=job.optimizer,
            keep=1,
            host_every=int(host),
            arena_bytes=None if arena is None else int(arena * job.state_bytes),
        )
        job._open.append(self.ckpt.close)

    def save(self) -> None:
        self.ckpt.save(self.job.step, disk=not self.host, host=self.host)

    def drain(self) -> None:
        self.ckpt.wait()
        if self.ckpt.failures:
            raise RuntimeError(self.ckpt.reports[-1].reason)

    def load(self) -> dict[str, torch.Tensor]:
        from undertow.checkpointing.folder import read_manifest
        from undertow.checkpointing.restore import Reader
        from undertow.checkpointing.verify import check_content

        folder = self.ckpt.host.folder if self.host and self.ckpt.host is not None else self.ckpt.folder
        path = folder.final(folder.committed()[-1])
        manifest = read_manifest(path)
        check_content(path, manifest)
        reader = Reader(path, manifest)
        return {key: reader.shard(key, record.shards[0]) for key, record in manifest.tensors.items()}


class TorchSave(Method):
    def save(self) -> None:
        torch.save(self.job.tensors(), self.fresh())

    def load(self) -> dict[str, torch.Tensor]:
        return torch.load(self.path, map_location="cpu")


class TorchSaveSync(TorchSave):
    def save(self) -> None:
        with self.fresh().open("wb") as file:
            torch.save(self.job.tensors(), file)
            file.flush()
            os.fsync(file.fileno())


class Dcp(Method):
    """torch.distributed.checkpoint.save; it fsyncs the file's data."""

    def save(self) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(self.job.tensors(), checkpoint_id=self.fresh())

    def load(self) -> dict[str, torch.Tensor]:
        import torch.distributed.checkpoint as dcp

        blank = {key: torch.empty_like(value, device="cpu") for key, value in self.job.tensors().items()}
        dcp.load(blank, checkpoint_id=self.path)
        return blank


class DcpAsync(Dcp):
    """async_save with one stager for all saves: pinned and shared host memory where there is a device. The update must
    wait for the staging, since the stager reads live tensors."""

    def __init__(self, job: Job, folder: str, *, reused: bool) -> None:
        super().__init__(job, folder)
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self.pending: Any = None
        cuda = job.device.type == "cuda"
        options = StagingOptions(
            use_pinned_memory=cuda, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=cuda
        )
        self.stager = DefaultStager(options) if reused else None
        if self.stager is not None:
            job._open.append(self.stager.close)

    def save(self) -> None:
        import torch.distributed.checkpoint as dcp

        self.drain()
        extra: dict[str, Any] = {} if self.stager is None else {"async_stager": self.stager}
        answer: Any = dcp.async_save(self.job.tensors(), checkpoint_id=self.fresh(), **extra)
        if hasattr(answer, "staging_completion"):
            answer.staging_completion.result()
            answer = answer.upload_completion
        self.pending = answer

    def drain(self) -> None:
        if self.pending is not None:
            self.pending.result()
            self.pending = None


class TorchSnapshot(Method):
    """torchsnapshot's async_take; no fsync found in it."""

    pending: Any = None

    def save(self) -> None:
        import torchsnapshot

        self.drain()
        state = {"state": torchsnapshot.StateDict(**self.job.tensors())}
        self.pending = torchsnapshot.Snapshot.async_take(str(self.fresh()), state)

    def drain(self) -> None:
        if self.pending is not None:
            self.pending.wait()
            self.pending = None

    def load(self) -> dict[str, torch.Tensor]:
        import torchsnapshot

        snapshot = torchsnapshot.Snapshot(str(self.path))
        keys = self.job.tensors()
        return {key: snapshot.read_object(f"0/state/{key}") for key in keys}


def sample(job: Job, method: Method | None, *, steps: int, every: int, check: bool) -> Measured:
    """Train `steps` steps, saving before every `every`-th; the answer is the number of tensors read back wrong."""
    job.synchronize()
    copies: dict[str, torch.Tensor] = {}
    saves, first_s = 0, 0.0
    began_s = time.perf_counter()
    for index in range(steps):
        if method is not None and index % every == 0:
            if check:
                copies = {key: value.to("cpu", copy=True) for key, value in job.tensors().items()}
            first_s = time.perf_counter()
            method.save()
            saves += 1
        job.train()
    job.synchronize()
    seconds = time.perf_counter() - began_s
    extras = {"step_ms": 1e3 * seconds / steps, "saves": float(saves)}
    if method is not None:
        method.drain()
        extras["durable_s"] = time.perf_counter() - first_s  # of the last save, from its call
        if isinstance(method, Undertow):
            last = method.ckpt.reports[-saves:]
            extras |= {
                "call_ms": 1e3 * sum(r.call_s for r in last) / saves,
                "fence_ms": 1e3 * sum(r.fence_s for r in last) / saves,
                "commit_s": last[-1].commit_s,
            }
    wrong = 0
    if check and method is not None:
        found = method.load()
        wrong = sum(not torch.equal(found[key], value) for key, value in copies.items())
    return Measured(float(wrong), seconds, extras)


def _arm(name: str, job: Job, make: Callable[[], Method] | None, steps: int, every: int) -> Arm:
    made: list[Method] = []

    def run() -> Measured:
        check = not made and make is not None
        if check:
            assert make is not None
            made.append(make())
            sample(job, made[0], steps=2, every=1, check=False)  # whatever is allocated once is allocated now
        return sample(job, made[0] if made else None, steps=steps, every=every, check=check)

    return Arm(name, run)


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
    make_job = SmallTensors if kinds == "many" else Job
    job = make_job(size, device, Path(tempfile.mkdtemp(prefix="undertow-bench-", dir=folder)))
    _jobs.append(job)
    steps = max(4, size.interval // 2) if kinds == "host" else size.interval

    def arm(name: str, make: Callable[[], Method] | None) -> Arm:
        return _arm(name, job, make, steps, every)

    arms = [arm("no checkpoints", None)]
    if kinds == "host":
        arms.append(arm("undertow host", lambda: Undertow(job, "host", host=True)))
        return Trial(arms, lambda: 0.0)
    arms.append(arm("undertow disk (fsync)", lambda: Undertow(job, "disk")))
    if kinds == "arena":
        for share in (0.5, 0.25):
            name = f"undertow disk, arena {share}"
            arms.append(arm(name, lambda share=share: Undertow(job, f"arena{share}", arena=share)))
        return Trial(arms, lambda: 0.0)
    arms += [
        arm("torch.save", lambda: TorchSave(job, "torch")),
        arm("torch.save (fsync)", lambda: TorchSaveSync(job, "torch-sync")),
        arm("dcp.save (fsync)", lambda: Dcp(job, "dcp")),
        arm("dcp.async_save (fsync)", lambda: DcpAsync(job, "dcp-async", reused=False)),
        arm("dcp.async_save, reused stager (fsync)", lambda: DcpAsync(job, "dcp-stager", reused=True)),
    ]
    if importlib.util.find_spec("torchsnapshot"):
        arms.append(arm("torchsnapshot async", lambda: TorchSnapshot(job, "snapshot")))
    else:
        arms.append(Arm.missing("torchsnapshot async", "not installed"))
    arms.append(Arm.missing("DataStates-LLM", "its source cannot be installed from a registry"))
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
        for kinds, every, ours in (
            ("host", 1, "undertow host"),
            ("disk", size.interval, "undertow disk (fsync)"),
            ("arena", size.interval, "undertow disk (fsync)"),
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
    rounds=5,
    packages=("torch", "torchsnapshot", "xxhash"),
    x_label="parameters",
)
