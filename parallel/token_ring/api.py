"""`token_ring_attention`: exact attention over a sequence that is spread over the ranks of a group, with gradients.

The call is one custom operator, forward and backward, so that autograd, activation checkpointing and torch.compile see
a single node. What a caller asked for beside the tensors it is told by number (`calls`), so that a compiled graph
serves every length; the number of the call is one of its results. Nothing else is kept between forward and backward but
inputs and results.

Legend: B batch, L rows of this rank, H query heads, G key heads, D and E head dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ...comms import local
from ...comms.builders.attention_shape import Heads
from ...comms.ops import Ops
from ..blocks import flex, measured
from ..kernels.row_products import row_dot
from ..masks import Mask
from ..merge import lse_dtype
from ..partition import Group, as_list
from . import calls
from .block_ops import ops
from .calls import Call
from .executors import homes
from .inputs import check_are_tensors, check_shapes, check_tensors, refuse_what_kernels_lack
from .planner import Rates, choose
from .problem import Problem


def token_ring_attention(
    q_BLHD: Tensor,
    k_BLGD: Tensor,
    v_BLGE: Tensor,
    *,
    group: Group | DeviceMesh = None,
    causal: bool = False,
    window: int | None = None,
    prefix: int = 0,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    cu_seqlens_k: Sequence[int] | Tensor | None = None,
    layout: str = "zigzag",
    lengths: tuple[int, int] | None = None,
    scale: float | None = None,
    schedule: str = "auto",
    backward_schedule: str = "auto",
    return_lse: bool = False,
    wire_dtype: torch.dtype | None = None,
    kernel: str = "auto",
    dropout: float = 0.0,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Any:
    """Attention of the whole sequence: this rank's rows of it, [B, L, H, E] in the dtype of q; collective over `group`.

    q [B, L, H, D], k [B, M, G, D] and v [B, M, G, E] are this rank's shards in `layout` (see `shard_sequence`).
    `group`: a process group, a mesh of one axis, or an `MpiGroup` where mpiexec started the ranks. `lengths`: the
    global numbers of queries and keys; None asks the group. `causal` puts the last query at the last key; `window` w
    lets a query see w keys up to itself; keys before `prefix` are seen by all; `cu_seqlens` are global bounds of packed
    documents. A query that sees no key gets zeros. `schedule`, `backward_schedule`: one of `problem.SCHEDULES`; 'auto'
    times the first calls of each shape (see `gate`), 'predicted' trusts the model. With
    `return_lse` also the log-sum-exp [B, L, H], which has a gradient. Sums are formed in float32 (float64 for float64)
    in a fixed order. q, k and v share a dtype; under torch.autocast they are cast to its, as by torch's own attention.
    `wire_dtype`: what partial results and gradients are kept and sent in; None takes that of q where nothing is lost by
    it (each block is one kernel call, which rounds to it anyway), else that of the sums; see docs/token-ring.md.
    `kernel`: what computes a block. 'auto' times those that can on CUDA (see `blocks.measured`) and takes the CPU's
    elsewhere; 'auto+flex' also compiles and times FlexAttention; a name of `blocks.select.ALL` takes that one, or
    raises `UserError` for a block that it cannot compute.
    """
    refuse_what_kernels_lack({"dropout": dropout, "softcap": softcap, "alibi_slopes": alibi_slopes})
    check_are_tensors(q_BLHD, k_BLGD, v_BLGE)
    q_BLHD, k_BLGD, v_BLGE = _as_autocast((q_BLHD, k_BLGD, v_BLGE))
    check_tensors(q_BLHD, k_BLGD, v_BLGE)
    check_shapes(q_BLHD.shape, k_BLGD.shape, v_BLGE.shape)
    asked = calls.ask(
        group, causal, window, prefix, _frozen(cu_seqlens), _frozen(cu_seqlens_k), layout, lengths, scale,
        schedule, backward_schedule, return_lse, wire_dtype, kernel,
    )  # fmt: skip
    out, lse, _ = torch.ops.undertow.token_ring_attention(q_BLHD, k_BLGD, v_BLGE, asked)
    return (out, lse) if return_lse else out


def _as_autocast(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """What torch's own attention makes of its inputs under autocast: all in its dtype, float64 left as it is.

    Models need it: rotary embeddings and norms of q and k give float32 there, while v is a product, in 16 bits.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors]


def _frozen(bounds: Sequence[int] | Tensor | None) -> tuple[int, ...] | None:
    found = as_list(bounds)
    return None if found is None else tuple(found)


@lru_cache(maxsize=256)
def _table(problem: Problem, inner: int, scale: float, lse_gradient: bool, kernel: str) -> Ops:
    return ops(problem, inner, scale, lse_gradient=lse_gradient, kernel=kernel)


