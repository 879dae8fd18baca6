"""Attention on tensor-parallel ranks: heads are split over them, tokens between the products.

Queries, keys and values are gathered in one product each, for one gather, and every rank attends with its own heads to
all tokens; the output product hands out rows while it is made (Korthikanti et al. 2022, figure 5). Positions and masks
are the caller's: `rotate` and `attend` see whole sequences.

Legend: T tokens of all ranks, t of this one, B batch, C features, H query and G key heads of this rank, D of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..dist.errors import UserError
from .overlapped_linear import Group
from .tensor_parallel import ColumnParallelLinear, RowParallelLinear, gather_products


def causal(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Tensor:
    """Softmax attention of each token to those up to itself."""
    return F.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, is_causal=True, enable_gqa=True)


class SequenceParallelAttention(nn.Module):
    """[t, B, C] → [t, B, C] (with `seq_dim` 0; 1 takes [B, t, C]): one gather, one scatter. Collective.

    `attend(q, k, v)`: [B, H, T, D], [B, G, T, D] twice → [B, H, T, D]; `rotate(y)`: q and k with their positions in
    them. Parameters are named query, key, value and output, as the DTensors of torch's styles.
    """

    def __init__(
        self, features: int, heads: int, *, kv_heads: int | None = None, head_dim: int | None = None,
        bias: bool = False, attend: Callable[[Tensor, Tensor, Tensor], Tensor] = causal,
        rotate: Callable[[Tensor], Tensor] | None = None, group: Group = None, seq_dim: int = 0,
        mesh: DeviceMesh | None = None, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if seq_dim not in (0, 1):
            raise UserError(f"seq_dim {seq_dim}", expected="0 for [t, B, C] or 1 for [B, t, C]")
        kv_heads, self.dim = kv_heads or heads, head_dim or features // heads
        if heads % kv_heads or (head_dim is None and features % heads):
            raise UserError(
                f"{heads} heads, {kv_heads} key heads, {features} features",
                expected="heads a multiple of key heads, and features of heads where head_dim is not given",
            )
        options: Any = {"group": group, "seq_dim": seq_dim, "mesh": mesh, "device": device, "dtype": dtype}
        self.query = ColumnParallelLinear(features, heads * self.dim, bias, **options)
        self.key = ColumnParallelLinear(features, kv_heads * self.dim, bias, **options)
        self.value = ColumnParallelLinear(features, kv_heads * self.dim, bias, **options)
        self.output = RowParallelLinear(heads * self.dim, features, bias, **options)
        world = self.query.team.world
        if heads % world or kv_heads % world:
            raise UserError(
                f"{heads} heads and {kv_heads} key heads over {world} tensor-parallel ranks",
                expected="a whole number of each on a rank",
            )
        self.heads, self.kv_heads, self.seq_dim = heads // world, kv_heads // world, seq_dim
        self.attend, self.rotate = attend, rotate

    def forward(self, x: Tensor, tokens: int | None = None) -> Tensor:
        """`tokens`: T, where the world does not divide it."""
        q, k, v = gather_products(x, [self.query, self.key, self.value], tokens)
        q, k, v = self._split(q, self.heads), self._split(k, self.kv_heads), self._split(v, self.kv_heads)
        if self.rotate is not None:
            q, k = self.rotate(q), self.rotate(k)
        mixed_BTHD = self.attend(q, k, v).transpose(1, 2)
        return self.output((mixed_BTHD if self.seq_dim else mixed_BTHD.transpose(0, 1)).flatten(2))

    def _split(self, y: Tensor, heads: int) -> Tensor:
        """[T, B, heads · D] or [B, T, heads · D] → [B, heads, T, D]."""
        y = y.unflatten(-1, (heads, self.dim))
        return y.transpose(1, 2) if self.seq_dim else y.permute(1, 2, 0, 3)
