"""Gradients of the whole batch: averaged over the ranks in a fixed order, and scaled down to a norm.

Under tensor parallelism some parameters are shards. Their gradients need no message, as the products brought in every
rank's tokens, but each rank's loss is a mean over its own tokens, so they are divided by the ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ...comms.gradients import GradientAverage
from .tracked import TrackedVector


class Gradients:
    """Of `model`; what it collects itself during backward (`tracked`, a `TrackedVector`) is left to it."""

    def __init__(self, model: nn.Module, tracked: TrackedVector | None = None) -> None:
        self.tracked = tracked
        trained: list[nn.Parameter] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.shards: list[nn.Parameter] = [parameter for parameter in trained if isinstance(parameter, DTensor)]
        self.whole = [parameter for parameter in trained if not isinstance(parameter, DTensor)]
        averaged = [p for p in self.whole if tracked is None or p is not tracked.vector]
        self._average = GradientAverage(averaged)
        self.nbytes = sum(parameter.numel() * parameter.element_size() for parameter in averaged)  # of one average

    def reduce(self) -> None:
        """Make every gradient that of the whole batch. Collective."""
        self._average()
        if self.tracked is not None:
            self.tracked.finish()
        for grad in self._local(self.shards):
            grad.div_(dist.get_world_size())

    def clip(self, limit: float) -> None:
        """Scale all gradients down to a global norm of `limit`. Collective where there are shards."""
        if not self.shards:
            nn.utils.clip_grad_norm_(self.whole, limit)
            return
        whole, shards = self._local(self.whole), self._local(self.shards)
        square = nn.utils.get_total_norm(shards).square()
        dist.all_reduce(square)
        norm = (nn.utils.get_total_norm(whole).square() + square).sqrt()
        torch._foreach_mul_([*whole, *shards], (limit / (norm + 1e-6)).clamp(max=1.0))

    @staticmethod
    def _local(parameters: list[nn.Parameter]) -> list[Tensor]:
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
