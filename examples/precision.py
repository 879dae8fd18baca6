"""In which numbers a run computes, and what that asks of its loop: autocast, loss scaling, or a model cast as a whole.

Half-precision gradients underflow, so fp16 multiplies the loss and divides the gradients again. A step whose gradients
overflowed is left out, and the ranks must agree on that: with tensor parallelism an overflow may stand in one rank's
shards only. torch's GradScaler looks at its own rank, and cannot take DTensors and tensors together; `SharedScaler`
differs in that one method. (Micikevicius et al. 2018, section 3.2.)
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ..dist.errors import UserError

Model = TypeVar("Model", bound=nn.Module)

PRECISIONS = ("auto", "fp32", "bf16", "fp16", "pure-bf16")  # auto: bf16 on a GPU, else fp32


class SharedScaler(torch.amp.GradScaler):
    """torch's, for ranks that hold different parts: all leave a step out, or none. `unscale_` is collective."""

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: torch.Tensor, found_inf: torch.Tensor, allow_fp16: bool
    ) -> dict[torch.device, torch.Tensor]:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        grads = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inv_scale)
        if dist.is_initialized():
            dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)
        return {found_inf.device: found_inf}


@dataclass
class Precision:
    """`name` on one rank's device. Weights and optimizer state stay float32, except in pure-bf16."""

    name: str
    device: torch.device
    scaler: SharedScaler | None = None

    @classmethod
    def of(cls, name: str, device: torch.device) -> Precision:
        if name not in PRECISIONS:
            raise UserError(f"precision '{name}'", expected=f"one of {', '.join(PRECISIONS)}")
        if name == "auto":
            name = "bf16" if device.type == "cuda" else "fp32"
        return cls(name, device, SharedScaler(device.type) if name == "fp16" else None)

    def prepare(self, model: Model) -> Model:
        """Before anything else holds the parameters. Buffers keep their type: rotary frequencies need it."""
        if self.name == "pure-bf16":
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
        return model

    def autocast(self) -> contextlib.AbstractContextManager:
        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = dtypes.get(self.name)
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Once all gradients of an update are there and averaged, before they are clipped. Collective."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.scaler is None:
            optimizer.step()
            return
        self.scaler.step(optimizer)
        self.scaler.update()

    def state(self) -> dict[str, Any]:
        """What belongs into a checkpoint beside model and optimizer."""
        return {} if self.scaler is None else {"scaler": self.scaler}
