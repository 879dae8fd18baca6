"""Switch streaming on and off: `stream_backprop(model)` as a context, or `enable(model)` … `disable(model)`.

Inside, `model(input_ids=…, labels=…).loss.backward()` (or the plain protocol's own call) is streamed; parameters,
state dict, optimizer and training loop stay as they are. By default everything is chosen: a plan is made from the bytes
that are free when a batch shape first comes, and kept for that shape as long as it fits, so that equal steps round
equally.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from numbers import Integral, Real

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ...dist.errors import UserError
from ...dist.launch import detect
from ...dist.log import get_logger
from ...dist.units import format_bytes
from .deepspeed_zero import is_partitioned
from .engine import Adapter, Engine
from .plain import PlainAdapter
from .plan import StreamPlan
from .planner import plan as make_plan
from .protocol import Attend, Ranks, StreamableModel

log = get_logger(__name__)
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
    ranks: Ranks | None = None,
    plan: StreamPlan | None = None,
) -> Engine:
    """Stream `model` until `disable`; returns the engine (`report()`, `last_plan`).

    `budget_bytes`: device bytes above weights and gradients (default: what is free; 80 % of it on a CPU).
    `host_budget_bytes`: for offload (default: 80 % of free host memory on CUDA, none on a CPU). `chunk`: rows.
    `offload`, `stash`: force all, or none, of layer inputs off the device, of attention outputs kept. `every=n`: keep
    every n-th layer input. `plan` replaces planning.

    `attend`: a differentiable attention of your own (over ranks, for one) in place of the one here; the mask is then
    its business. It is called once for all rows of a layer, whatever the chunks, and again in backward where its output
    was not kept. Ranks that meet in it must keep alike: `ranks` (a `ContextParallel`, say) lets them agree in every
    forward pass; without it all inputs are kept and no outputs, or all of these with `stash=True`.

    `UserError` for a model without decoder layers.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"a model of type {type(model).__name__}", expected="a torch.nn.Module")
    if _ENGINE in model.__dict__:
        raise UserError("streaming is already on for this model", remedy="call disable(model) first")
    _check_numbers(budget_bytes=budget_bytes, host_budget_bytes=host_budget_bytes, chunk=chunk, loss_rows=loss_rows)
    if every is not None and (not isinstance(every, Integral) or every < 1):
        raise UserError(f"every={every!r}", expected="n of at least 1: every n-th layer input is kept")
    for name, choice in (("offload", offload), ("stash", stash)):
        if choice not in (None, True, False):
            raise UserError(f"{name}={choice!r}", expected="True, False, or None to have it planned")
    if plan is not None and not isinstance(plan, StreamPlan):
        raise UserError(f"plan={plan!r}", expected="a StreamPlan")
    if attend is not None and not callable(attend):
        raise UserError(f"attend={attend!r}", expected="a function of (q, k, v)")
    if ranks is not None and attend is None:
        raise UserError("ranks without attend", remedy="pass the attention over these ranks as attend")
    adapter = adapter_for(model)
    spacing = every
    if any(isinstance(layer, FSDPModule) or is_partitioned(layer.parameters()) for layer in adapter.layers):
        if every not in (None, 1):
            raise UserError(
                f"every={every} with FSDP or ZeRO 3",
                remedy="leave it out: a neighbour's weights are not there in backward",
            )
        spacing = 1
    if attend is not None and ranks is None:  # nobody to agree with on how often it is called
        spacing, stash = spacing or 1, bool(stash)
    engine: Engine
    plans: dict[tuple, StreamPlan] = {}
    told: set[torch.Size] = set()

    def planner(x: Tensor) -> StreamPlan:
        if plan is not None:
            return _checked(plan, x, len(adapter.layers))
        budget = _free_bytes(model, x.device) if budget_bytes is None else budget_bytes
        budget = budget if engine.limit_bytes is None else min(budget, engine.limit_bytes)
        mine = made(x, budget, spacing, None)
        if ranks is None or not torch.is_grad_enabled():
            return mine
        every = -ranks.least(-mine.every) if spacing is None else spacing
        mine = mine if every == mine.every else made(x, budget, every, None)
        settled = ranks.least(mine.settled) if stash is None else mine.settled
        return mine if settled == mine.settled else made(x, budget, every, settled)

    def made(x: Tensor, budget: int, every: int | None, settled: int | None) -> StreamPlan:
        key = x.shape, x.dtype, torch.is_grad_enabled(), every, settled
        if key in plans and plans[key].device_bytes <= budget:
            return plans[key]
        host = host_budget_bytes
        if host is None:
            host = _host_bytes(engine) if x.device.type == "cuda" else 0
        host = 0 if offload is False and not stash else host
        plans[key] = make_plan(
            adapter.shape(x),
            x.shape[0],
            x.shape[1],
            budget_bytes=budget,
            host_bytes=host,
            chunk=chunk,
            loss_rows=loss_rows,
            every=every,
            offload=offload,
            stash=stash,
            kernel=x.device.type == "cuda",
            ranks=0 if attend is None else 1 if ranks is None else ranks.size,
            settled=settled,
        )
        if plans[key].device_bytes > budget and x.shape not in told:
            told.add(x.shape)
            need, text = format_bytes(plans[key].device_bytes), f"{x.shape[0]} x {x.shape[1]} tokens"
            log.warning(
                "streaming %s needs %s by prediction, more than the %s there are", text, need, format_bytes(budget)
            )
        return plans[key]

    engine = Engine(adapter, planner, attention_backend=attention_backend, attend=attend)
    engine.enable()
    model.__dict__[_ENGINE] = engine
    return engine


def check_names(options: Mapping[str, object]) -> None:
    """For whoever keeps options until training begins: a name that `enable` does not take is refused at once."""
    known = [name for name in inspect.signature(enable).parameters if name != "model"]
    for name in options:
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise UserError(
                f"streaming has no option '{name}'",
                expected=f"some of {', '.join(known)}",
                remedy=f"write {near[0]}" if near else "",
            )


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
    ranks: Ranks | None = None,
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
        ranks=ranks,
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


def _check_numbers(**options: int | None) -> None:
    for name, value in options.items():
        if value is None:
            continue
        if name.endswith("_bytes"):
            kind, least, expected = Real, 0, "a number of bytes, such as 20 * 2**30"
        else:
            kind, least, expected = Integral, 1, "a whole number of rows, at least 1"
        if not isinstance(value, kind) or isinstance(value, bool) or value < least:
            raise UserError(f"{name}={value!r}", expected=expected)


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
