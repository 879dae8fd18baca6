"""Switch streaming on and off: `stream_backprop(model)` as a context, or `enable(model)` … `disable(model)`.

Inside, `model(input_ids=…, labels=…).loss.backward()` (or the plain protocol's own call) is streamed; parameters,
state dict, optimizer and training loop stay as they are. By default everything is chosen: a plan is made from the bytes
that are free when a batch shape first comes, and kept for that shape as long as it fits, so that equal steps round
equally.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ...dist.errors import UserError
from ...dist.launch import detect
from .engine import Adapter, Engine
from .plain import PlainAdapter
from .plan import StreamPlan
from .planner import plan as make_plan
from .protocol import Attend, StreamableModel

_ENGINE = "_undertow_stream_engine"
HOST_SHARE = 0.8  # of the free host memory, divided among the ranks of a host


def enable(
    model: nn.Module,
    *,
    budget_bytes: int | None = None,
    host_budget_bytes: int | None = None,
    chunk: int | None = None,
    loss_rows: int | None = None,
    offload: bool | None = None,
    stash: bool | None = None,
    every: int | None = None,
    attention_backend: str | None = None,
    attend: Attend | None = None,
    plan: StreamPlan | None = None,
) -> Engine:
    """Stream `model` until `disable`; returns the engine (`report()`, `last_plan`).

    `budget_bytes`: device bytes above weights and gradients (default: what is free; 80 % of it on a CPU).
    `host_budget_bytes`: for offload (default: 80 % of free host memory on CUDA, none on a CPU). `chunk`: rows.
    `offload`, `stash`: force all, or none, of layer inputs off the device, of attention outputs kept. `every=2`: keep
    every second layer input. `plan` replaces planning. `attend`: a differentiable attention of your own (over ranks,
    for one) in place of the one here. The mask is then its business, and a layer runs in one chunk, so that its
    collectives run twice per layer on every rank (forward, and again in backward). `UserError` for a model without
    decoder layers.
    """
    if _ENGINE in model.__dict__:
        raise UserError("streaming is already on for this model", remedy="call disable(model) first")
    if every not in (None, 1, 2):
        raise UserError(f"every={every}", expected="1 (each layer's input) or 2 (every second one)")
    if attend is not None and (chunk or stash or plan is not None or every == 2):
        raise UserError(
            "attend with chunk, stash, every=2 or plan", remedy="leave these out: a layer is one chunk then"
        )
    adapter = adapter_for(model)
    spacing = every
    if any(isinstance(layer, FSDPModule) for layer in adapter.layers):
        if every == 2:
            raise UserError("every=2 with FSDP", remedy="leave it out: a neighbour's weights are not there in backward")
        spacing = 1
    if attend is not None:
        spacing, stash = 1, False
    engine: Engine
    plans: dict[tuple, StreamPlan] = {}

    def planner(x: Tensor) -> StreamPlan:
        if plan is not None:
            return _checked(plan, x, len(adapter.layers))
        on_cuda = x.device.type == "cuda"
        budget = _free_bytes(model, x.device) if budget_bytes is None else budget_bytes
        budget = budget if engine.limit_bytes is None else min(budget, engine.limit_bytes)
        key = x.shape, x.dtype, torch.is_grad_enabled()
        if key in plans and plans[key].device_bytes <= budget:
            return plans[key]
        host = host_budget_bytes
        if host is None:
            host = _host_bytes(engine) if on_cuda else 0
        plans[key] = make_plan(
            adapter.shape(x),
            x.shape[0],
            x.shape[1],
            budget_bytes=budget,
            host_bytes=0 if offload is False and not stash else host,
            chunk=chunk if attend is None else x.shape[1],
            loss_rows=loss_rows,
            every=spacing,
            offload=offload,
            stash=stash,
            kernel=on_cuda,
        )
        return plans[key]

    engine = Engine(adapter, planner, attention_backend=attention_backend, attend=attend)
    engine.enable()
    model.__dict__[_ENGINE] = engine
    return engine


def disable(model: nn.Module) -> None:
    """Put the model back as `enable` found it; nothing happens when streaming is off."""
    engine = model.__dict__.pop(_ENGINE, None)
    if engine is not None:
        engine.disable()


@contextlib.contextmanager
def stream_backprop(
    model: nn.Module,
    *,
    budget_bytes: int | None = None,
    host_budget_bytes: int | None = None,
    chunk: int | None = None,
    loss_rows: int | None = None,
    offload: bool | None = None,
    stash: bool | None = None,
    every: int | None = None,
    attention_backend: str | None = None,
    attend: Attend | None = None,
    plan: StreamPlan | None = None,
) -> Iterator[Engine]:
    """`enable` with these options on entry, `disable` on exit. Backward must run inside."""
    engine = enable(
        model,
        budget_bytes=budget_bytes,
        host_budget_bytes=host_budget_bytes,
        chunk=chunk,
        loss_rows=loss_rows,
        offload=offload,
        stash=stash,
        every=every,
        attention_backend=attention_backend,
        attend=attend,
        plan=plan,
    )
    try:
        yield engine
    finally:
        disable(model)


def adapter_for(model: nn.Module) -> Adapter:
    """How the engine sees `model`; `UserError` for a model that has no decoder layers."""
    if isinstance(model, StreamableModel):
        return PlainAdapter(model)
    from .hf import HfAdapter

    return HfAdapter(model)


def _checked(plan: StreamPlan, x: Tensor, layers: int) -> StreamPlan:
    if (plan.batch, plan.tokens, len(plan.inputs)) != (x.shape[0], x.shape[1], layers):
        raise UserError(
            f"the plan is for {plan.batch} x {plan.tokens} tokens and {len(plan.inputs)} layers",
            expected=f"{x.shape[0]} x {x.shape[1]} tokens and {layers} layers",
        )
    return plan


def _free_bytes(model: nn.Module, device: torch.device) -> int:
    """Bytes that this process can still allocate, less the gradients that do not exist yet."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available * HOST_SHARE) // detect().local_world_size
    free, _ = torch.cuda.mem_get_info(device)
    total, reserved = torch.cuda.get_device_properties(device).total_memory, torch.cuda.memory_reserved(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device))
    free = min(free, max(0, allowed - reserved))
    cached = reserved - torch.cuda.memory_allocated(device)
    missing = [p for p in model.parameters() if p.requires_grad and p.grad is None]
    return free + cached - sum(getattr(p, "_local_tensor", p).numel() * p.element_size() for p in missing)


def _host_bytes(engine: Engine) -> int:
    ours = 0 if engine.courier is None else engine.courier.pool.nbytes
    return ours + int(psutil.virtual_memory().available * HOST_SHARE) // detect().local_world_size
