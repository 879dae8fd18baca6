"""The benchmark of attention schedules: every arm is exact, and sends what its plan says."""

from __future__ import annotations

import pytest

from undertow.benchmarks import token_ring
from undertow.benchmarks.case import Context
from undertow.dist.errors import UserError


def _rows(rank, world):
    token_ring.GATE_CALLS = 2
    case = token_ring.cases(Context(quick=True, seed=3, rank=rank, world_size=world))[-1]
    trial = case.build()
    found = {arm.name: (arm.run(), arm.predicted_s) for arm in trial.arms}
    token_ring._teams.pop().close()
    return case.plain, case.ours, found


def test_every_arm_is_exact_and_sends_its_plan(ranks):
    for plain, ours, rows in ranks(2, _rows):
        assert {plain, ours, "ring_kv", "ulysses", "token_ring", "predicted"} <= set(rows)
        for name, (measured, predicted) in rows.items():
            assert measured.answer, (name, measured)
            assert (predicted is None) == (name in (plain, ours))
        assert rows["ring_kv"][0].extras["sent_bytes"] > 0


def test_one_rank_is_told_how_to_start_several():
    with pytest.raises(UserError, match="torchrun"):
        token_ring.cases(Context())
