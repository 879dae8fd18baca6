"""Ranks that stay alive between samples: what they return, how they fail, and that they end."""

from __future__ import annotations

import gc
import os
import time

import pytest
import torch
import torch.distributed as dist

from undertow.benchmarks import overlap
from undertow.benchmarks.crew import Crew


def _jobs(rank: int, world: int):
    def total() -> float:
        cell = torch.tensor([float(rank + 1)])
        dist.all_reduce(cell)
        return float(cell.item())

    return {"total": total, "pid": os.getpid, "slow": lambda: time.sleep(0.2 * rank), "bad": lambda: 1 // rank}


def test_a_crew_works_by_name_and_ends_when_dropped():
    crew = Crew(2, _jobs, timeout_s=240)
    assert crew.run("total")[1] == [3.0, 3.0] == crew.run("total")[1]
    assert crew.run("slow")[0] >= 0.2
    pids = crew.run("pid")[1]
    with pytest.raises(RuntimeError, match="rank 0 of 2 failed in 'bad'(.|\n)*ZeroDivisionError"):
        crew.run("bad")
    del crew
    gc.collect()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_all_arms_of_the_overlap_benchmark_are_right():
    trial = overlap.trial(2, (64, 64, 64), 1.0, seed=0)
    for arm in trial.arms:
        assert arm.run().answer is True, arm.name
    assert "pieces" in next(arm for arm in trial.arms if arm.name == "auto").run().extras
