"""A signal saves the same step on all ranks; a dead peer is noticed at once, and nothing waits for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from undertow.checkpointing import Checkpointer, Partner, Preemption, host_tier
from undertow.checkpointing.partner_copy import PartnerFile
from undertow.dist.errors import UserError


def loop(rank: int, root: Path, steps: int, at: dict[int, tuple[int, int]], *, pause_s: float = 0.02):
    """A lock-stepped loop; `at`: step → (rank, signal it sends to itself). The step it left the loop in, or None."""
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Checkpointer(root, model=model, optimizer=optimizer, preemption=Preemption(grace_s=240)) as ckpt:
        for step in range(steps):
            ckpt.step(step)
            if ckpt.preempted:
                return step, [report.step for report in ckpt.reports if report.ok]
            if step in at and at[step][0] == rank:
                os.kill(os.getpid(), at[step][1])
            if dist.is_initialized():
                dist.barrier()
            model(torch.ones(1, 8)).sum().backward()
            optimizer.step()
            time.sleep(pause_s * (rank + 1) / 2)
    return None, []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("told", [0, 2])
def test_one_rank_is_told_and_all_save_the_same_step(ranks, tmp_path, number, told):
    ends = ranks(3, lambda rank, world: loop(rank, tmp_path / "c", 5000, {5: (told, number)}))
    steps = {step for step, _ in ends}
    assert len(steps) == 1 and 5 < steps.pop() < 5000
    assert all(saved == [step] for step, saved in ends)
    assert (tmp_path / "c" / f"step-{ends[0][0]:09d}" / "COMMIT.json").is_file()


def test_every_rank_is_told_at_another_moment(ranks, tmp_path):
    def told(rank, world):
        return loop(rank, tmp_path / "c", 5000, {3 + rank: (rank, signal.SIGTERM)})

    ends = ranks(3, told)
    assert len({step for step, _ in ends}) == 1 and all(saved == [step] for step, saved in ends)


def test_a_process_alone(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    assert loop(0, tmp_path / "c", 50, {7: (0, signal.SIGUSR1)}) == (8, [8])
    assert signal.getsignal(signal.SIGUSR1) is before


def signal_and_await_the_verdict(ckpt: Checkpointer) -> None:
    assert ckpt._preempter is not None
    os.kill(os.getpid(), signal.SIGUSR1)
    until_s = time.monotonic() + 60
    while ckpt._preempter._verdict is None:
        assert time.monotonic() < until_s
        time.sleep(0.01)


def test_what_came_back_from_memory_goes_to_disk_when_the_job_must_leave(tmp_path, monkeypatch):
    """The machine may be another one's soon: the signal's save is one to disk, although the step is saved already."""
    memory = tmp_path / "shm"
    memory.mkdir()
    monkeypatch.setattr(host_tier, "SHARED_MEMORY", memory)
    model = torch.nn.Linear(8, 8)
    with Checkpointer(tmp_path / "c", model=model, host_every=1) as ckpt:
        assert ckpt.save(3, disk=False, host=True)
    expected = model.weight.detach().clone()
    torch.nn.init.zeros_(model.weight)
    with Checkpointer(tmp_path / "c", model=model, host_every=1, preemption=Preemption(grace_s=240)) as ckpt:
        assert ckpt.restore() == 3 and ckpt.folder.committed() == []
        signal_and_await_the_verdict(ckpt)
        assert ckpt.step(3) and ckpt.preempted
        assert ckpt.folder.committed() == [3]
    other = torch.nn.Linear(8, 8)
    with Checkpointer(tmp_path / "c", model=other) as ckpt:
        assert ckpt.restore() == 3 and torch.equal(other.weight, expected)


def test_a_copy_that_still_travels_does_not_keep_the_job_in_its_loop(tmp_path, monkeypatch):
    """A partner may take longer than the grace time; what the signal wants is on disk before."""
    memory, go, begin = tmp_path / "shm", threading.Event(), PartnerFile.begin
    memory.mkdir()
    monkeypatch.setattr(PartnerFile, "begin", lambda file: (go.wait(250), begin(file))[1])
    options = {"host_every": 1, "partner": Partner(memory=memory), "preemption": Preemption(grace_s=240)}
    with Checkpointer(tmp_path / "c", model=torch.nn.Linear(8, 8), **options) as ckpt:
        assert ckpt.step(0)
        signal_and_await_the_verdict(ckpt)
        assert ckpt.step(1) and ckpt.preempted
        assert [(report.step, report.tier, report.ok) for report in ckpt.reports] == [(1, "disk", True)]
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the program's own, which `close` must leave alone
        go.set()
    assert signal.signal(signal.SIGUSR1, signal.SIG_DFL) is signal.SIG_IGN
    assert [(report.step, report.tier, report.ok) for report in ckpt.reports[1:]] == [(0, "partner", True)]


def test_no_signal_changes_nothing(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert loop(0, tmp_path / "c", 5, {}) == (None, [])
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_a_dead_peer_is_named_and_not_waited_for(tmp_path):
    """Rank 1 is killed while rank 0 saves: its close must not wait for the ten minutes of timeout_s."""
    done = subprocess.run(
        [sys.executable, "-c", SURVIVOR, str(tmp_path / "c")], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert "rank 1 died before it answered" in done.stdout
    assert [path.name for path in (tmp_path / "c").glob("step-*")] == ["step-000000001"]


SURVIVOR = """
import os, signal, sys, time
import torch, torch.distributed as dist
from undertow.checkpointing import Checkpointer

