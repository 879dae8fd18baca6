"""DeepSpeed ZeRO stage 3: whose weights are here, and when.

Stage 3 gathers a module's weights just before its forward and its backward. Streaming enters a layer once per chunk, so
each layer must be gathered as a whole, once: DeepSpeed calls such a module a leaf. `prepare(model)` marks the decoder
layers, before `deepspeed.initialize`; then the collectives do not depend on the number of chunks, which may differ
between ranks. Norm and head run inside the loss, away from DeepSpeed's hooks: `with_weights` gathers them for its
forward and again for its backward, until their gradients have been accumulated. Stages 1 and 2 leave weights whole and
need nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def prepare(model: nn.Module) -> nn.Module:
    """Mark the decoder layers of `model` for stage 3, before `deepspeed.initialize`; returns `model`."""
    from deepspeed.utils import set_z3_leaf_module

    from .api import adapter_for

    for layer in adapter_for(model).layers:
        set_z3_leaf_module(layer, True)
    return model


def is_partitioned(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether stage 3 manages some of them."""
    return any(hasattr(parameter, "ds_id") for parameter in parameters)


def are_here(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether all of them are whole at this moment."""
    return all(p.numel() == getattr(p, "ds_numel", p.numel()) for p in parameters)


def gathered(parameters: Iterable[nn.Parameter]) -> contextlib.AbstractContextManager:
    """They are whole inside; a collective under stage 3, nothing otherwise."""
    away = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not away:
        return contextlib.nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(away)


def with_weights(parameters: Iterable[nn.Parameter], x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """`compute()`, a function of x and `parameters`, with these whole in forward and in backward."""
    parameters = list(parameters)
    if not is_partitioned(parameters):
        return compute()
    with gathered(parameters):
        value = compute()
    if not value.requires_grad:
        return value
    backward = gathered(parameters)
    if x.requires_grad:  # its gradient is handed on only after those of leaves have been accumulated
        x.register_hook(lambda _: backward.__exit__(None, None, None))
    return _Before.apply(value, backward, not x.requires_grad)  # type: ignore[return-value]


class _Before(torch.autograd.Function):
    """The identity; enters a context before the backward of what made its input."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, context: contextlib.AbstractContextManager, leave_at_the_end: bool) -> Tensor:
        ctx.context, ctx.leave_at_the_end = context, leave_at_the_end
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        context = ctx.context
        context.__enter__()
        if ctx.leave_at_the_end:
            torch.autograd.Variable._execution_engine.queue_callback(lambda: context.__exit__(None, None, None))
        return gradient, None, None
