"""Mixture-of-Recursions on tensor-parallel ranks: the same parameters by name, products overlapped with messages.

A rank holds its share of the tokens, and its share of each block's heads and channels. Who recurs depends on all
tokens of a row, so the ranks gather one score for each token, and all choose alike. The recursions run in their masked
form: tokens stay where they are.

Legend: B batch, T tokens of all ranks, t tokens of this rank, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dist.errors import UserError
from ..lm import Block
from ..parallel_lm import ParallelBlock, check_degree
from .mor import MoR, MoRConfig, Recursion, among
from .tensor_ranks import TensorRanks


class ParallelMoR(MoR):
    """`MoR` with the blocks' weights spread over `ranks`. Every rank passes the same whole rows."""

    def __init__(self, config: MoRConfig, ranks: TensorRanks) -> None:
        super().__init__(config, masked=True)
        check_degree(self.config, ranks.team)
        if config.length % ranks.team.world:
            raise UserError(f"{config.length} tokens over {ranks.team.world} ranks", expected="a whole number on each")
        self.ranks = ranks
        spread: dict[nn.Module, ParallelBlock] = {}  # the recursions' block is one module

        def note(module: nn.Module, inputs: Any, out: Any) -> None:
            ranks.multiplied(out)

        def parallel(block: nn.Module) -> ParallelBlock:
            assert isinstance(block, Block)
            if block not in spread:
                spread[block] = ParallelBlock(block, ranks.team, ranks.mesh)
                spread[block].register_forward_hook(note)
            return spread[block]

        for index, layer in enumerate(self.stream_layers):
            if isinstance(layer, Recursion):
                layer.block = parallel(layer.block)
            else:
                self.stream_layers[index] = parallel(layer)

    def forward(
        self, tokens: Tensor, labels: Tensor | None = None, lots: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Logits [B, T, V] on every rank; with labels the loss of this rank's tokens, for a mean over the ranks."""
        first, *middle, last = self.stream_layers
        own = self.ranks.share(tokens.shape[1])
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        x = first(self.embedding(tokens[:, own].t()), positions)
        alive = torch.ones_like(tokens, dtype=x.dtype)
        told = x.new_zeros(())
        lots = torch.zeros(len(middle), *tokens.shape, device=x.device) if lots is None else lots
        for recursion, layer in enumerate(middle):
            assert isinstance(layer, Recursion)

            def score(head: nn.Module, x: Tensor = x) -> Tensor:
                return self.ranks.whole(head(x)[..., 0]).t()

            chosen = self.choose(score, alive, recursion, lots, causal)
            if self.mor.tokens(recursion) < tokens.shape[1] and self.mor.router == "learned":
                logits = self.foretell[recursion](x.detach())[..., 0]
                told = told + F.binary_cross_entropy_with_logits(logits, chosen[:, own].t(), weight=alive[:, own].t())
            change = layer.weighed(x, layer.block(x, positions, among(chosen)) - x)
            x = x + change * chosen[:, own].t()[..., None]
            alive = chosen
        x = last(x, positions)
        if labels is None:
            return self.ranks.whole(self.token_logits(x)).transpose(0, 1)
        return self.loss(x, labels[:, own].t()) + 0.1 * told
