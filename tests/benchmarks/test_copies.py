"""The copies that are timed bring every byte, and a machine without a GPU says so per case."""

from __future__ import annotations

import pytest
import torch

from undertow.benchmarks import copies
from undertow.benchmarks.answers import count_wrong
from undertow.benchmarks.case import Context
from undertow.benchmarks.harness import run_case
from undertow.dist.machine import Machine

RATES = {"host": 1e9, "d2h_pinned": 5e10, "d2h_pageable": 1e10, "h2d_pinned": 5e10, "h2d_pageable": 1e10}


@pytest.mark.parametrize("trial", [copies.host_to_host, copies.to_host, copies.to_device])
@pytest.mark.parametrize("nbytes", [1, 4097])
def test_every_arm_brings_every_byte(trial, nbytes, seed):
    made = trial(nbytes, seed, RATES)
    for arm in made.arms:
        if arm.unavailable:
            assert arm.unavailable == copies.NO_CUDA and not torch.cuda.is_available()
            continue
        answer = arm.run()
        if arm.device == "cuda":
            torch.cuda.synchronize()
        assert count_wrong(answer.cpu(), made.reference()) == 0
        assert int(made.reference().to(torch.int64).sum()) > 0


def test_predictions_come_from_the_machine_file(seed):
    machine = Machine("m", copies=RATES)
    case = next(c for c in copies.cases(Context(quick=True, machine=machine)) if c.group == "host to host")
    assert case.nbytes is not None
    for arm in case.build().arms:
        assert arm.predicted_s == case.nbytes / 1e9


def test_cases_without_a_device_are_listed_and_not_compared(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    case = next(c for c in copies.cases(Context(quick=True)) if c.group == "device to host")
    rows = run_case(case, rounds=6, seed=0)
    assert {(row.arm, row.note, row.seconds) for row in rows} == {
        ("pageable", copies.NO_CUDA, None),
        ("pinned", copies.NO_CUDA, None),
    }
