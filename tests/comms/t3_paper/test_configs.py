"""What must hold for every row: the order of the configurations, bounds, monotone bandwidth."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from undertow.comms.t3_paper.configs import Config, simulate
from undertow.comms.t3_paper.hardware import Hardware
from undertow.comms.t3_paper.workloads import SubLayer, paper_rows

GPU = Hardware()


def test_every_row_of_the_paper_is_there(rows):
    assert len(rows) == 2 * 2 * 4 + 3 * 4
    assert {row.sublayer.tp for row in rows} == {8, 16, 32}


def test_order_of_the_configurations_in_every_row(rows):
    for row in rows:
        t3, mca, bound = (row.speedup(c) for c in (Config.T3, Config.T3_MCA, Config.IDEAL_NMC))
        assert 1 < t3 <= mca <= bound, row.sublayer.name
        assert row.speedup(Config.IDEAL_OVERLAP) <= bound, row.sublayer.name


def test_what_the_paper_says_of_layers(rows):
    """Section 6.1.2: T3 may beat the first ideal on OP, whose GEMM reads little, and loses over 15 % on a large FC."""
    assert any(r.speedup(Config.T3) > r.speedup(Config.IDEAL_OVERLAP) for r in rows if r.sublayer.layer == "OP")
    assert any(
        r.speedup(Config.T3) < 0.85 * r.speedup(Config.IDEAL_OVERLAP) for r in rows if r.sublayer.layer == "FC-2"
    )


def test_nothing_of_t3_beats_the_second_ideal_anywhere(seed):
    """Also on other shapes and hardware; with T3's stores at least as costly as plain ones, update_cost >= p/(p-1)."""
    rng = random.Random(seed)
    for _ in range(15):
        row = SubLayer("any", rng.choice([2, 4, 8]), "any", rng.randint(500, 6000), rng.randint(500, 6000), 600)
        hw = replace(
            GPU,
            link_bytes_per_s=10 ** rng.uniform(10, 12),
            dram_bytes_per_s=10 ** rng.uniform(11.5, 13),
            mca_share=rng.uniform(0.05, 0.9),
            interference=rng.uniform(1, 20),
        )
        bound = simulate(row, Config.IDEAL_NMC, hw).seconds
        for config in (Config.T3, Config.T3_MCA):
            assert simulate(row, config, hw).seconds >= bound * (1 - 1e-9), (row, hw)


@pytest.mark.parametrize("rate", ["link_bytes_per_s", "dram_bytes_per_s"])
@pytest.mark.parametrize("row", [r for r in paper_rows((8, 16)) if r.layer != "FC-1"][::2], ids=lambda row: row.name)
def test_more_bandwidth_never_takes_longer(row, rate):
    for config in (Config.SEQUENTIAL, Config.T3, Config.T3_MCA):
        times = [simulate(row, config, replace(GPU, **{rate: getattr(GPU, rate) * f})).seconds for f in (0.5, 1, 2, 4)]
        assert times == sorted(times, reverse=True), config


def test_a_simulation_repeats_exactly():
    row = paper_rows((8,))[1]
    assert simulate(row, Config.T3, GPU) == simulate(row, Config.T3, GPU)
