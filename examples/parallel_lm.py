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
from ..parallel.overlap_team import Team
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
        self.query = ColumnParallelLinear.from_linear(block.query, team, mesh=mesh)
        self.key = ColumnParallelLinear.from_linear(block.key, team, mesh=mesh)
        self.value = ColumnParallelLinear.from_linear(block.value, team, mesh=mesh)
        self.gate = ColumnParallelLinear.from_linear(block.gate, team, mesh=mesh)
        self.up = ColumnParallelLinear.from_linear(block.up, team, mesh=mesh)
        self.output = RowParallelLinear.from_linear(block.output, team, mesh=mesh)
        self.down = RowParallelLinear.from_linear(block.down, team, mesh=mesh)

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


class _TokensSecond(ParallelBlock):
    """The same on [B, t, C], as streaming cuts rows. Between blocks the tokens stay first in memory: no copies."""

    def forward(self, x_BtC: Tensor, positions_1T: Tensor, attend: Attend = causal_attention) -> Tensor:
        return super().forward(x_BtC.transpose(0, 1), positions_1T, attend).transpose(0, 1)


class ParallelLM(ByteLM):
    """`model` on the ranks of `team`, whose parts it takes over; every rank holds the same whole `model` before."""

    def __init__(self, model: ByteLM, team: Team, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        check_degree(model.config, team)
        self.config, self.team = model.config, team
        self.embedding, self.norm, self.head = model.embedding, model.norm, model.head
        self.blocks = nn.ModuleList(_TokensSecond(block, team, mesh) for block in model.blocks)  # type: ignore[arg-type]

    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        attend: Attend = causal_attention,
        num_items: Tensor | int | None = None,
    ) -> Tensor:
        """Logits [B, t, V] or the loss of this rank's tokens; every rank of the team passes the same whole rows."""
        total = tokens_BT.shape[1]
        if total % self.team.world:
            raise UserError(
                f"{total} tokens over {self.team.world} tensor-parallel ranks",
                expected="a whole number on each",
                remedy="choose another --length",
            )
        share = token_share(total, self.team)
        labels_Bt = None if labels_BT is None else labels_BT[:, share]
        if positions is None:
            positions = torch.arange(total, device=tokens_BT.device)[None]
        x_BtC = self.embedding(tokens_BT[:, share])
        for block in self.blocks:
            x_BtC = block(x_BtC, positions, attend)
        return self.token_logits(x_BtC) if labels_Bt is None else self.loss(x_BtC, labels_Bt, num_items)


def check_degree(config: LMConfig, team: Team) -> None:
    """Refuse more ranks than heads and channels can be shared by."""
    for name in ("heads", "kv_heads", "hidden"):
        if getattr(config, name) % team.world:
            raise UserError(
                f"{name} {getattr(config, name)} over {team.world} tensor-parallel ranks",
                expected="a whole number on each",
                remedy="lower --tensor-parallel, or choose another recipe",
            )
