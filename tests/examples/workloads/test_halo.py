"""Nodes spread over ranks: the plans fit together, and a run over shards is the run on one rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from undertow.dist.errors import UserError
from undertow.dist.launch import detect
from undertow.examples.workloads.contract import Place
from undertow.examples.workloads.graphs import Ring, parse
from undertow.examples.workloads.halo import bounds, plan
from undertow.examples.workloads.loop import run
from undertow.examples.workloads.registry import get
from undertow.examples.workloads.switches import Switches


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_ranks_plans_fit_together(ranks, seed):
    generator = np.random.default_rng(seed)
    nodes = int(generator.integers(ranks, 40))
    edges = generator.integers(0, nodes, (2, 150))
    plans = [plan(edges, nodes, rank, ranks) for rank in range(ranks)]
    cuts = bounds(nodes, ranks)
    assert cuts[0] == 0 and cuts[-1] == nodes and max(np.diff(cuts)) - min(np.diff(cuts)) <= 1
    value = generator.random(nodes)
    want = np.bincount(edges[1], value[edges[0]], minlength=nodes)
    got = []
    for rank, mine in enumerate(plans):
        assert [len(other.send[rank]) for other in plans] == list(mine.receive)
        ghosts = [value[cuts[other] + plans[other].send[rank]] for other in range(ranks)]
        seen = np.concatenate([value[mine.start : mine.stop], *ghosts])
        got.append(np.bincount(mine.edges[1], seen[mine.edges[0]], minlength=mine.stop - mine.start))
        assert len(seen) == mine.stop - mine.start + mine.ghosts
    np.testing.assert_allclose(np.concatenate(got), want)
    assert sum(mine.edges.shape[1] for mine in plans) == edges.shape[1]


def test_more_ranks_than_nodes_are_refused():
    with pytest.raises(UserError, match="2 nodes over 3 ranks"):
        plan(np.zeros((2, 1), dtype=np.int64), 2, 0, 3)


def trained(folder: Path, switches: Switches) -> tuple[list[float], dict[str, float], dict]:
    workload = get("graphgps")
    config = workload.config("ci", "gps", steps=10, nodes=9, batch=4, checkpoint_every=5)
    outcome = run(workload, "gps", "ci", config, Place(detect(), folder, folder / "shared", switches))
    return outcome.losses, outcome.metrics, outcome.evidence


def on_rank(rank: int, world: int, folder: str, ring: bool) -> tuple[list[float], dict[str, float], dict]:
    torch.set_num_threads(1)
    return trained(Path(folder), Switches(context=world) if ring else Switches(halo="gloo"))


@pytest.mark.parametrize("world, ring", [(2, False), (2, True), (3, True)])
def test_shards_of_the_nodes_train_as_the_whole(world, ring, tmp_path, ranks):
    """Sums over neighbours and ranks run in another order: float32 rounding, as in test_equivalence."""
    losses, metrics, _ = trained(tmp_path / "one", Switches(checkpoint="off"))
    for shard_losses, shard_metrics, evidence in ranks(world, on_rank, str(tmp_path / "spread"), ring):
        assert shard_losses == pytest.approx(losses, rel=2e-4, abs=2e-4)
        assert shard_metrics == pytest.approx(metrics, abs=0.011)  # a near tie may fall the other way: 2 of 200
        assert ("ring" in evidence) is ring
        if ring:  # three layers; ten updates and one evaluation
            assert evidence["ring"]["calls"] == 3 * 11 and evidence["ring"]["bytes"] > 0
            assert evidence["ring"]["hops"] == 2 * (world - 1) * 3 * 11
        assert evidence["halo"]["bytes"] > 0 and evidence["halo"]["exchanges"] == 3 * (2 * 10 + 1)


def test_the_ring_asks_the_node_opposite():
    ring = Ring(10, 5, seed=1)
    x, labels = ring.batch(3, 6)
    for row in range(6):
        (target,) = torch.nonzero(labels[row] != -100).flatten().tolist()
        source = (target + 5) % 10
        assert x[row, source, labels[row, target]] == 1 and x[row, target, 5] == 1
        assert x[row, :, :6].sum() == 2
    assert torch.equal(ring.batch(3, 6)[0], x) and not torch.equal(ring.batch(4, 6)[0], x)


def test_package_lists_are_read():
    text = (
        "Package: a\nSection: non-free/net\nDepends: b (>= 1.0), c:any | d, e\n\n"
        "Package: b\nSection: libs\n\nPackage: c\nDescription: Depends: not this\n"
    )
    needs, sections = parse(text)
    assert needs == {"a": {"b", "c", "e"}, "b": set(), "c": set()}
    assert sections == {"a": "net", "b": "libs", "c": "none"}


def test_without_package_lists_debian_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    config = get("graphgps").config("ci", "gps", graph="debian")
    with pytest.raises(UserError, match="apt-cache knows 0 packages.*apt-get update"):
        get("graphgps").data(config, Place(detect(), tmp_path, tmp_path))
