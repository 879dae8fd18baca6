"""Every registered workload at its smallest preset: the claims that we have measured to hold, hold."""

from __future__ import annotations

import math

import pytest

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


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_claims_at_the_ci_preset(name, tmp_path):
    workload, outcomes = get(name), []
    for number, variant in enumerate(workload.compared("ci")):
        config = workload.config("ci", variant)
        place = Place(detect(), tmp_path / str(number), tmp_path / "shared", Switches())
        outcome = run(workload, variant, "ci", config, place)
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
