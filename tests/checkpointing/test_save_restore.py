"""Save and restore in one process: equal bits, whatever the arena, while training goes on and changes everything."""

from __future__ import annotations

import inspect
import random
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import CHUNK_BYTES, HeldOps, Job, same, snapshot_of

from undertow.checkpointing import Checkpointer, Mirror
from undertow.checkpointing.files import FileOps
from undertow.checkpointing.manifest import metrics_of
from undertow.checkpointing.options import FREE, RULES
from undertow.dist.errors import UserError


def test_each_step_comes_back_as_it_was(tmp_path):
    job, states = Job(), {}
    with job.checkpointer(tmp_path, every=1, keep=None) as ckpt:
        for step in range(5):
            states[step] = job.state()
            assert ckpt.step(step)
            job.advance(step)
        assert [report.ok for report in ckpt.wait()] == [True] * 5
    assert not same(states[3], states[4])
    for step in (4, 2, 0):
        other = Job(seed=99)
        with other.checkpointer(tmp_path) as ckpt:
            assert ckpt.restore(step) == step
        assert same(other.state(), states[step]), step


def test_a_step_that_is_saved_again_while_it_is_on_its_way_is_saved_twice(tmp_path):
    """The last step of a loop that is due, and once more at its end: the later state counts, everywhere."""
    job, far = Job(), tmp_path / "far"
    with job.checkpointer(tmp_path / "c", mirror=Mirror(far)) as ckpt:
        for _ in range(3):
            ckpt.save(7)
            job.advance(7)
        ckpt.save(7)
        state = job.state()
        reports = ckpt.wait()
    assert [(report.step, report.ok) for report in reports] == [(7, True)] * 8, reports
    for root in (tmp_path / "c", far):
        assert sorted(path.name for path in root.glob("*step*")) == ["step-000000007"]
        other = Job(seed=99)
        with other.checkpointer(root) as ckpt:
            assert ckpt.restore() == 7
        assert same(other.state(), state), root


@pytest.mark.parametrize("share", [1.0, 0.25, 0.0])
def test_an_arena_smaller_than_the_state_means_waiting_not_failure(tmp_path, share):
    """0.0 asks for the smallest arena: two chunks, about a twentieth of the state."""
    job, states = Job(layers=3), {}
    job.advance(0)
    size = sum(value.nbytes for value in job.state().values() if isinstance(value, torch.Tensor))
    with job.checkpointer(tmp_path, every=1, keep=None, arena_bytes=max(1, int(share * size))) as ckpt:
        for step in range(6):
            states[step] = job.state()
            ckpt.step(step)
            job.advance(step)
        assert all(report.ok for report in ckpt.wait())
    assert size > 20 * CHUNK_BYTES
    for step in reversed(states):
        other = Job(seed=99, layers=3)
        with other.checkpointer(tmp_path) as ckpt:
            ckpt.restore(step)
        assert same(other.state(), states[step]), step


def test_the_fence_waits_for_a_slow_disk_and_training_cannot_tear_the_save(tmp_path):
    """The writer stands still until the optimizer is inside its step: every byte saved is from before it."""
    import threading

    job, ops = Job(layers=3), HeldOps()
    job.advance(0)
    with job.checkpointer(tmp_path, arena_bytes=2 * CHUNK_BYTES, ops=ops) as ckpt:
        before = job.state()
        ckpt.save(1)
        job.forward_backward(1)
        before |= {k: v for k, v in snapshot_of(job.model).items() if "running" not in k and "num_batches" not in k}
        threading.Timer(0.3, ops.let_go.set).start()
        job.optimizer.step()
        assert [report.ok for report in ckpt.wait()] == [True]
    other = Job(seed=99, layers=3)
    with other.checkpointer(tmp_path) as ckpt:
        assert ckpt.restore() == 1
    assert same(other.state(), before)


def test_buffers_are_of_the_moment_of_the_save(tmp_path):
    """BatchNorm writes its statistics in forward, while the copies of parameters are still under way."""
    job, ops = Job(), HeldOps()
    with job.checkpointer(tmp_path, ops=ops, arena_bytes=2 * CHUNK_BYTES) as ckpt:
        before = job.state()
        ckpt.save(0)
        for step in range(3):
            job.forward_backward(step)  # changes running_mean, running_var and num_batches_tracked
        ops.let_go.set()
        ckpt.wait()
    assert not same(job.state(), before)
    other = Job(seed=99)
    with other.checkpointer(tmp_path) as ckpt:
        ckpt.restore()
    assert same(other.state(), before)


def test_random_numbers_go_on_as_they_would_have(tmp_path):
    job = Job()

    def draw() -> tuple:
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()

    np.random.seed(5)
    draw()
    with job.checkpointer(tmp_path) as ckpt:
        ckpt.save(0)
        expected = [draw() for _ in range(3)]
        ckpt.restore()
        assert [draw() for _ in range(3)] == expected


