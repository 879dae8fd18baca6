"""Operations that schedules name: an executor is handed a table {op name: function}.

A function gets the read slices, the written slices and the action's parameters, and fills the written slices in place:
``fn(reads, writes, **params) -> None``. A reduce or merge may be given a write that is the memory of a read with the
same place in its group (out over out, never out over log-sum-exp). An operation that makes its results itself may be
`Giving` instead of having them copied. These few are needed by the collectives; attention blocks and their merge come
from `parallel`, as callers' tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from ..dist.errors import UserError
from .schedule import Schedule

Op = Callable[..., None]
Ops = Mapping[str, Op]


@dataclass(frozen=True)
class Giving:
    """An operation whose results are fresh tensors that an executor may keep (see `adoption`).

    ``give(reads, **params)`` returns them in the order and shapes of the writes, or None where they are not made in one
    piece: then `fill` is called, which takes the writes as any other operation. Both give the same bits. Their dtypes
    and strides may be others than those that the schedule declares; the results that `loose` counts are kept as they
    lie in memory, because who reads them takes any strides.
    """

    fill: Op
    give: Callable[..., Sequence[torch.Tensor] | None]
    loose: frozenset[int] = frozenset()

    def __call__(self, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor], **params: object) -> None:
        self.fill(reads, writes, **params)


def add(reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
    """Sum in the order of the reads, in the widest dtype among reads and write; the write is rounded once."""
    (out,) = writes
    wide = reduce(torch.promote_types, (part.dtype for part in reads), out.dtype)
    if len(reads) == 2 and torch.promote_types(reads[0].dtype, reads[1].dtype) == out.dtype == wide:
        torch.add(reads[0], reads[1], out=out)
        return
    total = reads[0].to(wide)
    for part in reads[1:]:
        total = total + part
    out.copy_(total)


def copy(reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
    """Move each read to its write."""
    for source, target in zip(reads, writes):
        target.copy_(source)


def gemm(reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
    """x[rows, k] @ w[k, n] → out[rows, n]."""
    x, w = reads
    torch.mm(x, w, out=writes[0])


def gemm_t(reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
    """x[rows, k] @ w[n, k].T → out[rows, n]: the product of a linear layer, whose weight needs no copy."""
    x, w = reads
    torch.mm(x, w.t(), out=writes[0])


BUILT_IN: Ops = {"add": add, "copy": copy, "gemm": gemm, "gemm_t": gemm_t}


def table(schedule: Schedule, ops: Ops | None) -> Ops:
    """The built-in operations with the caller's `ops` on top; `UserError` when the schedule names another one."""
    known = {**BUILT_IN, **(ops or {})}
    missing = schedule.operations - known.keys()
    if missing:
        raise UserError(
            f"schedule {schedule.name} needs the operation(s) {', '.join(sorted(missing))}",
            expected=f"a function for each; known are {', '.join(sorted(known))}",
            remedy="hand the executor a table {name: function}, see undertow/comms/ops.py",
        )
    return known
