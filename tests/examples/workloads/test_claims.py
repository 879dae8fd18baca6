"""Every registered workload at its smallest preset: the claims that we have measured to hold, hold, within 20 CPU
seconds."""

from __future__ import annotations

import math
import os

import pytest
import torch

from undertow.dist.launch import detect
from undertow.examples.workloads.contract import PRESETS, Place
from undertow.examples.workloads.judge import judge
from undertow.examples.workloads.loop import run
from undertow.examples.workloads.registry import MODULES, get
from undertow.examples.workloads.switches import SYSTEMS, Switches


@pytest.mark.parametrize("name", MODULES)
def test_the_description_is_whole(name):
    workload = get(name)
    assert workload.name == name
    assert tuple(workload.presets) == PRESETS
    assert workload.exercises <= set(SYSTEMS)
    for claim in workload.claims:
        assert claim.variant in workload.variants and (claim.baseline is None or claim.baseline in workload.variants)
        assert claim.relation in (">=", "<=") and set(claim.presets) <= set(PRESETS)
    for preset in PRESETS:
        for variant in workload.variants:
            config = workload.config(preset, variant, seed=3)
            assert config.seed == 3 and config.batch > 0


CI_CPU_S = 20.0  # what a workload may take at `ci`, all its variants, on the machine of the next line
YARDSTICK_CPU_S = 0.25  # what `yardstick` takes on two cores of an Intel Xeon


def cpu_s() -> float:
    """CPU seconds of this process and its children so far; other processes hardly change it."""
    return sum(os.times()[:4])


def yardstick() -> float:
    """CPU seconds of a fixed piece of work such as the workloads do: small products, and what is around them."""
    weight, x, began_s = torch.eye(64, requires_grad=True), torch.ones(64, 64), cpu_s()
    for _ in range(2000):
        (torch.tanh(x @ weight) @ weight).square().mean().backward()
    return cpu_s() - began_s


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_claims_at_the_ci_preset(name, tmp_path):
    """And the CPU time stays within the budget, which a slower machine, or one whose cores are shared, stretches."""
    workload, outcomes, spent_s, slowest_s = get(name), [], 0.0, yardstick()
    for number, variant in enumerate(workload.compared("ci")):
        config = workload.config("ci", variant)
        place = Place(detect(), tmp_path / str(number), tmp_path / "shared", Switches())
        began_s = cpu_s()
        outcome = run(workload, variant, "ci", config, place)
        spent_s += cpu_s() - began_s
        slowest_s = max(slowest_s, yardstick())
        assert outcome.evidence["checkpoint"]["commits"] > 0 and outcome.evidence["checkpoint"]["bytes"] > 0
        assert outcome.evidence["checkpoint"]["chunks"] > 0 and outcome.evidence["checkpoint"]["failed"] == 0
        assert outcome.evidence["checkpoint"].get("rollbacks", 0) == ("guarded" in variant)
        assert outcome.updates >= config.steps or outcome.diverged
        assert outcome.diverged or all(math.isfinite(value) for value in outcome.metrics.values())
        outcomes.append(outcome)
    verdicts = judge(workload, "ci", outcomes)
    assert verdicts
    failed = [(v.claim.text, v.values, v.references) for v in verdicts if v.claim.expected and not v.holds]
    assert not failed
    assert spent_s <= CI_CPU_S * max(1.0, slowest_s / YARDSTICK_CPU_S)
