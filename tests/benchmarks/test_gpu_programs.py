"""The benchmarks between GPUs, in the small form that runs over gloo: every arm that can run here is right."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time

import pytest
import torch

from undertow.benchmarks import (
    checkpoint_ranks,
    checkpoint_recovery,
    kill_resume,
    overlap_gpus,
    ring_gpus,
    stream_ranks,
)
from undertow.benchmarks.case import Context, Measured
from undertow.benchmarks.checkpoint_job import Size
from undertow.dist.errors import UserError
from undertow.dist.launch import free_port
from undertow.examples.lm import LMConfig
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
                pattern, shape = case.name.split()
                why = f"{pattern} M={shape.split('×')[0]} N=" if arm.name == "auto" else ""
                assert arm.said.startswith(why) and ("(measured; " in arm.said) == bool(why), arm.said
                assert case.wrong(out + 1, right) == 1
    overlap_gpus.close_teams()
    return found


def test_every_arm_is_right(ranks):
    for found in ranks(2, _wrong):
        assert set(found.values()) == {0}
        assert {name for _, name in found} >= {"ring_kv", "auto", "cuBLAS + NCCL", "overlap, 4 pieces"}


def _read_back(rank, world):
    checkpoint_ranks.STEPS = {"host": 2, "partner": 2, "disk": 2}
    size = Size("tiny", LMConfig(layers=1, width=64, heads=2, kv_heads=2, hidden=128, vocab=256), 1, 8, 1)
    found = {}
    for place in checkpoint_ranks.STEPS:
        trial = checkpoint_ranks.trial(size, place, torch.device("cpu"))
        found |= {arm.name: (arm.reference and arm.reference(), arm.run().answer) for arm in trial.arms}
    checkpoint_ranks._close(checkpoint_ranks._open.pop())
    return found


def test_every_save_of_sharded_training_reads_back(ranks):
    for found in ranks(2, _read_back):
        assert len(found) == 5 and set(found.values()) == {(0, 0)}


class Forked:
    """A launch by forked ranks, in place of Torchrun: it starts processes that import torch longer than they run."""

    def __init__(self, act, ranks, folder, size, partners):
        self.log, self.process = folder / f"{act}-{ranks}.log", self
        port, work = free_port(), (folder, checkpoint_recovery.SIZES[size], act, partners)
        fork = multiprocessing.get_context("fork")
        self.ranks = [fork.Process(target=self._rank, args=(rank, ranks, port, work)) for rank in range(ranks)]
        for rank in self.ranks:
            rank.start()

    def _rank(self, rank, ranks, port, work):
        os.dup2(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        sys.stderr = os.fdopen(2, "w", closefd=False)  # under pytest it was its own
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
        }
        os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        checkpoint_recovery.work(*work)

    def poll(self):
        codes = [rank.exitcode for rank in self.ranks]
        return None if None in codes else int(any(codes))

    def wait(self, timeout_s):
        for rank in self.ranks:
            rank.join(timeout_s)
        assert self.poll() is not None, self.tail()
        return self.poll()

    def tail(self):
        return self.log.read_text()[-3000:]

    def stop(self):
        for rank in self.ranks:
            rank.kill()
            rank.join()


@pytest.mark.slow
def test_a_killed_run_goes_on_from_what_is_left(tmp_path, monkeypatch):
    """torchrun starts the one rank that is left; the launches of several fork, which is all that differs."""

    def launch(act, ranks, *rest):
        return (Forked if ranks > 1 else torchrun)(act, ranks, *rest)

    kill_resume.prepare()
    torchrun = checkpoint_recovery.Torchrun
    monkeypatch.setattr(checkpoint_recovery, "Torchrun", launch)
    rows = checkpoint_recovery.recover(2, tmp_path, checkpoint_recovery.TINY.name)
    assert [row.ranks for row in rows] == [2, 2, 1, 2] and all(row.good for row in rows), rows
    assert [row.resumed for row in rows[1:3]] == [4, 4]  # the first from memory, which a slow disk may have kept busy
    assert rows[3].resumed is not None and rows[3].resumed > 4  # with partners nothing was lost


def _streamed(rank, world, spread):
    setting = stream_ranks.Setting(stream_ranks.TINY, 1, 24, 32, limit_bytes=900_000, search=True)
    trial = stream_ranks.trial(setting, spread, seed=5, checked={}, until_s=time.monotonic() + 2)
    found = {arm.name: (arm.run(), (arm.reference or trial.reference)()) for arm in trial.arms if not arm.unavailable}
    ranks = stream_ranks.Ranks()

    def fails():
        raise torch.OutOfMemoryError(f"rank {rank}")

    assert ranks.together(lambda: 7) == (7, "") and ranks.together(fails) == (None, "OutOfMemoryError: rank 0")
    with pytest.raises(RuntimeError, match="on 1 of 2 ranks"):  # both went on to agree: no collective is left open
        ranks.together(fails if rank else lambda: 7)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("spread", [False, True])
def test_streamed_steps_of_sharded_models_are_right(ranks, spread):
    pytest.importorskip("transformers")
    for found in ranks(2, _streamed, spread):
        assert found.keys() >= {"hf+ce", "ours, in the budget"}
        for measured, wrong in found.values():
            assert (measured.answer, wrong) == (0, 0)
        told = found["ours, in the budget"][0].extras
        assert told["run_tokens"] <= 900_000 / 64 and told["fits_80GB_tokens"] > told["fits_budget_tokens"]


def test_lengths_follow_from_the_last_two_peaks():
    found = stream_ranks.Found(1000, None, [(8, 300), (16, 460), (32, 940)], out_of_time=True)
    assert found.extras() == {
        "run_tokens": 32, "open": 1, "fits_budget_tokens": 34, "fits_80GB_tokens": 32 + (80e9 - 940) / 30
    }  # fmt: skip
    assert stream_ranks.Found(1000, None, [(8, 1200)]).extras() == {"run_tokens": 0, "open": 0}


@pytest.mark.parametrize("fixed, slope, bend", [(100, 2.0, 0.0), (0, 7.0, 0.0), (300, 1.0, 0.002), (2000, 1.0, 0.0)])
def test_a_search_by_peaks_comes_close_to_the_longest_in_few_steps(fixed, slope, bend):
    """Peaks that are straight in the tokens, peaks that bend, and a first length that is too long already."""
    found, tokens = stream_ranks.Found(2_064 if fixed > 1000 else 1000), 64

    def peak(length):
        return int(fixed + slope * length + bend * length**2)

    exact = next(n for n in range(10_000, 0, -1) if peak(n) <= found.limit_bytes)
    for _ in range(stream_ranks.STEPS):
        found.points.append((tokens, peak(tokens)))
        goal = found.goal()
        if goal is None:
            break
        tokens = int(goal)
    assert found.extras()["run_tokens"] >= 0.94 * exact


def test_a_search_goes_to_what_the_planner_promises():
    found = stream_ranks.Found(1000, promised=4000, points=[(100, 500)])
    assert found.goal() == 1000  # whose time tells the whole's
    found.points.append((1000, 980))
    assert found.goal() == 4000
    found.points.append((4000, 1001))
    assert found.goal() == pytest.approx(3400)  # it did not fit
    found.points.append((3400, 999))
    assert stream_ranks.Found(1000, 4000, [(100, 500), (4000, 990)]).goal() is None


@pytest.mark.parametrize("module", [ring_gpus, overlap_gpus, checkpoint_ranks, stream_ranks])
def test_one_rank_is_told_how_to_start_several(module):
    with pytest.raises(UserError, match="torchrun"):
        module.cases(Context())
