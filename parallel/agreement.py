"""One clear error on every rank, where ranks call one collective with different arguments.

A rank that refuses its arguments before a collective, or brings a tensor of another size, leaves its peers waiting
until a time-out. So every rank first says in a few numbers what it was given, and whether it can go on with that; then
all go on, or all raise. It costs one small collective, which must itself be called by all ranks alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..dist.errors import UserError

Gather = Callable[[Tensor], Sequence[Tensor]]


def agree(what: str, rank: int, given: Mapping[str, object], refused: UserError | None, gather: Gather) -> None:
    """Return where all ranks were `given` the same and none has `refused`; else raise `UserError`, on every rank.

    Collective. `given`: values by name, compared by their text; the same names on all ranks. `gather`: every rank's
    tensor [names + 1] int64 on the CPU, in rank order. The rank that refused raises its own error.
    """
    mine = [int(refused is None), *map(_digest, given.values())]
    found = [row.tolist() for row in gather(torch.tensor(mine))]
    if refused is not None:
        raise refused
    for at, (name, value) in enumerate(given.items(), 1):
        if others := [r for r, row in enumerate(found) if row[at] != mine[at]]:
            raise UserError(
                f"{what}: {name} is {_short(value)} on rank {rank}, and not the same on rank{'s' * (len(others) > 1)} "
                f"{', '.join(map(str, others))}",
                expected=f"one {name} on all {len(found)} ranks of the group",
                remedy="make the same call on every rank; only the shard itself differs",
            )
    if stopped := [r for r, row in enumerate(found) if not row[0]]:
        raise UserError(
            f"{what}: refused on rank{'s' * (len(stopped) > 1)} {', '.join(map(str, stopped))}",
            expected="arguments that fit on every rank",
            remedy="see the error of that rank",
        )


def _digest(value: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "big", signed=True)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
