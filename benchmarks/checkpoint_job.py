"""The training job that checkpoint benchmarks share, and what a way to checkpoint must offer them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

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
CPU_LARGE = Size("90 M", LMConfig(layers=12, width=768, heads=12, kv_heads=12, hidden=2304, vocab=512), 1, 64, 4)
SMALL = Size("125 M", LMConfig(layers=12, width=768, heads=12, kv_heads=12, hidden=2048, **GPT2), 16, 1024, 64)
MEDIUM = Size("355 M", LMConfig(layers=24, width=1024, heads=16, kv_heads=16, hidden=2816, **GPT2), 12, 1024, 32)
LARGE = Size("1.3 B", LMConfig(layers=24, width=2048, heads=16, kv_heads=16, hidden=5504, **GPT2), 8, 1024, 48)
MANY, SMALL_TENSOR = 20_000, 800  # 64 MB of float32


class Loop:
    """A model, its optimizer and one batch: the same step for a model of one process and for a sharded one."""

    device: torch.device
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    tokens: torch.Tensor
    step = 0

    def train(self) -> None:
        """Forward, backward and update of one step."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.model(self.tokens[:, :-1], self.tokens[:, 1:])
        loss.backward()
        self.optimizer.step()
        self.step += 1

    def synchronize(self) -> None:
        """Wait until the device has finished what was queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass
class Job(Loop):
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
    """One way to checkpoint. `save` is called before the step, and returns False where it begins nothing; `drain` waits
    until the last save is complete."""

    def __init__(self, job: Job, folder: str) -> None:
        self.job, self.folder = job, job.folder / folder
        self.path = self.folder

    def save(self) -> bool | None: ...

    def drain(self) -> None: ...

    def written_sign(self) -> Callable[[], bool]:
        """What tells, asked from another thread, that the save just begun has written all that it will write. This
        one is for a `save` that returns when it is done."""
        return lambda: True

    def load(self) -> dict[str, torch.Tensor]:
        """The last save read back from its files, by the names of `Job.tensors`."""
        raise LookupError

    def clear(self) -> None:
        """Remove what it has saved: the disk must hold one arm's saves, not all arms'."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def fresh(self) -> Path:
        """A new name for a save, and the one before the last removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        old = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        for path in old[:-1]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.path = self.folder / f"save-{self.job.step}"
        return self.path
