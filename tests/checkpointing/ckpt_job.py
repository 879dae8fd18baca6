"""A small training job for checkpoint tests: deterministic, with buffers, and tensors large enough to be lazy.

Import it after putting this folder on sys.path; the tests do so in their first lines.
"""

from __future__ import annotations

import threading
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from undertow.checkpointing import Checkpointer
from undertow.checkpointing.files import FileOps

CHUNK_BYTES = 65536
WIDTH = 272  # 272 x 272 fp32 is 296 KB: above the size from which tensors are copied lazily


class Job:
    """A model with BatchNorm, an optimizer, and `advance` for one update whose data depend on the step alone."""

    def __init__(self, seed: int = 0, *, width: int = WIDTH, optimizer: Any = None, layers: int = 2) -> None:
        torch.manual_seed(seed)
        parts: list[nn.Module] = []
        for _ in range(layers):
            parts += [nn.Linear(width, width), nn.BatchNorm1d(width)]
        self.model = nn.Sequential(*parts)
        make = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
        self.optimizer = make(self.model.parameters())
        self.width = width

    def forward_backward(self, step: int) -> torch.Tensor:
        data = torch.randn(8, self.width, generator=torch.Generator().manual_seed(step))
        self.optimizer.zero_grad()
        loss = self.model(data).square().mean()
        loss.backward()
        return loss.detach()

    def advance(self, step: int) -> torch.Tensor:
        loss = self.forward_backward(step)
        self.optimizer.step()
        return loss

    def checkpointer(self, root: Path, **options: Any) -> Checkpointer:
        options = {"chunk_bytes": CHUNK_BYTES, "timeout_s": 240.0, **options}
        return Checkpointer(root, model=self.model, optimizer=self.optimizer, **options)

    def state(self) -> dict[str, Any]:
        return snapshot_of(self.model, self.optimizer)


class Moody:
    """An object whose `state_dict` raises when told to; `size` tensors make another shape of the state."""

    def __init__(self) -> None:
        self.raises, self.value, self.size = False, 0, 0

    def state_dict(self) -> dict[str, Any]:
        if self.raises:
            raise RuntimeError("the loader has no position now")
        return {"value": self.value, **{f"more{index}": torch.ones(3) for index in range(self.size)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def snapshot_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Clones of everything: the independent answer that a restored checkpoint is compared with."""
    found: dict[str, Any] = {f"model.{k}": v.detach().clone() for k, v in model.state_dict().items()}
    if optimizer is not None:
        stored = optimizer.state_dict()
        for index, values in stored["state"].items():
            for key, value in values.items():
                found[f"state.{index}.{key}"] = value.clone() if isinstance(value, torch.Tensor) else deepcopy(value)
        for index, group in enumerate(stored["param_groups"]):
            found |= {f"group.{index}.{key}": value for key, value in group.items()}
    return found


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Bit-identical tensors and equal values under equal names."""
    return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        one, two = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
        return bool(torch.equal(one, two))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


class HeldOps(FileOps):
    """Writes wait until `let_go` is set: saves stay in flight for as long as a test wants."""

    def __init__(self) -> None:
        super().__init__(direct=False)
        self.let_go = threading.Event()

    def pwrite(self, handle: int, data: Any, offset: int) -> None:
        assert self.let_go.wait(240)
        super().pwrite(handle, data, offset)
