"""Tensor parallelism with sequence-parallel activations, on overlapped products.

Between the products every rank holds its share of the tokens, so norms, residuals and the loss are computed once
(Korthikanti et al. 2022, section 4.2.2). A column-parallel layer gathers tokens while it multiplies, a row-parallel
one hands out finished rows while it multiplies. Weights are DTensors, `Shard(0)` of columns and `Shard(1)` of rows, so
their names and global shapes are those of the whole model, and a checkpoint restores on any layout.

Legend: B batch, T tokens of all ranks, t tokens of this rank, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ..dist.errors import UserError
from .overlapped_linear import Team, all_gather_matmul, matmul_reduce_scatter, shard_rows


def sharded(weight: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    """`weight`, equal on all ranks, as a parameter of which each rank keeps its shard along `dim`."""
    if weight.shape[dim] % mesh.size():
        raise UserError(
            f"a weight of {tuple(weight.shape)} over {mesh.size()} tensor-parallel ranks",
            expected=f"dimension {dim} divisible by the ranks",
        )
    return nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(dim)], src_data_rank=None))


class ColumnParallelLinear(nn.Module):
    """[t, B, K] of this rank's tokens → [T, B, N / W] of all tokens. Replaces a linear layer without bias."""

    def __init__(self, linear: nn.Linear, team: Team, mesh: DeviceMesh) -> None:
        super().__init__()
        _plain(linear)
        self.weight = sharded(linear.weight, mesh, 0)
        self.team = team

    def forward(self, x_tBK: Tensor, tokens: int) -> Tensor:
        """`tokens`: T."""
        return gather_products(x_tBK, [self], tokens)[0]


def gather_products(x_tBK: Tensor, layers: Sequence[ColumnParallelLinear], tokens: int) -> tuple[Tensor, ...]:
    """`layer(x, tokens)` of each layer, in one gather and one product; `tokens`: T."""
    weights, batch = [_local(layer.weight) for layer in layers], x_tBK.shape[1]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    rows = x_tBK.flatten(0, 1)
    out = all_gather_matmul(rows, weight, layers[0].team, total=tokens * batch, transposed=True)
    return out.unflatten(0, (tokens, batch)).split([w.shape[0] for w in weights], dim=-1)


class RowParallelLinear(nn.Module):
    """[T, B, K / W] of all tokens → [t, B, N] of this rank's tokens, summed. Replaces a linear layer without bias."""

    def __init__(self, linear: nn.Linear, team: Team, mesh: DeviceMesh) -> None:
        super().__init__()
        _plain(linear)
        self.weight = sharded(linear.weight, mesh, 1)
        self.team = team

    def forward(self, x_TBK: Tensor) -> Tensor:
        batch = x_TBK.shape[1]
        out = matmul_reduce_scatter(x_TBK.flatten(0, 1), _local(self.weight), self.team, transposed=True)
        return out.unflatten(0, (-1, batch))


def _local(weight: nn.Parameter) -> Tensor:
    assert isinstance(weight, DTensor)
    return weight.to_local()


def _plain(linear: nn.Linear) -> None:
    if linear.bias is not None:
        raise UserError("a tensor-parallel layer of a linear with bias", expected="bias=False")


def token_share(tokens: int, team: Team) -> slice:
    """The tokens that this rank holds between products."""
    sizes = shard_rows(tokens, team.world)
    start = sum(sizes[: team.rank])
    return slice(start, start + sizes[team.rank])
