"""Context parallelism beside FSDP2 and tensor parallelism on a 2×2 mesh: losses and gradients of one process."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

from undertow.parallel.context_parallel import ContextParallel

WIDTH, HEADS, LENGTH = 32, 4, 22


class Block(nn.Module):
    """Attention and a linear layer. `attend` is given as an argument, so that one model serves all arms."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x, attend):
        q, k, v = (layer(x).unflatten(2, (-1, WIDTH // HEADS)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return x + self.out(attend(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x, attend, again=False):
        for block in self.blocks:
            x = checkpoint(block, x, attend, use_reentrant=False) if again else block(x, attend)
        return x


def _whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def _composed(rank, world, kind):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("other", "context"))
    torch.manual_seed(0)
    model = Model()
    x, target = torch.randn(2, 2, LENGTH, WIDTH)  # two sequences

    def plain(q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    alone = copy.deepcopy(model)
    (alone(x, plain) - target).square().mean().backward()
    context = ContextParallel(mesh["context"].get_group(), LENGTH)
    mine = slice(None)
    if kind == "fsdp":
        for block in model.blocks:
            fully_shard(block, mesh=mesh._flatten("all"))  # parameters over both axes, gradients averaged over them
        fully_shard(model, mesh=mesh["all"])
        mine = slice(mesh.get_coordinate()[0], mesh.get_coordinate()[0] + 1)  # data parallel along 'other'
    else:
        plan = {name: ColwiseParallel() for name in ("q", "k", "v")} | {"out": RowwiseParallel()}
        for block in model.blocks:
            parallelize_module(block, mesh["other"], plan)
    part, wanted = context.shard(x[mine]), context.shard(target[mine])
    out = model(part, context.attend, again=True)
    share = (out - wanted).square().sum() / target[mine].numel()
    context.loss(share).backward()
    for (name, got), reference in zip(model.named_parameters(), alone.parameters()):
        assert got.grad is not None and reference.grad is not None
        grad = _whole(got.grad)
        if kind == "tensor":  # the mean over the context axis, which FSDP takes by itself
            grad = grad.clone()
            torch.distributed.all_reduce(grad, group=context.group)
            grad /= 2
        torch.testing.assert_close(grad, reference.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ["fsdp", "tensor"])
def test_gradients_are_those_of_one_process(kind, ranks):
    """Sums of float32 in another order: 1e-5 of values of about 0.01 to 1. With activation checkpoints around all."""
    ranks(4, _composed, kind)