def test_step_saves_only_when_due(tmp_path):
    job = Job()
    with job.checkpointer(tmp_path, every=3, keep=None) as ckpt:
        begun = []
        for step in range(8):
            begun.append(ckpt.step(step))
            job.advance(step)
    assert begun == [True, False, False, True, False, False, True, False]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{s:09d}" for s in (0, 3, 6)]


def test_keep_prunes_the_oldest(tmp_path):
    job = Job()
    with job.checkpointer(tmp_path, every=1, keep=2) as ckpt:
        for step in range(5):
            ckpt.step(step)
            job.advance(step)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000000003", "step-000000004"]


def test_nothing_saved_restores_none_and_changes_nothing(tmp_path):
    job = Job()
    before = job.state()
    with job.checkpointer(tmp_path) as ckpt:
        assert ckpt.restore() is None
        with pytest.raises(UserError, match="no committed checkpoint of step 5"):
            ckpt.restore(5)
    assert same(job.state(), before)


def test_resuming_gives_the_same_bits_as_never_having_stopped(tmp_path):
    straight = Job()
    for step in range(8):
        straight.advance(step)
    first = Job()
    with first.checkpointer(tmp_path, every=1) as ckpt:
        for step in range(5):
            ckpt.step(step)
            first.advance(step)
    second = Job(seed=99)
    with second.checkpointer(tmp_path) as ckpt:
        start = ckpt.restore()
        assert start == 4
        for step in range(start, 8):
            second.advance(step)
    assert same(second.state(), straight.state())


def test_rolling_back_leaves_the_newer_ones_aside(tmp_path):
    job = Job()
    with job.checkpointer(tmp_path, every=1, keep=None) as ckpt:
        for step in range(4):
            ckpt.step(step)
            job.advance(step)
        ckpt.wait()
        assert ckpt.restore(1) == 1
        job.advance(50)
        expected = job.state()
        ckpt.save(2)
        ckpt.wait()
    other = Job(seed=99)
    with other.checkpointer(tmp_path) as ckpt:
        assert ckpt.restore() == 2
    assert same(other.state(), expected)


def test_a_mirror_follows_a_rollback(tmp_path):
    """The steps between were sent before, of another branch."""
    job, far = Job(), tmp_path / "far"
    with job.checkpointer(tmp_path / "c", mirror=Mirror(far, every=2), keep=None) as ckpt:
        for step in range(5):
            ckpt.save(step)
            job.advance(step)
        assert ckpt.restore(1) == 1
        for step in (2, 3, 4):
            job.advance(step + 100)
            ckpt.save(step)
            state = job.state()
        reports = ckpt.wait()
    assert [report.step for report in reports if report.tier == "mirror"] == [0, 2, 4, 2, 4]
    other = Job(seed=99)
    with other.checkpointer(far) as ckpt:
        assert ckpt.restore() == 4
    assert same(other.state(), state)


def test_what_is_switched_off_does_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERTOW_DISABLE", "1")
    job = Job()
    with job.checkpointer(tmp_path, every=1) as ckpt:
        assert not ckpt.step(0)
        job.advance(0)
        assert ckpt.wait() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": -1}, "every=-1"),
        ({"keep": 0}, "keep=0"),
        ({"every": 2.5}, "every=2.5; expected every ≥ 0 steps, or a Frequency"),
        ({"every": True}, "every=True"),
        ({"keep": "3"}, "keep='3'; expected keep ≥ 1, None for all, or a Retention"),
        ({"mirror": "/lustre"}, "mirror='/lustre'; expected None or a Mirror"),
        ({"bucket": "s3://b"}, "expected None or a Bucket"),
        ({"host_every": -1}, "host_every=-1"),
        ({"partner": True, "host_every": 1}, "partner=True; expected None or a Partner"),
        ({"per_rank": [1]}, "per_rank=.*expected None or a dict of objects"),
        ({"arena_bytes": 0}, "arena_bytes=0"),
        ({"writers": 0}, "writers=0"),
        ({"recycle": 0}, "recycle=0; expected None"),  # 0 is not False here
        ({"timeout_s": 0}, "timeout_s=0; expected seconds > 0"),
        ({"preemption": True}, "preemption=True; expected None or a Preemption"),
        ({"allow_types": "Path"}, "allow_types='Path'; expected a list of classes"),
        ({"observers": [3]}, "observers=.*expected a list of functions"),
        ({"extra": 3}, "'extra' has no state_dict.*type int"),
        ({"evry": 3}, "no option 'evry'; to mend it: every=3"),
        ({"host_evry": 3}, "no option 'host_evry'; to mend it: host_every=3"),
    ],
)
def test_wrong_options_are_named_and_hold_no_folder(tmp_path, options, message):
    job = Job()
    with pytest.raises(UserError, match=message):
        job.checkpointer(tmp_path / "c", **options)
    job.checkpointer(tmp_path / "c", every=np.int64(3), keep=None).close()


