"""Tensor-parallel linear layers on overlapped products, with activations sharded along the sequence between them.

Between the products every rank holds its share of the tokens, so norms, residuals and the loss are computed once
(Korthikanti et al. 2022, section 4.2.2). A column-parallel layer gathers tokens while it multiplies, a row-parallel one
hands out finished rows while it multiplies. Parameters are the DTensors that torch's ColwiseParallel and
RowwiseParallel make, under the same names, so a checkpoint fits either, and any layout. A layer *is* its `nn.Linear`,
turned in place (as torch's fully_shard does), so that whatever holds the module goes on holding it.

Legend: T tokens of all ranks, t of this rank (cut as torch.chunk does), B batch, K and N the whole layer's features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ..comms.chunk_plan import chunk_rows
from ..dist.errors import UserError
from .overlap_team import Team
from .overlap_teams import team_of
from .overlapped_linear import Group, all_gather_matmul, matmul_reduce_scatter


class _ParallelLinear(nn.Linear):
    """What both layers share: parameters as DTensors on `mesh`, a team, and the dimension that holds the tokens."""

    _placements: dict[str, Placement]
    _split: str  # which size the ranks share
    team: Team
    seq_dim: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: Group = None,
        seq_dim: int = 0,
        mesh: DeviceMesh | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._shard(group, seq_dim, mesh, 0)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, group: Group = None, *, seq_dim: int = 0, mesh: DeviceMesh | None = None,
        src_data_rank: int | None = None,
    ) -> Any:  # fmt: skip
        """Turn `linear` itself into this layer, and return it. Collective.

        `group`: as in `overlapped_linear`. `mesh`: a one-dimensional mesh over the same ranks, for the parameters.
        `src_data_rank`: the mesh's rank whose values count; None where they are equal on all ranks already.
        """
        if type(linear) is not nn.Linear:
            raise UserError(f"a {type(linear).__name__}", expected="a plain nn.Linear")
        linear.__class__ = cls
        linear._shard(group, seq_dim, mesh, src_data_rank)  # type: ignore[operator]
        return linear

    def _shard(self, group: Group, seq_dim: int, mesh: DeviceMesh | None, src_data_rank: int | None) -> None:
        self.team, self.seq_dim = team_of(group, self.weight.device), seq_dim
        size = getattr(self, self._split)
        if size % self.team.world:
            raise UserError(
                f"{self._split} {size} over {self.team.world} tensor-parallel ranks", expected="a multiple of the ranks"
            )
        for name, parameter in list(self.named_parameters(recurse=False)):
            where = [self._placements[name]]
            made = distribute_tensor(parameter.detach(), mesh or self.team.mesh, where, src_data_rank=src_data_rank)
            self.register_parameter(name, nn.Parameter(made, requires_grad=parameter.requires_grad))

    def _local(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.weight, self.bias
        return _local(weight), None if bias is None else _local(bias)


class ColumnParallelLinear(_ParallelLinear):
    """[t, B, K] of this rank's tokens → [T, B, N / W] of all tokens (with `seq_dim` 0; 1 takes [B, t, K])."""

    _placements, _split = {"weight": Shard(0), "bias": Shard(0)}, "out_features"

    def forward(self, input: Tensor, tokens: int | None = None) -> Tensor:
        """`tokens`: T, where the world does not divide it."""
        return gather_products(input, [self], tokens)[0]


class RowParallelLinear(_ParallelLinear):
    """[T, B, K / W] of all tokens → [t, B, N] of this rank's tokens, summed over the ranks, plus the bias."""

    _placements, _split = {"weight": Shard(1), "bias": Replicate()}, "in_features"

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self._local()
        out = matmul_reduce_scatter(input, weight.t(), "sum", self.seq_dim, self.team)
        return out if bias is None else out + _Shared.apply(bias, self.team.group)


def gather_products(x: Tensor, layers: Sequence[ColumnParallelLinear], tokens: int | None = None) -> tuple[Tensor, ...]:
    """`layer(x, tokens)` of each of several layers of one team, with one gather."""
    first, local = layers[0], [layer._local() for layer in layers]
    weights = [weight.t() for weight, _ in local]
    _, outs = all_gather_matmul(x, weights, first.seq_dim, first.team, return_A=False, total=tokens)
    return tuple(out if bias is None else out + bias for out, (_, bias) in zip(outs, local))


class SequenceParallelMLP(nn.Module):
    """down(act(up(x))), or down(silu(gate(x)) · up(x)) with `gated`: [t, B, C] → [t, B, C], one gather and one scatter.

    Parameters are named gate, up and down, and equal those of the same MLP of nn.Linear under torch's styles.
    """

    def __init__(
        self, features: int, hidden: int, *, gated: bool = True, bias: bool = False, group: Group = None,
        seq_dim: int = 0, mesh: DeviceMesh | None = None, device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        options: Any = {"group": group, "seq_dim": seq_dim, "mesh": mesh, "device": device, "dtype": dtype}
        self.gate = ColumnParallelLinear(features, hidden, bias, **options) if gated else None
        self.up = ColumnParallelLinear(features, hidden, bias, **options)
        self.down = RowParallelLinear(hidden, features, bias, **options)

    def forward(self, x: Tensor, tokens: int | None = None) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x, tokens)))
        gate, up = gather_products(x, [self.gate, self.up], tokens)
        return self.down(F.silu(gate) * up)


class _Overlap(ParallelStyle):
    """`seq_dim`: the dimension that holds the tokens. `group`: None takes the mesh's, with overlap chosen by the gate;
    a `Team` over the same ranks fixes what it was made with."""

    layer: type[_ParallelLinear]

    def __init__(self, *, seq_dim: int = 1, group: Group = None) -> None:
        super().__init__()
        self.seq_dim, self.group = seq_dim, group

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, nn.Linear):
            raise UserError(f"{type(self).__name__} of a {type(module).__name__}", expected="an nn.Linear")
        group = self.group if self.group is not None else device_mesh.get_group()
        return self.layer.from_linear(
            module, group, seq_dim=self.seq_dim, mesh=device_mesh, src_data_rank=self.src_data_rank
        )


class OverlapColwiseParallel(_Overlap):
    """For `parallelize_module`, in the place of ColwiseParallel(input_layouts=Shard(seq_dim)): local tensors in and
    out, [B, t, K] → [B, T, N / W], gathered while they are multiplied."""

    layer = ColumnParallelLinear


class OverlapRowwiseParallel(_Overlap):
    """For `parallelize_module`, in the place of RowwiseParallel(output_layouts=Shard(seq_dim)): local tensors in and
    out, [B, T, K / W] → [B, t, N], reduced and scattered while they are multiplied."""

    layer = RowParallelLinear


class _Shared(torch.autograd.Function):
    """A parameter that all ranks hold and each uses for its own tokens: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, group: dist.ProcessGroup | None) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.to_local()


def token_share(tokens: int, team: Team) -> slice:
    """The tokens that this rank holds between products."""
    sizes = chunk_rows(tokens, team.world)
    start = sum(sizes[: team.rank])
    return slice(start, start + sizes[team.rank])
