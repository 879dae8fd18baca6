"""Recipes: frozen, named, and refused with the value when they cannot work."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from undertow.dist.errors import UserError
from undertow.examples.lm import ByteLM, LMConfig
from undertow.examples.recipes import RECIPES, describe, recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_frozen_and_can_be_edited(name):
    config = recipe(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3  # type: ignore[misc]
    assert recipe(name, steps=7, seed=None).steps == 7
    assert recipe(name, seed=None) == config


def test_the_learning_rate_warms_up_and_decays_to_a_tenth():
    config = recipe("tiny")
    rates = [config.learning_rate(step) for step in range(config.steps + 1)]
    assert rates[config.warmup - 1] == pytest.approx(config.lr)
    assert all(a < b for a, b in zip(rates[: config.warmup], rates[1 : config.warmup]))
    assert all(a >= b for a, b in zip(rates[config.warmup :], rates[config.warmup + 1 :]))
    assert rates[-1] == pytest.approx(config.lr / 10)


@pytest.mark.parametrize("changes", [{"steps": 0}, {"batch": 0}, {"length": -1}, {"log_every": 0}])
def test_values_below_one_are_refused(changes):
    with pytest.raises(UserError, match=f"{next(iter(changes))} is"):
        recipe("tiny", **changes)


def test_an_unknown_recipe_names_the_known_ones():
    with pytest.raises(UserError, match="no recipe 'huge'.*tiny, demo, small, gpu"):
        recipe("huge")


@pytest.mark.parametrize("sizes", [{"width": 65}, {"width": 64, "heads": 3}, {"heads": 4, "kv_heads": 3}])
def test_a_model_that_cannot_be_built_is_refused(sizes):
    with pytest.raises(UserError):
        LMConfig(**sizes)


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_predicts_and_its_heads_share_weights_when_tied(tied):
    torch.manual_seed(0)
    model = ByteLM(LMConfig(layers=2, width=32, heads=4, kv_heads=2, hidden=48, tied=tied))
    assert (model.head.weight is model.embedding.weight) == tied
    tokens = torch.randint(0, 256, (2, 9))
    logits = model(tokens[:, :-1])
    assert logits.shape == (2, 8, 256)
    expected = torch.nn.functional.cross_entropy(logits.double().reshape(-1, 256), tokens[:, 1:].reshape(-1))
    torch.testing.assert_close(model(tokens[:, :-1], tokens[:, 1:]).double(), expected, rtol=1e-5, atol=1e-6)


def test_no_token_sees_the_future():
    torch.manual_seed(0)
    model = ByteLM(LMConfig(layers=2, width=32, heads=4, kv_heads=1, hidden=48))
    one = torch.randint(0, 256, (1, 12))
    two = one.clone()
    two[0, 7:] = (two[0, 7:] + 1) % 256
    assert torch.equal(model(one)[0, :7], model(two)[0, :7])
    assert not torch.equal(model(one)[0, 7:], model(two)[0, 7:])


def test_help_says_how_long_each_recipe_takes():
    assert all(f"{name} (" in describe() for name in RECIPES) and "demo (about a minute on two cores)" in describe()
