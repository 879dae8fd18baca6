"""The main job's model trains at a context that plain checkpointing cannot hold in the same bytes, along one curve."""

import contextlib

import pytest
import torch

from undertow.examples.lm import ByteLM, LMConfig
from undertow.parallel.stream import stream_backprop
from undertow.parallel.stream.track import PeakBytes

TOKENS, BUDGET, STEPS = 2048, 12 << 20, 3


def train(plain):
    """Losses of `STEPS` steps, and the peak of live bytes above weights, gradients and optimizer in the last one."""
    torch.manual_seed(0)
    model = ByteLM(LMConfig(layers=4, width=64, heads=4, kv_heads=2, hidden=176))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    text = torch.arange(TOKENS + 1)[None] * 7 % 251
    memory = PeakBytes()
    with stream_backprop(model, budget_bytes=BUDGET) as engine:
        engine.plain = plain
        for step in range(STEPS):
            with memory if step == STEPS - 1 else contextlib.nullcontext():
                loss = model(text[:, :-1], text[:, 1:])
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            losses.append(loss.item())
    return losses, memory.peak


@pytest.mark.slow
def test_longer_context_in_the_same_budget_with_the_same_losses(seed):
    plain_losses, plain_peak = train(plain=True)
    losses, peak = train(plain=False)
    assert plain_peak > BUDGET >= peak
    assert losses[-1] < losses[0] - 0.3, "it learns"
    for mine, theirs in zip(losses, plain_losses):
        assert abs(mine - theirs) < 1e-4 * theirs  # float32 rounding, through a few steps of AdamW
