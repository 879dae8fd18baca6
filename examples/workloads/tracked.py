"""Weights read out of one vector, layer by layer, whose gradient is collected and sent by `comms.shared_gradient`.

Autograd would hand the vector's gradient over once, at the end of backward. Here every layer's weights are a function
of the vector of their own, which gives its share to the tracker as soon as backward has reached it and returns nothing
to autograd. Shares are added in the order of backward, so sums differ from autograd's by rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...comms.shared_gradient import SharedGradient
from .contract import Place


class TrackedVector:
    """`uses[u]`: the entries of `vector` that layer u reads. `scaler` [m] multiplies the gradient before it leaves.

    Forward asks `read(u, …)` once for each layer, in order; `finish`, collective, then fills `vector.grad`.
    """

    def __init__(self, vector: nn.Parameter, uses: Sequence[Tensor], scaler: Tensor, place: Place) -> None:
        self.vector, self.uses, self.scaler, self.place = vector, uses, scaler, place
        self.shared = SharedGradient(vector.numel(), uses, dtype=vector.dtype)
        last = max((piece.owner for piece in self.shared.plan.pieces), default=0)
        self._early = sum(p.high - p.low for p in self.shared.plan.pieces if p.owner > 0) if last else 0

    def read(self, use: int, factor: Tensor) -> Tensor:
        """factor * vector[entries of use]; with autograd on, the first use begins a backward's collection."""
        if torch.is_grad_enabled() and use == 0:
            self.shared.begin()
        return _Read.apply(self.vector, factor, use, self)  # type: ignore[return-value]

    def give(self, use: int, values: Tensor) -> None:
        self.shared.add(use, values * self.scaler[self.uses[use]])

    def finish(self) -> None:
        self.vector.grad = self.shared.finish()
        self.place.count("gradients", passes=1, complete_early=self._early)

    def close(self) -> None:
        """Counts what was done into the run's evidence. Collective."""
        shared = self.shared
        self.place.count(
            "gradients",
            pieces=len(shared.plan.pieces),
            contributions=shared.contributions,
            messages=shared.sent,
            bytes=shared.bytes,
            sent_early=shared.early,
        )
        shared.close()


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vector: Tensor, factor: Tensor, use: int, tracked: TrackedVector) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.use, ctx.tracked = use, tracked
        return factor * vector[tracked.uses[use]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dw: Tensor) -> tuple[None, ...]:
        (factor,) = ctx.saved_tensors
        ctx.tracked.give(ctx.use, dw * factor)
        return None, None, None, None
