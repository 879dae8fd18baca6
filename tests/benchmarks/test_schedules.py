"""The benchmark of schedules: every arm gives the reference's answer, and predictions come from the machine."""

from __future__ import annotations

import pytest

from undertow.benchmarks import schedules
from undertow.benchmarks.answers import count_wrong
from undertow.benchmarks.case import Context
from undertow.dist.errors import UserError
from undertow.dist.machine import Link, Machine


def _answers(rank, world):
    machine = Machine("box", links={"gloo": Link(1e-4, 1e9)}, copies={"host": 1e10})
    found = []
    for case in schedules.cases(Context(quick=True, seed=3, machine=machine, rank=rank, world_size=world)):
        trial = case.build()
        found += [
            (case.name, arm.name, count_wrong(arm.run(), trial.reference()), arm.predicted_s) for arm in trial.arms
        ]
    schedules.executor().close()
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_every_arm_is_right(world, ranks):
    for rows in ranks(world, _answers):
        assert {name for name, *_ in rows} >= {"all-gather, 64.0 KiB chunks", "all-to-all, 1.0 MiB chunks"}
        assert [row for row in rows if row[2]] == []
        assert all((predicted is None) == (arm == "gloo") for _, arm, _, predicted in rows)
        times = {(name, arm): predicted for name, arm, _, predicted in rows}
        hop = 1e-4 + 65536 / 1e9
        assert times["all-gather, 64.0 KiB chunks", "schedule"] == pytest.approx((world - 1) * hop, rel=0.01)


def test_one_rank_is_told_how_to_start_several():
    with pytest.raises(UserError, match="torchrun"):
        schedules.cases(Context())
