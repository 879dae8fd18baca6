"""The benchmarks between GPUs, in the small form that runs over gloo: every arm that can run here is right."""

from __future__ import annotations

import pytest

from undertow.benchmarks import overlap_gpus, ring_gpus
from undertow.benchmarks.case import Context, Measured
from undertow.dist.errors import UserError
from undertow.parallel.token_ring.executors import forget


def _wrong(rank, world):
    found = {}
    for case in ring_gpus.cases(Context(quick=True, seed=3, rank=rank, world_size=world)):
        trial = case.build()
        for arm in trial.arms:
            if not arm.unavailable:
                measured = arm.run()
                assert isinstance(measured, Measured) and measured.extras["of_ideal"] > 0
                found[case.name, arm.name] = case.wrong(measured.answer, trial.reference())
    forget()
    for case in overlap_gpus.cases(Context(quick=True, seed=3, rank=rank, world_size=world)):
        trial = case.build()
        right = trial.reference()
        for arm in trial.arms:
            if not arm.unavailable:
                out = arm.run()
                found[case.name, arm.name] = case.wrong(out, right)
                assert case.wrong(out + 1, right) == 1
    overlap_gpus._open.pop().close()
    return found


def test_every_arm_is_right(ranks):
    for found in ranks(2, _wrong):
        assert set(found.values()) == {0}
        assert {name for _, name in found} >= {"ring_kv", "auto", "cuBLAS + NCCL", "overlap, 4 pieces"}


@pytest.mark.parametrize("module", [ring_gpus, overlap_gpus])
def test_one_rank_is_told_how_to_start_several(module):
    with pytest.raises(UserError, match="torchrun"):
        module.cases(Context())
