"""Switch streaming on and off: `stream_backprop(model)` as a context, or `enable(model)` … `disable(model)`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ...dist.errors import UserError
from .engine import Adapter, Engine
from .plain import PlainAdapter
from .plan import StreamPlan
from .protocol import StreamableModel

_ENGINES = "_undertow_stream_engine"


def enable(
    model: nn.Module,
    *,
    chunk: int | None = None,
    loss_rows: int | None = None,
    attention_backend: str | None = None,
) -> Engine:
    if _ENGINES in model.__dict__:
        raise UserError("streaming is already on for this model", remedy="call disable(model) first")
    adapter = _adapter(model)

    def planner(batch: int, tokens: int, dtype: torch.dtype, device: torch.device) -> StreamPlan:
        return StreamPlan.simple(batch, tokens, len(adapter.layers), chunk or 8192)

    engine = Engine(adapter, planner, attention_backend=attention_backend)
    engine.enable()
    model.__dict__[_ENGINES] = engine
    return engine


def disable(model: nn.Module) -> None:
    engine = model.__dict__.pop(_ENGINES, None)
    if engine is not None:
        engine.disable()


@contextlib.contextmanager
def stream_backprop(model: nn.Module, **options) -> Iterator[Engine]:
    engine = enable(model, **options)
    try:
        yield engine
    finally:
        disable(model)


def _adapter(model: nn.Module) -> Adapter:
    if isinstance(model, StreamableModel):
        return PlainAdapter(model)
    from .hf import HfAdapter

    return HfAdapter(model)
