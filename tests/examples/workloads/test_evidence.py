"""Every system that a workload exercises runs when it is switched on, proves it in result.json, and changes no loss.

Checkpoints are the matter of test_equivalence and test_claims, boundary rows by MPI of mpi_interpose/test_graph_halo;
here are the systems that compute otherwise. Their sums run in another order, so losses agree within float32 rounding.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from undertow.dist.launch import detect
from undertow.examples.workloads.contract import Place
from undertow.examples.workloads.loop import run
from undertow.examples.workloads.registry import MODULES, get
from undertow.examples.workloads.switches import Switches

pytestmark = pytest.mark.slow

SMALL = {
    "mor": {"batch": 2, "length": 16, "width": 16, "eval_bytes": 512},
    "graphgps": {"batch": 4, "nodes": 9},
    "stable-rps": {"batch": 16, "compression": 1},
}
ON = {  # system: ranks, how to switch it on, what must have been counted
    "stream": (1, {"stream": True, "stream_chunk": 8}, ("chunks", "passes")),
    "ring": (2, {"context": 2}, ("calls", "hops", "bytes")),
    "halo": (2, {"halo": "gloo"}, ("exchanges", "messages", "bytes")),
    "overlap": (2, {"overlap": "on"}, ("products", "messages", "bytes")),
    "gradients": (2, {"gradients": "tracked"}, ("pieces", "contributions", "messages", "bytes", "complete_early")),
}
PAIRS = [(name, system) for name in MODULES for system in sorted(get(name).exercises - {"checkpoint"})]


def losses_of(rank: int, world: int, name: str, folder: str, switches: Switches) -> list[float]:
    torch.set_num_threads(1)
    workload = get(name)
    config = workload.config("ci", workload.method("ci"), steps=4, checkpoint_every=2, warmup=2, **SMALL[name])
    place = Place(detect(), Path(folder), Path(folder) / "shared", switches)
    outcome = run(workload, workload.method("ci"), "ci", config, place)
    if rank == 0:
        outcome.dump(place)
    return outcome.losses


def test_every_system_of_the_package_has_a_workload():
    assert {system for _, system in PAIRS} == set(ON)


@pytest.mark.parametrize("name, system", PAIRS)
def test_a_system_that_is_on_has_run_and_changes_no_loss(name, system, tmp_path, ranks):
    off = losses_of(0, 1, name, str(tmp_path / "off"), Switches(checkpoint="off"))
    world, words, counted = ON[system]
    arguments = (name, str(tmp_path / "on"), Switches(checkpoint="lazy", **words))
    every = [losses_of(0, 1, *arguments)] if world == 1 else ranks(world, losses_of, *arguments)
    for losses in every:
        assert losses == pytest.approx(off, rel=2e-4)
    result = json.loads((tmp_path / "on" / "result.json").read_text())
    assert result["ranks"] == world and set(result["systems"]) == {"checkpoint", system}
    assert all(result["evidence"][system][what] > 0 for what in counted)
    assert all(result["evidence"]["checkpoint"][what] > 0 for what in ("commits", "bytes", "chunks"))
    assert system not in json.dumps(json.loads((tmp_path / "off" / "result.json").read_text())["evidence"])
