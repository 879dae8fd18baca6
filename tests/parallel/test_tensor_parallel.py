"""Tensor-parallel layers beside the unsharded ones and beside torch's own styles: outputs, gradients, state dicts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from undertow.dist.errors import UserError
from undertow.parallel import (
    ColumnParallelLinear,
    OverlapColwiseParallel,
    OverlapRowwiseParallel,
    RowParallelLinear,
    SequenceParallelMLP,
    Team,
    close_teams,
)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x_BTC)))


def _styles(rank: int, world: int, overlap: str, seed: int) -> None:
    """The same plan by torch's styles, by ours, and one whole MLP, in float64: 1e-12 is rounding."""
    mesh = init_device_mesh("cpu", (world,))
    team = Team(mesh.get_group(), overlap=overlap)
    torch.manual_seed(seed)
    whole = MLP().double()
    theirs, ours = MLP().double(), MLP().double()
    for copy in (theirs, ours):
        copy.load_state_dict(whole.state_dict())
    plan = {"up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel(output_layouts=Shard(1))}
    parallelize_module(theirs, mesh, plan)
    plan = {"up": OverlapColwiseParallel(group=team), "down": OverlapRowwiseParallel(group=team)}
    parallelize_module(ours, mesh, plan)
    x = torch.randn(2, 2 * world, 6, dtype=torch.float64)
    target = torch.randn_like(x)
    inputs = [x.clone().requires_grad_()] + [x.chunk(world, 1)[rank].clone().requires_grad_() for _ in range(2)]
    (whole(inputs[0]) * target).sum().backward()
    outs = []
    for model, mine in zip((theirs, ours), inputs[1:]):
        outs.append(model(mine))
        (outs[-1] * target.chunk(world, 1)[rank]).sum().backward()
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-12, atol=1e-12)
    assert inputs[0].grad is not None
    torch.testing.assert_close(inputs[2].grad, inputs[0].grad.chunk(world, 1)[rank], rtol=1e-12, atol=1e-12)
    states = theirs.state_dict(), ours.state_dict()
    assert list(states[0]) == list(states[1])
    for (name, a), (_, b), full in zip(states[0].items(), states[1].items(), whole.parameters()):
        assert (a.placements, a.shape, a.device_mesh) == (b.placements, b.shape, b.device_mesh), name
        assert torch.equal(a.to_local(), b.to_local()), name
        gradients = [dict(m.named_parameters())[name].grad.full_tensor() for m in (theirs, ours)]
        assert full.grad is not None
        torch.testing.assert_close(gradients[1], full.grad, rtol=1e-12, atol=1e-12, msg=name)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12, msg=name)
    ours.load_state_dict(states[0])
    with pytest.raises(UserError, match="an nn.Linear"):
        parallelize_module(nn.LayerNorm(4), mesh, OverlapColwiseParallel(group=team))
    with pytest.raises(UserError, match="a multiple of the ranks"):
        ColumnParallelLinear(4, 6 * world + 1, group=team)
    team.close()


@pytest.mark.parametrize(("world", "overlap"), [(2, "on"), (3, "auto")])
def test_styles_are_those_of_torch(ranks, seed, world, overlap):
    ranks(world, _styles, overlap, seed)


def _layers(rank: int, world: int, seed: int) -> None:
    """Layers made from scratch, with 5 tokens that the world does not divide; gated and plain."""
    for gated in (True, False):
        torch.manual_seed(seed + rank)  # rank 0's parameters count
        mlp = SequenceParallelMLP(6, 4 * world, gated=gated, bias=True, dtype=torch.float64)
        state = {name: value.full_tensor() for name, value in mlp.state_dict().items()}
        x = torch.randn(5, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        up = x @ state["up.weight"].t() + state["up.bias"]
        inner = F.silu(x @ state["gate.weight"].t() + state["gate.bias"]) * up if gated else F.gelu(up)
        want = inner @ state["down.weight"].t() + state["down.bias"]
        parts = x.chunk(world)
        mine = parts[rank] if rank < len(parts) else x[:0]
        got = mlp(mine, tokens=5)
        torch.testing.assert_close(got, (*want.chunk(world), want[:0])[rank], rtol=1e-12, atol=1e-12)
    assert isinstance(mlp.up, ColumnParallelLinear) and isinstance(mlp.down, RowParallelLinear)
    close_teams()


@pytest.mark.parametrize("world", [1, 3])
def test_an_mlp_of_any_number_of_tokens_is_the_whole_one(ranks, seed, world):
    ranks(world, _layers, seed)
