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
    SequenceParallelAttention,
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


def _attention(rank: int, world: int, seed: int) -> None:
    """Heads over ranks beside attention written out from the same weights in float64: 1e-12 is rounding."""
    heads, kv_heads, dim = 2 * world, world, 4
    for tokens, seq_dim in ((5, 0), (2 * world, 1)):
        torch.manual_seed(seed + rank)  # rank 0's parameters count

        def turned(y_BHTD: torch.Tensor) -> torch.Tensor:
            return y_BHTD * torch.arange(1.0, y_BHTD.shape[2] + 1, dtype=y_BHTD.dtype)[:, None]

        block = SequenceParallelAttention(
            6, heads, kv_heads=kv_heads, head_dim=dim, bias=True, rotate=turned, seq_dim=seq_dim, dtype=torch.float64
        )
        generator = torch.Generator().manual_seed(seed)
        x_BTC = torch.randn(3, tokens, 6, dtype=torch.float64, generator=generator, requires_grad=True)
        state = {name: value.full_tensor().requires_grad_() for name, value in block.state_dict().items()}

        def split(name: str, count: int, x: torch.Tensor = x_BTC, state: dict = state) -> torch.Tensor:
            y = x @ state[f"{name}.weight"].t() + state[f"{name}.bias"]
            return y.unflatten(-1, (count, dim)).transpose(1, 2).repeat_interleave(heads // count, 1)

        q, k, v = turned(split("query", heads)), turned(split("key", kv_heads)), split("value", kv_heads)
        scores = (q @ k.mT * dim**-0.5).masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        want = mixed @ state["output.weight"].t() + state["output.bias"]
        target = torch.randn(want.shape, dtype=torch.float64, generator=generator)
        (want * target).sum().backward()

        def mine(y_BTC: torch.Tensor, seq_dim: int = seq_dim) -> torch.Tensor:
            y = y_BTC if seq_dim else y_BTC.transpose(0, 1)
            parts = y.chunk(world, seq_dim)
            return parts[rank] if rank < len(parts) else y.narrow(seq_dim, 0, 0)

        x_mine = mine(x_BTC.detach()).clone().requires_grad_()
        out = block(x_mine, tokens)
        torch.testing.assert_close(out, mine(want.detach()), rtol=1e-12, atol=1e-12)
        (out * mine(target)).sum().backward()
        assert x_BTC.grad is not None
        torch.testing.assert_close(x_mine.grad, mine(x_BTC.grad), rtol=1e-12, atol=1e-12)
        for name, parameter in block.named_parameters():
            torch.testing.assert_close(parameter.grad.full_tensor(), state[name].grad, rtol=1e-12, atol=1e-12, msg=name)
    if world > 1:
        with pytest.raises(UserError, match="a whole number of each on a rank"):
            SequenceParallelAttention(12, 4 * world, kv_heads=1, head_dim=world)
    with pytest.raises(UserError, match="heads a multiple of key heads"):
        SequenceParallelAttention(12, 3, kv_heads=2)
    close_teams()


@pytest.mark.parametrize("world", [1, 3])
def test_attention_with_its_heads_over_ranks_is_the_whole_one(ranks, seed, world):
    ranks(world, _attention, seed)
