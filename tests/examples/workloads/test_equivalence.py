"""A system that is switched on changes no number: the same losses with it and without, and on two ranks as on one.

Checkpoints and resumes are held to bit-identity. Two ranks add the same products in another order, so losses differ by
rounding: float32 has 1.2e-7, a loss sums over at most some thousand products and the steps amplify it; 2e-4 is far
below what a lost or doubled gradient would do (its first update alone moves these losses by more than 1e-2).
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.func import functional_call

from undertow.checkpointing.folder import read_manifest
from undertow.checkpointing.reader import Reader
from undertow.dist.errors import UserError
from undertow.dist.launch import detect
from undertow.examples.workloads.contract import Place
from undertow.examples.workloads.loop import Outcome, run
from undertow.examples.workloads.registry import MODULES, get
from undertow.examples.workloads.switches import PLAIN, Switches

pytestmark = pytest.mark.slow  # together more than ten seconds

SHORT = {"steps": 14, "checkpoint_every": 2, "batch": 8}
TINY = {  # what makes a workload small, and which of its variants trains
    "mor": ("learned router", {"width": 16, "length": 16, "eval_bytes": 512}),
    "atlas": ("blocks", {"base": 5, "tune": 5, "width": 16}),
    "thoughts": ("trained", {"nodes": 12, "edges": 18, "depth": 3, "width": 32, "stage_updates": 4, "graphs": 8}),
}
LAZY = Switches(checkpoint="lazy")


def short(
    name: str, folder: Path, switches: Switches = PLAIN, variant: str = "", changes: dict | None = None, **options
) -> Outcome:
    """The method of a workload for a few steps, small."""
    workload = get(name)
    method, sizes = TINY.get(name, (workload.method("ci"), {}))
    config = workload.config("ci", variant or method, **{**SHORT, **sizes, **(changes or {})})
    place = Place(detect(), folder, folder.parent / f"{folder.name}-shared", switches)
    return run(workload, variant or method, "ci", config, place, **options)


@pytest.mark.parametrize("name", MODULES)
def test_checkpoints_change_nothing(name, tmp_path):
    plain, lazy = short(name, tmp_path / "plain"), short(name, tmp_path / "lazy", LAZY)
    assert lazy.losses == plain.losses and lazy.weights == plain.weights and lazy.metrics == plain.metrics
    assert len(lazy.losses) == 14
    assert lazy.evidence["checkpoint"]["commits"] >= 8 and "checkpoint" not in plain.evidence


@pytest.mark.parametrize("name", MODULES)
def test_a_resumed_run_is_bit_identical(name, tmp_path):
    whole = short(name, tmp_path / "whole", LAZY)
    first = short(name, tmp_path / "cut", LAZY, stop_at=7)  # saved at 6: step 6 is lost
    rest = short(name, tmp_path / "cut", LAZY, resume=True)
    assert rest.updates == 8 and len(first.losses) == 7
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
    (losses, weights, evidence), (other, same, _) = ranks(2, on_ranks, name, str(tmp_path / "two"), LAZY)
    assert losses == other and weights == same
    assert evidence["average"]["passes"] == 14 and evidence["average"]["bytes"] > 0
    assert losses == pytest.approx(one.losses, rel=2e-4, abs=2e-4)


def test_what_a_shared_vector_costs_is_its_own_size(tmp_path, ranks):
    """m = 7,648 // 50 floats are averaged in an update, and m weights and m momenta are in a checkpoint."""
    (_, _, evidence), _ = ranks(2, on_ranks, "stable-rps", str(tmp_path / "run"), LAZY)
    assert evidence["average"] == {"passes": 14, "bytes": 14 * 4 * 152}
    manifest = read_manifest(tmp_path / "run" / "checkpoints" / "step-000000014")
    sizes = [math.prod(record.shape) for record in manifest.tensors.values()]
    assert sorted(sizes)[-2:] == [152, 152] and sum(sizes) < 2 * 152 + 8


ROLLING = {"tolerance": -2.0}  # each later task counts as harmful: back to its start, and again with replay


def test_rolling_back_to_a_checkpoint_is_rolling_back_to_a_copy(tmp_path):
    plain = short("trace", tmp_path / "plain", PLAIN, "worked, guarded", ROLLING)
    lazy = short("trace", tmp_path / "lazy", LAZY, "worked, guarded", ROLLING)
    assert lazy.losses == plain.losses and lazy.weights == plain.weights
    assert lazy.updates == 16 and plain.updates == 16  # task 1 ran twice; from then on there is replay
    assert lazy.evidence["checkpoint"]["rollbacks"] == 1 and plain.evidence["copies"]["rollbacks"] == 1
    assert lazy.losses[8:10] != lazy.losses[10:12]


@pytest.mark.parametrize("stop", [8, 9, 11])
def test_a_fault_beside_a_roll_back_changes_nothing(tmp_path, stop):
    whole = short("trace", tmp_path / "whole", LAZY, "worked, guarded", ROLLING)
    short("trace", tmp_path / "cut", LAZY, "worked, guarded", ROLLING, stop_at=stop)
    rest = short("trace", tmp_path / "cut", LAZY, "worked, guarded", ROLLING, resume=True)
    assert rest.weights == whole.weights and rest.metrics == whole.metrics
    assert rest.losses == whole.losses[-rest.updates :]


def test_a_guard_without_a_checkpoint_to_go_back_to_is_refused(tmp_path):
    with pytest.raises(UserError, match="a checkpoint at the start of every task"):
        short("trace", tmp_path, LAZY, "worked, guarded", {"checkpoint_every": 3})


def test_task_vectors_are_read_from_disk_and_are_the_experts(tmp_path):
    lazy = short("atlas", tmp_path / "lazy", LAZY)
    counts = lazy.evidence["checkpoint"]
    blocks, models = 8, 7
    passes = 2 * 14 + 1  # forward and backward of each update, and the evaluation
    assert counts["blocks_read"] == blocks * models * passes
    assert counts["bytes_read"] == 4 * models * passes * (64 * 16 + 2 * 16 * 16 + 3 * 16 + 16 * 10 + 10)


def test_the_gradient_of_a_coefficient_is_that_of_autograd(tmp_path):
    workload = get("atlas")
    config = workload.config("ci", "blocks", **SHORT, **TINY["atlas"][1])
    place = Place(detect(), tmp_path, tmp_path / "shared", LAZY)
    data = workload.data(config, place)
    model = workload.model(config, data, place)
    torch.nn.init.normal_(model.coefficients, std=0.3)
    batch = data.batch(0, slice(None))
    workload.loss(model, batch).backward()

    double = model.coefficients.detach().double().requires_grad_()
    blocks = {}
    for k, name in enumerate(model.names):
        base = data.base.block(name).double()
        blocks[name] = base + sum(c * (e.block(name).double() - base) for c, e in zip(double[:, k], data.experts))
    logits = functional_call(model.skeleton.double(), blocks, (batch[0].flatten(0, 1).double(),))
    torch.nn.functional.cross_entropy(logits, batch[1].flatten()).backward()
    torch.testing.assert_close(model.coefficients.grad.double(), double.grad, rtol=1e-4, atol=1e-6)


def test_the_curriculum_is_part_of_the_state(tmp_path):
    short("thoughts", tmp_path / "run", LAZY, stop_at=10)
    path = tmp_path / "run" / "checkpoints" / "step-000000008"
    assert Reader(path, read_manifest(path)).object("curriculum") == {"stage": 1 + 8 // 4}
