"""State that a wrapper spreads over the ranks without DTensors: taken where each rank holds whole tensors, or refused.

`ZeroRedundancyOptimizer` (ZeRO 1) gives every rank whole parameters and an inner optimizer for its share of them; the
outer one's `state` is empty, so that whoever saves it saves nothing. FSDP 1 cuts a flat tensor at places that no name
tells, and the same name means other elements on every rank: saved as if it were replicated, most of it would be lost.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..dist.errors import UserError


def own_part(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer whose `state` and groups are what this rank updates: itself, or the one inside of ZeRO 1."""
    zero = _is(optimizer, "torch.distributed.optim", "ZeroRedundancyOptimizer")
    return getattr(optimizer, "optim") if zero else optimizer  # noqa: B009  # only that class has it


def refuse_unknown(things: Mapping[str, Any]) -> None:
    """`UserError` for an object among the named `things` whose parts on the ranks cannot be told apart."""
    for name, thing in things.items():
        if _is(thing, "torch.distributed.optim", "ZeroRedundancyOptimizer") and thing._overlap_with_ddp:
            raise UserError(
                f"'{name}' is a ZeroRedundancyOptimizer with overlap_with_ddp=True, which writes where no hook tells",
                remedy="pass overlap_with_ddp=False",
            )
        parts = thing.modules() if isinstance(thing, nn.Module) else ()
        if any(_is(part, "torch.distributed.fsdp", "FullyShardedDataParallel") for part in parts):
            raise UserError(
                f"'{name}' is wrapped by FullyShardedDataParallel (FSDP 1), whose flat shards have no names",
                expected="a module sharded by torch.distributed.fsdp.fully_shard (FSDP 2)",
                remedy="use fully_shard",
            )


def _is(thing: Any, module: str, name: str) -> bool:
    """Whether `thing` is of a class that need not be imported for it: who holds one has imported it."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(thing, kind)
