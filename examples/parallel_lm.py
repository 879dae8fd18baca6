"""The byte LM on tensor-parallel ranks: the same parameters by name and global shape, its products overlapped.

A block gathers tokens for its query, key and value product and for its gate and up product, and hands out rows of its
two other products; everything else works on this rank's tokens. Queries, keys and values are one product, and so are
gate and up, because every gather costs a message.

Legend: B batch, T tokens of all ranks, t of this rank, C channels, H query heads and G key heads of this rank, D dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..dist.errors import UserError
from ..parallel.overlapped_linear import Team
from ..parallel.stream.protocol import Attend, causal_attention
from ..parallel.tensor_parallel import ColumnParallelLinear, RowParallelLinear, gather_products, token_share
from .lm import Block, ByteLM, LMConfig


class ParallelBlock(nn.Module):
    """`Block` on the ranks of `team`; module names are Block's."""

    def __init__(self, block: Block, team: Team, mesh: DeviceMesh) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = block.heads // team.world, block.kv_heads // team.world, block.dim
        self.team, self.rope = team, block.rope
        self.attention_norm, self.mlp_norm = block.attention_norm, block.mlp_norm
        self.query = ColumnParallelLinear(block.query, team, mesh)
        self.key = ColumnParallelLinear(block.key, team, mesh)
        self.value = ColumnParallelLinear(block.value, team, mesh)
        self.gate = ColumnParallelLinear(block.gate, team, mesh)
        self.up = ColumnParallelLinear(block.up, team, mesh)
        self.output = RowParallelLinear(block.output, team, mesh)
        self.down = RowParallelLinear(block.down, team, mesh)

    def forward(self, x_tBC: Tensor, positions_1T: Tensor, attend: Attend = causal_attention) -> Tensor:
        tokens = positions_1T.shape[1]
        q, k, v = gather_products(self.attention_norm(x_tBC), [self.query, self.key, self.value], tokens)

        def split(y_TBC: Tensor, heads: int) -> Tensor:
            return y_TBC.unflatten(-1, (heads, self.dim)).permute(1, 2, 0, 3)  # [B, heads, T, D]

        q_BHTD, k_BGTD = self.rope(split(q, self.heads), positions_1T), self.rope(split(k, self.kv_heads), positions_1T)
        mixed_BHTD = attend(q_BHTD, k_BGTD, split(v, self.kv_heads))
        x_tBC = x_tBC + self.output(mixed_BHTD.permute(2, 0, 1, 3).flatten(2))
        gate, up = gather_products(self.mlp_norm(x_tBC), [self.gate, self.up], tokens)
        return x_tBC + self.down(F.silu(gate) * up)


def parallelize(model: ByteLM, team: Team, mesh: DeviceMesh) -> None:
    """Replace the blocks in place. Every rank holds the same whole `model` before and its shards after."""
    check_degree(model.config, team)
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        model.blocks[index] = ParallelBlock(block, team, mesh)


def check_degree(config: LMConfig, team: Team) -> None:
    """Refuse more ranks than heads and channels can be shared by."""
    for name in ("heads", "kv_heads", "hidden"):
        if getattr(config, name) % team.world:
            raise UserError(
                f"{name} {getattr(config, name)} over {team.world} tensor-parallel ranks",
                expected="a whole number on each",
                remedy="lower --tensor-parallel, or choose another recipe",
            )


def loss(model: ByteLM, tokens_BT: Tensor, labels_BT: Tensor, team: Team) -> Tensor:
    """The mean loss of this rank's tokens; the mean over the ranks is that of all. All pass the same whole rows."""
    total = tokens_BT.shape[1]
    if total % team.world:
        raise UserError(
            f"{total} tokens over {team.world} tensor-parallel ranks",
            expected="a whole number on each",
            remedy="choose another --length",
        )
    share = token_share(total, team)
    positions_1T = torch.arange(total, device=tokens_BT.device)[None]
    x_tBC = model.embedding(tokens_BT[:, share].t())
    for block in model.blocks:
        x_tBC = block(x_tBC, positions_1T)
    return model.loss(x_tBC, labels_BT[:, share].t())
