"""A system that is switched on changes no number: the same losses with it and without, and on two ranks as on one.

Checkpoints and resumes are held to bit-identity. Two ranks add the same products in another order, so losses differ by
rounding: float32 has 1.2e-7, a loss sums over at most some thousand products and the steps amplify it; 2e-4 is far
below what a lost or doubled gradient would do (its first update alone moves these losses by more than 1e-2).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from undertow.dist.launch import detect
from undertow.examples.workloads.contract import Place
from undertow.examples.workloads.loop import Outcome, run
from undertow.examples.workloads.registry import MODULES, get
from undertow.examples.workloads.switches import PLAIN, Switches

STEPS = 12
SHORT = {name: {"steps": STEPS, "checkpoint_every": 4, "batch": 8} for name in MODULES}
LAZY = Switches(checkpoint="lazy")


def short(name: str, folder: Path, switches: Switches = PLAIN, **options) -> Outcome:
    """The method of a workload for a few steps."""
    workload = get(name)
    config = workload.config("ci", workload.method, **SHORT[name])
    place = Place(detect(), folder, folder.parent / f"{folder.name}-shared", switches)
    return run(workload, workload.method, "ci", config, place, **options)


@pytest.mark.parametrize("name", MODULES)
def test_checkpoints_change_nothing(name, tmp_path):
    plain, lazy = short(name, tmp_path / "plain"), short(name, tmp_path / "lazy", LAZY)
    assert lazy.losses == plain.losses and lazy.weights == plain.weights and lazy.metrics == plain.metrics
    assert len(lazy.losses) >= STEPS
    assert lazy.evidence["checkpoint"]["commits"] >= 3 and "checkpoint" not in plain.evidence


@pytest.mark.parametrize("name", MODULES)
def test_a_resumed_run_is_bit_identical(name, tmp_path):
    whole = short(name, tmp_path / "whole", LAZY)
    first = short(name, tmp_path / "cut", LAZY, stop_at=7)  # saved at 4: steps 4, 5 and 6 are lost
    rest = short(name, tmp_path / "cut", LAZY, resume=True)
    assert 0 < rest.updates < whole.updates
    assert first.losses == whole.losses[: len(first.losses)]
    assert rest.losses == whole.losses[-rest.updates :] and rest.weights == whole.weights
    assert rest.metrics == whole.metrics


def on_ranks(rank: int, world: int, name: str, folder: str, switches: Switches) -> tuple[list[float], str, dict]:
    torch.set_num_threads(1)
    outcome = short(name, Path(folder), switches)
    return outcome.losses, outcome.weights, outcome.evidence


@pytest.mark.parametrize("name", MODULES)
def test_two_ranks_are_one(name, tmp_path, ranks):
    one = short(name, tmp_path / "one")
    (losses, weights, _), (other, same, _) = ranks(2, on_ranks, name, str(tmp_path / "two"), LAZY, timeout_s=120)
    assert losses == other and weights == same
    assert losses == pytest.approx(one.losses, rel=2e-4, abs=2e-4)