def _run(call: Call, backward: bool, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run a phase on rows-first tensors, by the schedule that was asked for or that its gate chooses."""

    def run(name: str) -> dict[str, Tensor]:
        return _run_by(call, name, backward, inputs)

    gate, device = call.gates[backward], inputs["q"].device
    with torch.autocast(device.type, enabled=False):  # sums are formed in the dtype of the plan
        return run(call.names[backward]) if gate is None else gate.run(run, device)


def _run_by(call: Call, name: str, backward: bool, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run one schedule; key heads are repeated where heads are dealt to more ranks than that."""
    problem, copies = call.problem, call.problem.kv_copies(name)
    if copies > 1:
        inputs = {n: x.repeat_interleave(copies, 2) if n in "kv" else x for n, x in inputs.items()}
    schedule = problem.schedule(name, backward=backward)
    table = _table(problem, problem.inner(name), call.scale, call.lse_gradient, call.kernel)
    if call.home.executor is None:
        device = inputs["q"].device
        with torch.no_grad():
            (found,) = local.run(schedule, [inputs], table, device=device)
    else:
        found = call.home.executor.run(schedule, inputs, table, blocking=inputs["q"].device.type == "cpu")
    if copies > 1 and backward:
        found = {n: x.unflatten(2, (-1, copies)).sum(3) if n != "dq" else x for n, x in found.items()}
    return found


def _rows_first(x: Tensor) -> Tensor:
    return x.detach().transpose(0, 1).contiguous()


@torch.library.custom_op("undertow::token_ring_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, asked: int) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode(False):  # lanes are threads, which write to what is allocated here
        number = calls.prepare(asked, tuple(q.shape), tuple(k.shape), tuple(v.shape), q.dtype, q.device)
        found = _run(calls.call(number), False, {"q": _rows_first(q), "k": _rows_first(k), "v": _rows_first(v)})
        out, lse = (found[name].transpose(0, 1).contiguous() for name in ("out", "lse"))
    return out.to(q.dtype), lse, torch.tensor(number, dtype=torch.int64, device="cpu")


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, asked: int) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
    return out, lse, torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.custom_op("undertow::token_ring_attention_backward", mutates_args=())
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor, number: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    call = calls.call(int(number))
    delta = row_dot(dout, out, lse.dtype) - dlse.to(lse.dtype).masked_fill(torch.isneginf(lse), 0)
    dout = dout.to(q.dtype)
    inputs = {"q": q, "k": k, "v": v, "dout": dout, "lse": lse, "delta": delta}
    found = _run(call, True, {name: _rows_first(x) for name, x in inputs.items()})
    dq, dk, dv = (found[name].to(x.dtype).transpose(0, 1).contiguous() for name, x in (("dq", q), ("dk", k), ("dv", v)))
    return dq, dk, dv


@_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor, number: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:3], *output)


def _gradient(ctx: Any, dout: Tensor, dlse: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, number = ctx.saved_tensors
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    found = torch.ops.undertow.token_ring_attention_backward(dout, q, k, v, out, lse, dlse, number)
    return (*(g if wanted else None for g, wanted in zip(found, ctx.needs_input_grad)), None)


_forward.register_autograd(_gradient, setup_context=_save)


def explain(
    lengths: tuple[int, int], *, world: int, batch: int = 1, q_heads: int, kv_heads: int, head_dim: int,
    v_dim: int | None = None, dtype: torch.dtype = torch.bfloat16, machine: Any = None, layout: str = "zigzag",
    topology: str = "ports", **mask: Any,
) -> None:  # fmt: skip
    """Print, for both phases, every schedule's bytes, buffers and predicted seconds, which one the model takes, and
    what 'auto' has measured in this process: schedules for this problem, and kernels for all kinds of blocks. Also what
    was compiled for FlexAttention, and in how many seconds.

    Needs no process group. `machine`: a `Machine` (from `undertow probe`); None assumes round figures. `mask`: the
    fields of `masks.Mask`.
    """
    from rich.console import Console

    name = str(dtype).removeprefix("torch.")
    partial = "float64" if dtype == torch.float64 else "float32"
    heads = Heads(batch, q_heads, kv_heads, head_dim, v_dim or head_dim, name, partial)
    problem = Problem(world, *lengths, heads, Mask(**mask), layout)
    rates = Rates.of(machine, name, topology=topology)
    for backward in (False, True):
        Console(highlight=False).print(choose(problem, rates, backward=backward, every=True).table())
        for gates in (where.gates for where in homes()):
            for gate in (gates.get((problem, backward, lean)) for lean in (False, True)):
                if gate is not None:
                    print(gate)
    for line in (*measured.report(), *flex.report()):
        print(line)