root, pids = sys.argv[1], []
for rank in range(2):
    pid = os.fork()
    if pid == 0:
        dist.init_process_group("gloo", init_method=f"file://{root}.store", rank=rank, world_size=2)
        ckpt = Checkpointer(root, model=torch.nn.Linear(64, 64), timeout_s=600)
        ckpt.save(1)
        ckpt.wait()
        dist.barrier()
        if rank == 1:
            if os.fork() == 0:  # a data loader's worker, which outlives its parent
                os.close(1), os.close(2)
                time.sleep(20)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)
        ckpt.save(2)
        ckpt.close()
        print(ckpt.reports[-1].reason, flush=True)
        os._exit(0)
    pids.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
sys.exit(codes != [0, -signal.SIGKILL])
"""


@pytest.mark.slow
def test_when_a_peer_is_dead_the_signal_takes_its_usual_effect(tmp_path):
    """The survivor hangs in a collective, as a rank of a dead peer's does; it must die by the signal, or be killed."""
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN, str(tmp_path / "c")], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert "rank 1 is dead" in done.stderr


ORPHAN = """
import os, signal, sys, time
import torch, torch.distributed as dist
from undertow.checkpointing import Checkpointer, Preemption

root, pids = sys.argv[1], []
for rank in range(2):
    pid = os.fork()
    if pid == 0:
        dist.init_process_group("gloo", init_method=f"file://{root}.store", rank=rank, world_size=2)
        ckpt = Checkpointer(root, model=torch.nn.Linear(64, 64), preemption=Preemption(grace_s=200))
        ckpt.step(0)
        dist.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3600)
        os._exit(0)
    pids.append(pid)
os.waitpid(pids[1], 0)
time.sleep(0.3)
os.kill(pids[0], signal.SIGTERM)
code = os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1])
sys.exit(code not in (-signal.SIGTERM, -signal.SIGKILL))  # the latter where it was not scheduled for two seconds
"""


@pytest.mark.parametrize("wrong", [{"signals": ()}, {"signals": ("SIGNAL",)}, {"signals": ("TERM",)}, {"grace_s": 0}])
def test_wrong_use(wrong):
    with pytest.raises(UserError):
        Preemption(**wrong)
