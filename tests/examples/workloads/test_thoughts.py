"""Continuous thoughts: reading with a cache is reading it all again, and renaming leaves a problem the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from undertow.dist.launch import detect
from undertow.examples.workloads.contract import Place
from undertow.examples.workloads.reachability import a_shortest_path, distances, problems, renamed
from undertow.examples.workloads.thoughts import WORKLOAD, Thinker, ThoughtsConfig
from undertow.parallel.stream.protocol import causal_attention

CONFIG = ThoughtsConfig(how="trained", nodes=10, edges=16, depth=3, width=32, heads=4)


def thinker(how: str = "trained") -> Thinker:
    torch.manual_seed(2)
    return Thinker(CONFIG.but(how=how)).double()


def whole(model: Thinker, x_BTC: torch.Tensor) -> torch.Tensor:
    """All hidden states, without a cache and by the model's own attention."""
    positions = torch.arange(x_BTC.shape[1])[None]
    for block in model.lm.blocks:
        x_BTC = block(x_BTC, positions, causal_attention)
    return model.lm.norm(x_BTC)


def test_thoughts_with_a_cache_are_those_without():
    """In float64; and so are the gradients, which pass through every thought."""
    prompt, gradients, logits = torch.randint(0, 13, (3, 11)), [], []
    for cached in (True, False):
        model = thinker()
        if cached:
            out = model.answer(model.think(prompt, 3)[1])
        else:
            x_BTC = model.lm.embedding(prompt)
            for _ in range(3):
                x_BTC = torch.cat((x_BTC, whole(model, x_BTC)[:, -1:]), 1)
            asked = model.lm.embedding(torch.full((3, 1), model.reply))
            out = model.lm.head(whole(model, torch.cat((x_BTC, asked), 1))[:, -1])
        out.square().sum().backward()
        logits.append(out.detach())
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*logits, rtol=1e-10, atol=1e-12)
    for mine, other in zip(*gradients):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)


def test_said_tokens_are_the_likeliest_ones():
    model, prompt = thinker("discrete"), torch.randint(0, 13, (3, 11))
    tokens = prompt
    for _ in range(3):
        tokens = torch.cat((tokens, model.lm.head(whole(model, model.lm.embedding(tokens))[:, -1:]).argmax(-1)), 1)
    tokens = torch.cat((tokens, torch.full((3, 1), model.reply)), 1)
    want = model.lm.head(whole(model, model.lm.embedding(tokens))[:, -1])
    torch.testing.assert_close(model.answer(model.say(prompt, 3)), want, rtol=1e-10, atol=1e-12)


def test_a_renamed_problem_is_the_same_problem(seed):
    whole = problems(seed=seed, step=1, count=20, nodes=10, edges=16, depth=3)
    other = renamed(whole, np.random.default_rng(seed))
    assert not np.array_equal(other.edges, whole.edges)
    row = np.arange(20)
    np.testing.assert_array_equal(distances(other.edges, other.root, 10), other.distance)
    np.testing.assert_array_equal(np.sort(other.distance), np.sort(whole.distance))
    assert (other.distance[row, other.target] == 3).all() and (other.distance[row, other.decoy] == 10).all()
    path = a_shortest_path(other, 3, np.random.default_rng(0))
    assert (np.take_along_axis(other.distance, path, 1) == [1, 2, 3]).all()


@pytest.mark.parametrize("stage", [1, 3, 4])
def test_a_stage_asks_for_its_front(stage, tmp_path: Path):
    config = CONFIG.but(pool=32, batch=16, earlier=0.0)
    data = WORKLOAD.data(config, Place(detect(), tmp_path, tmp_path))
    data.stage = stage
    batch, again = data.batch(5, slice(0, 16)), data.batch(5, slice(8, 16))
    assert torch.equal(batch.prompt[8:], again.prompt) and torch.equal(batch.label[8:], again.label)
    assert batch.final is (stage > 3) and batch.thoughts == min(stage - 1, 3)
    edges = batch.prompt[:, :48].reshape(16, 16, 3)[:, :, :2].numpy()
    distance = distances(edges, batch.prompt[:, -1].numpy(), 10)
    assert (distance[np.arange(16), batch.label] == min(stage, 3)).all()
