"""Fine-tuned checkpoints as task vectors, read block by block from disk.

τ_t = θ_t − θ_0 is never held: a block of θ_t is a view of the checkpoint file's mapping, subtracted when it is needed
and read again in backward. So the memory of composing T models is that of one block, whatever T is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...checkpointing.folder import read_manifest
from ...checkpointing.reader import Reader
from .contract import Place


class Source:
    """The blocks of one model: a checkpoint on disk, or a state dict where checkpoints are switched off."""

    def __init__(self, place: Place, *, path: Path | None = None, state: dict[str, Tensor] | None = None) -> None:
        self.place, self.state = place, state
        self.reader = None if path is None else Reader(path, read_manifest(path))

    def block(self, name: str) -> Tensor:
        """Block `name`; of a checkpoint, a view of the mapped file."""
        if self.reader is None:
            assert self.state is not None
            return self.state[name]
        record = self.reader.manifest.tensors[f"model.{name}"]
        assert len(record.shards) == 1  # these models are replicated: one box is the whole block
        found = self.reader.shard(f"model.{name}", record.shards[0])
        self.place.count("checkpoint", blocks_read=1, bytes_read=found.numel() * found.element_size())
        return found


class Compose(torch.autograd.Function):
    """θ_0 + Σ_t c_t · τ_t for one block. Keeps neither θ_t nor τ_t: backward reads the block again."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, name: str, base: Source, experts: list[Source]) -> Tensor:
        ctx.name, ctx.base, ctx.experts = name, base, experts
        device = coefficients.device
        start = base.block(name).to(device)
        block = start.clone()
        for coefficient, expert in zip(coefficients, experts):
            block.add_((expert.block(name).to(device) - start) * coefficient)
        return block

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        device = gradients[0].device
        start = ctx.base.block(ctx.name).to(device)
        parts = [((expert.block(ctx.name).to(device) - start) * gradients[0]).sum() for expert in ctx.experts]
        return torch.stack(parts), None, None, None