@pytest.mark.parametrize("step", [-1, "a", 2.0, None])
def test_what_is_no_step_is_refused_and_the_next_one_works(tmp_path, step):
    with Job().checkpointer(tmp_path, every=1) as ckpt:
        for begin in (ckpt.step, ckpt.save):
            with pytest.raises(UserError, match="step=.*expected a whole number ≥ 0"):
                begin(step)
        assert ckpt.step(np.int64(4)) and ckpt.save(torch.tensor(5))
        assert [report.ok for report in ckpt.wait()] == [True, True]
    assert ckpt.folder.committed() == [4, 5]


def test_metrics_are_taken_as_numbers_or_refused_by_name(tmp_path):
    loss = torch.tensor(1.5, requires_grad=True)
    with Job().checkpointer(tmp_path, every=1) as ckpt:
        for wrong in ({"loss": "1.5"}, {"loss": torch.ones(2)}, {"loss": None}, [1.5]):
            with pytest.raises(UserError, match="metrics"):
                ckpt.step(1, metrics=wrong)
        assert ckpt.step(1, metrics={"loss": loss, "bits": np.float32(0.25), "n": 3})
        loss.data.zero_()
        ckpt.wait()
    assert metrics_of(ckpt.folder.manifest(1)) == {"loss": 1.5, "bits": 0.25, "n": 3.0}


def test_after_close_a_save_is_refused_and_nothing_waits(tmp_path):
    with Job().checkpointer(tmp_path, every=1) as ckpt:
        ckpt.step(0)
    for begin in (ckpt.step, ckpt.save):
        with pytest.raises(UserError, match=r"step 1 after close\(\)"):
            begin(1)
    assert len(ckpt.wait()) == 1 and ckpt.status() == "saved 0"


def test_every_option_has_a_rule():
    names = inspect.signature(Checkpointer.__init__).parameters.keys() - {"self", "root", "objects"}
    assert names | {"recycle"} == {*RULES, *FREE}


def test_nothing_to_save_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing to checkpoint"):
        Checkpointer(tmp_path)


def test_an_optimizer_of_strange_parameters_is_refused(tmp_path):
    job, stranger = Job(), nn.Linear(3, 3)
    job.optimizer.add_param_group({"params": stranger.parameters()})
    with job.checkpointer(tmp_path) as ckpt:
        with pytest.raises(UserError, match="2 parameter\\(s\\) of no module"):
            ckpt.save(0)


def test_files_follow_the_umask(tmp_path):
    import os

    before = os.umask(0o027)
    try:
        job = Job()
        with job.checkpointer(tmp_path / "c", ops=FileOps(direct=False)) as ckpt:
            ckpt.save(0)
    finally:
        os.umask(before)
    made = [path for path in (tmp_path / "c").rglob("*")]
    assert made
    assert all(path.stat().st_mode & 0o027 == 0 for path in made)


class SlowToRemove(FileOps):
    """Large folders are removed only when `go` is set."""

    def __init__(self) -> None:
        super().__init__(direct=False)
        self.go, self.begun = threading.Event(), threading.Event()

    def rmtree(self, path: Path) -> None:
        if path.name.startswith("step-"):
            self.begun.set()
            assert self.go.wait(240)
        super().rmtree(path)


def test_the_next_commit_does_not_wait_for_what_is_removed(tmp_path):
    """From its turn on an old checkpoint is none, though its bytes go later; its name can be taken again at once."""
    job, ops = Job(layers=1), SlowToRemove()
    with job.checkpointer(tmp_path, keep=1, ops=ops) as ckpt:
        for step in (1, 2):
            ckpt.save(step)
        assert ops.begun.wait(240)
        ckpt.save(3)
        deadline_s = time.monotonic() + 240
        while ckpt.folder.committed() != [3]:
            assert time.monotonic() < deadline_s, "the third waits for the first to go"
            time.sleep(0.01)
        assert (tmp_path / "step-000000001").exists() and not ops.go.is_set()
        ops.go.set()
        ckpt.wait()
        ops.go.clear()
        ops.begun.clear()
        ckpt.save(4)
        assert ops.begun.wait(240)  # of step 3
        state = job.state()
        ckpt.save(3)  # of a run that goes back to it
        ckpt.fence()
        job.advance(1)
        ops.go.set()
        assert [report.ok for report in ckpt.wait()] == [True] * 5
        assert ckpt.restore() == 3 and same(job.state(), state)
        assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000000003"]
