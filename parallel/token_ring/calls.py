"""Which call this is: what was asked for, agreed upon by the ranks, planned once and known by a number from then on.

A custom operator takes tensors and numbers. So what a caller asks for beside the tensors is a frozen `Asked`, which the
operator is told by its number, and a compiled graph serves every length; with the shapes it becomes a `Call` (problem,
schedules, group), whose number the backward operator is told. All ranks make the same calls in the same order, so that
a kind of call is new on all of them at once, and kinds that are forgotten go on all.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass, fields
from typing import Any

import torch

from ...comms.builders.attention_shape import Heads
from ...dist.errors import UserError
from ..agreement import agree
from ..masks import Mask
from ..partition import Group, group_of, rows_of
from .executors import Home, home
from .gate import ScheduleGate, gate_of, is_lean
from .inputs import Sizes, check_numbers
from .kernel_choice import picker, refuse_unfit
from .planner import Rates, resolve
from .problem import Problem


@dataclass(frozen=True)
class Asked:
    """The options of a call, as `token_ring_attention` takes them."""

    group: Group
    causal: bool
    window: int | None
    prefix: int
    cu_q: tuple[int, ...] | None
    cu_k: tuple[int, ...] | None
    layout: str
    lengths: tuple[int, int] | None
    scale: float | None
    schedules: tuple[str, str]
    return_lse: bool
    wire: torch.dtype | None
    kernel: str


@dataclass(frozen=True)
class Call:
    """One kind of call, the same on all ranks of `home`'s group. `names` and `gates`: of forward and backward; a gate
    chooses among names until it has measured."""

    problem: Problem
    names: tuple[str, str]
    gates: tuple[ScheduleGate | None, ScheduleGate | None]
    scale: float
    lse_gradient: bool
    kernel: str
    home: Home


_KEPT = 4096  # kinds of calls that are remembered; a call must be among them until its backward has run
_calls: dict[int, Call] = {}
_numbers: dict[tuple, int] = {}
_asked: dict[int, Asked] = {}
_asked_numbers: dict[Asked, int] = {}
_of_documents: deque[int] = deque()  # of these, those with bounds of documents
_next = itertools.count()


def ask(
    group: Any, causal: bool, window: int | None, prefix: int, cu_q: tuple[int, ...] | None,
    cu_k: tuple[int, ...] | None, layout: str, lengths: Any, scale: float | None, schedule: str, backward: str,
    return_lse: bool, wire: torch.dtype | None, kernel: str,
) -> int:  # fmt: skip
    """The number of what was asked for, after what can be told without tensors has been checked."""
    check_numbers(causal, window, prefix, scale, lengths, cu_q, cu_k, wire)
    picker(kernel)  # refuses an unknown name
    lengths = None if lengths is None else (lengths[0], lengths[1])
    asked = Asked(group_of(group), causal, window, prefix, cu_q, cu_k, layout, lengths, scale, (schedule, backward),
                  return_lse, wire, kernel)  # fmt: skip
    if (number := _asked_numbers.get(asked)) is not None:
        return number
    number = _asked_numbers[asked] = next(_next)
    _asked[number] = asked
    if cu_q is not None:  # documents differ in every batch; a compiled graph may use all others for ever
        _of_documents.append(number)
        while len(_of_documents) > _KEPT:
            del _asked_numbers[_asked.pop(_of_documents.popleft())]
    return number


# What torch.compiler.assume_constant_result sets, whose call imports the compiler: half the time that `import` takes.
ask._dynamo_marked_constant = True  # type: ignore[attr-defined]


def call(number: int) -> Call:
    """What `prepare` has numbered so."""
    return _calls[number]


def prepare(number: int, q: Sizes, k: Sizes, v: Sizes, dtype: torch.dtype, device: torch.device) -> int:
    """The number of the call of what was asked for under `number`, for these shapes. A new kind is agreed upon first:
    each rank has a part of it to check, and all or none go on."""
    asked = _asked[number]
    where, lean = home(asked.group, device), is_lean()
    cu_q, cu_k, lengths = asked.cu_q, asked.cu_k, asked.lengths
    if lengths is None:  # before the look-up: one rank's shard can be alike in two different calls
        lengths = (cu_q[-1], (cu_k or cu_q)[-1]) if cu_q is not None else _lengths(q[1], k[1], where)
    key = asked, q, k, v, dtype, device, id(where.executor), lengths, lean
    if key in _numbers:
        return _numbers[key]
    planned, refused = None, None
    try:
        planned = _planned(asked, q, k, v, dtype, device, where, lengths, lean)
    except UserError as error:
        refused = error
    if where.executor is not None:
        names = (f.name for f in fields(asked) if f.name not in ("group", "lengths"))
        given = {"lengths": lengths, **{name: getattr(asked, name) for name in names}, "dtype": dtype, "lean": lean,
                 "batch and heads": (q[0], q[2:], k[2:], v[2:])}  # fmt: skip
        agree("token_ring_attention", where.rank, given, refused, where.executor.gather)
    if planned is None:
        assert refused is not None
        raise refused
    found = _numbers[key] = next(_next)
    _calls[found] = planned
    if len(_numbers) > _KEPT:
        del _calls[_numbers.pop(next(iter(_numbers)))]
    return found


def _planned(
    asked: Asked, q: Sizes, k: Sizes, v: Sizes, dtype: torch.dtype, device: torch.device, where: Home,
    lengths: tuple[int, int], lean: bool,
) -> Call:  # fmt: skip
    """After what the shapes must be on this rank has been checked."""
    cu_q, cu_k, layout = asked.cu_q, asked.cu_k, asked.layout
    if cu_q is not None and q[0] != 1:
        raise UserError(
            f"cu_seqlens with a batch of {q[0]}",
            expected="packed documents in a batch of 1",
            remedy="put the rows one after the other, and their ends into cu_seqlens",
        )
    name = str(dtype).removeprefix("torch.")
    partial = "float64" if dtype == torch.float64 else "float32"
    sent = "" if asked.wire is None else str(asked.wire).removeprefix("torch.")
    heads = Heads(q[0], q[2], k[2], q[3], v[3], name, partial, sent)
    problem = Problem(where.world, *lengths, heads, Mask(asked.causal, asked.window, asked.prefix, cu_q, cu_k), layout)
    for what, rows, spans in (("queries", q[1], problem.q_spans), ("keys", k[1], problem.k_spans)):
        if rows != rows_of(spans[where.rank]):
            raise UserError(
                f"{rows} {what} on rank {where.rank} of {where.world}",
                expected=f"{rows_of(spans[where.rank])}: its part of {sum(map(rows_of, spans))} in layout '{layout}'",
                remedy="cut the sequence with shard_sequence, or pass layout= and lengths=",
            )
    rates = Rates.of(where.machine, name)
    names = [resolve(problem, rates, name, backward=bool(b)) for b, name in enumerate(asked.schedules)]
    for chosen in set(names):
        refuse_unfit(problem, chosen, asked.kernel, device)
    gates = [
        gate_of(where, problem, rates, backward=bool(b), lean=lean) if n == "auto" else None
        for b, n in enumerate(asked.schedules)
    ]
    return Call(
        problem,
        (names[0], names[1]),
        (gates[0], gates[1]),
        asked.scale if asked.scale is not None else 1 / math.sqrt(q[3]),
        asked.return_lse,
        asked.kernel,
        where,
    )


def _lengths(rows_q: int, rows_k: int, where: Home) -> tuple[int, int]:
    """Sums of the ranks' rows; collective."""
    if where.executor is None:
        return rows_q, rows_k
    mine = torch.tensor([rows_q, rows_k])
    total = torch.stack(where.executor.gather(mine)).sum(0)
    return int(total[0]), int(total[1])
