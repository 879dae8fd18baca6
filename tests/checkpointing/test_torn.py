"""Writers that no hook can see: a save they tear is never committed, and says so.

The disk is held, and the arena has room for two chunks of about fifteen, so that most of the state has not left yet
when the writer comes. Each writer changes every element of what it writes, as optimizers do; the guide names those that
change a few elements of a large tensor as not detectable.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import CHUNK_BYTES, HeldOps, Job, same

from undertow.checkpointing.arena import Arena


def through_data(job: Job) -> None:
    for parameter in job.model.parameters():
        parameter.data.add_(1)


def through_numpy(job: Job) -> None:
    for parameter in job.model.parameters():
        view = parameter.detach().numpy()
        view += 1


def raw_copy(job: Job) -> None:
    with torch.no_grad():
        for parameter in job.model.parameters():
            parameter.copy_(torch.ones_like(parameter))


def last_parameter_only(job: Job) -> None:
    job.model[-2].weight.data.mul_(2)


def exponential_average(job: Job) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(job.model.parameters()), [torch.zeros_like(p) for p in job.model.parameters()], 0.5)


def optimizer_state(job: Job) -> None:
    for values in job.optimizer.state.values():
        values["exp_avg_sq"].data.zero_()


def functional_optimizer(job: Job) -> None:
    """A fused step that goes round the optimizer object and its hooks."""
    state = [job.optimizer.state[p] for p in job.model.parameters()]
    torch._fused_adamw_(
        [p.data for p in job.model.parameters()],
        [torch.ones_like(p) for p in job.model.parameters()],
        [s["exp_avg"] for s in state],
        [s["exp_avg_sq"] for s in state],
        [],
        [s["step"] for s in state],
        lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip


def load_optimizer_values(job: Job) -> None:
    for values in job.optimizer.state.values():
        values["exp_avg"].copy_(torch.full_like(values["exp_avg"], 3))


def unregistered_optimizer(job: Job) -> None:
    job.forward_backward(7)
    torch.optim.SGD(job.model.parameters(), lr=0.5).step()


WRITERS = [
    through_data,
    through_numpy,
    raw_copy,
    last_parameter_only,
    exponential_average,
    optimizer_state,
    functional_optimizer,
    load_optimizer_values,
    unregistered_optimizer,
]


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_a_torn_save_is_never_committed(tmp_path, writer):
    job, ops = Job(), HeldOps()
    job.advance(0)
    with job.checkpointer(tmp_path, ops=ops, arena_bytes=2 * CHUNK_BYTES) as ckpt:
        before = job.state()
        ckpt.save(1)
        writer(job)
        ops.let_go.set()
        reports = ckpt.wait()
        assert [report.ok for report in reports] == [False]
        assert reports[0].reason.startswith("rank 0: the state was written while it was being copied")
        assert ckpt.failures == 1
        assert ckpt.folder.committed() == []
        after = job.state()
        ckpt.save(2)  # the next one is as good as ever
        assert ckpt.wait()[-1].ok
    assert not same(before, after)
    other = Job(seed=99)
    with other.checkpointer(tmp_path) as ckpt:
        assert ckpt.restore() == 2
    assert same(other.state(), after)


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_after_a_fence_anyone_may_write(tmp_path, writer):
    job, ops = Job(), HeldOps()
    job.advance(0)
    with job.checkpointer(tmp_path, ops=ops) as ckpt:  # room for all: the fence need not wait for the disk
        before = job.state()
        ckpt.save(1)
        ckpt.fence()
        writer(job)
        ops.let_go.set()
        assert [report.ok for report in ckpt.wait()] == [True]
    other = Job(seed=99)
    with other.checkpointer(tmp_path) as ckpt:
        ckpt.restore()
    assert same(other.state(), before)


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_whatever_the_moment_a_committed_save_is_right(tmp_path, writer):
    """No hold: the writer may come before, during or after the copies. Committed means equal to the state at save."""
    job = Job()
    job.advance(0)
    with job.checkpointer(tmp_path, every=1, keep=1) as ckpt:
        for step in range(1, 4):
            before = job.state()
            ckpt.save(step)
            writer(job)
            if ckpt.wait()[-1].ok:
                after = job.state()
                assert ckpt.restore() == step
                assert same(job.state(), before)
                job.model.load_state_dict({k[6:]: v for k, v in after.items() if k.startswith("model.")})


def test_a_fence_does_not_wait_for_room_that_no_chunk_needs(tmp_path, monkeypatch):
    """The other thread takes the last chunk, and with it the last slot, while this one asks for room."""
    reserve = Arena.reserve

    def late(arena, count):
        if threading.current_thread() is threading.main_thread():
            time.sleep(0.1)  # long enough for the other thread to take all that it is let take
        return reserve(arena, count)

    monkeypatch.setattr(Arena, "reserve", late)
    job, ops = Job(), HeldOps()
    job.advance(0)
    with job.checkpointer(tmp_path, ops=ops) as ckpt:
        ckpt.save(1)
        ckpt.fence()  # holds for good if it waits for a write
        ops.let_go.set()
        assert [report.ok for report in ckpt.wait()] == [True]
