"""The vocabulary-parallel loss beside torch's cross entropy of the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from undertow.dist.errors import UserError
from undertow.parallel.overlap_loss import vocab_parallel_cross_entropy


def _against_the_whole(rank: int, world: int, seed: int) -> None:
    """float32 against float64: 2e-6 covers the rounding of sums of 11 exponentials and of logits below 100."""
    generator = torch.Generator().manual_seed(seed)
    logits = 30 * torch.randn(9, 11, generator=generator)
    logits[0] += 1e4  # does not overflow
    labels = torch.randint(0, 11, (9,), generator=generator)
    labels[3] = -100
    weights = torch.rand(9, generator=generator)
    whole = logits.double().requires_grad_()
    wanted = F.cross_entropy(whole, labels, reduction="none")
    (wanted * weights).sum().backward()
    sizes = [11 // world + (r < 11 % world) for r in range(world)]
    mine = logits.split(sizes, 1)[rank].clone().requires_grad_()
    found = vocab_parallel_cross_entropy(mine, labels, sum(sizes[:rank]))
    (found * weights).sum().backward()
    assert whole.grad is not None and mine.grad is not None
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(mine.grad.double(), whole.grad.split(sizes, 1)[rank], rtol=2e-5, atol=2e-6)
    with pytest.raises(UserError, match="label 11"):
        vocab_parallel_cross_entropy(mine, torch.full((9,), 11), sum(sizes[:rank]))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_losses_and_gradients_are_those_of_the_whole_vocabulary(ranks, seed, world):
    ranks(world, _against_the_whole, seed)
