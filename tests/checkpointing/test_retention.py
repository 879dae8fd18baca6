"""What may go, as a pure function: against a slow definition, and the edges one by one."""

from __future__ import annotations

import math
import random

import pytest

from undertow.checkpointing.retention import Retention, to_keep, to_remove
from undertow.dist.errors import UserError


def test_the_newest_remain():
    assert to_remove([3, 1, 2, 4], 2) == [1, 2]
    assert to_remove([3, 1], 5) == []
    assert to_remove([3, 1], None) == []
    assert to_remove([], 1) == []


def test_rules_add_up():
    metrics = {step: {"loss": abs(step - 42) / 10} for step in range(0, 100, 5)}
    policy = Retention(last=2, every=50, best=3, metric="loss")
    assert to_keep(list(metrics), policy, metrics) == {95, 90, 0, 50, 40, 45, 35}


def test_best_ignores_what_is_no_number_and_prefers_the_newer_of_equals():
    metrics = {
        1: {"loss": math.nan},
        2: {"loss": 1.0},
        3: {"loss": 1.0},
        4: {},
        5: {"loss": math.inf},
        6: {"loss": 9.0},
    }
    assert to_keep(list(metrics), Retention(last=1, best=1, metric="loss"), metrics) == {6, 3}
    assert to_keep(list(metrics), Retention(last=1, best=1, metric="loss", mode="max"), metrics) == {6, 5}


def test_against_a_slow_definition(seed):
    rng = random.Random(seed)
    for _ in range(400):
        steps = rng.sample(range(200), rng.randrange(0, 20))
        metrics = {step: {"m": rng.choice([1.0, 2.0, 3.0, math.nan])} for step in steps if rng.random() < 0.8}
        policy = Retention(
            rng.choice([None, 1, 2, 5]),
            rng.choice([0, 1, 7]),
            *rng.choice([(0, ""), (2, "m")]),
            rng.choice(["min", "max"]),
        )
        kept = set()
        for step in steps:
            newer = [other for other in steps if other > step]
            if policy.last is None or len(newer) < policy.last:
                kept.add(step)
            if policy.every and step % policy.every == 0:
                kept.add(step)
            value = metrics.get(step, {}).get("m", math.nan)
            if policy.best and not math.isnan(value):
                scored = [(s, metrics[s]["m"]) for s in metrics if not math.isnan(metrics[s]["m"])]
                sign = 1 if policy.mode == "min" else -1
                better = [s for s, v in scored if sign * v < sign * value or (v == value and s > step)]
                if len(better) < policy.best:
                    kept.add(step)
        assert to_remove(steps, policy, metrics) == sorted(set(steps) - kept)
        if steps:
            assert max(steps) not in to_remove(steps, policy, metrics)


@pytest.mark.parametrize(
    "policy", [Retention(), Retention(None), Retention(5, 100), Retention(1, 0, 2, "bits", "max")], ids=str
)
def test_text_form_parses_back(policy):
    assert Retention.parse(str(policy)) == policy


@pytest.mark.parametrize(
    "text",
    ["", " ", "last", "last=-1", "last=0", "every=x", "best=2", "best=2:", "best=2:loss:avg", "bset=1:x", "last=3;"],
)
def test_bad_rules_are_refused(text):
    with pytest.raises(UserError, match="retention"):
        Retention.parse(text)


def test_a_policy_that_names_no_metric_is_refused():
    with pytest.raises(UserError, match="METRIC"):
        Retention(best=2)
