"""Saves to memory that find no generation free: they cost no look at the state. And claims that come to nothing."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import HeldOps, Job, same

from undertow.checkpointing import Checkpointer, Frequency, Partner, host_tier, saver
from undertow.checkpointing.partner_copy import PartnerFile


class Counted:
    """An object that counts how often its state was read, and raises when told to."""

    def __init__(self) -> None:
        self.reads, self.raises = 0, False

    def state_dict(self) -> dict[str, Any]:
        self.reads += 1
        if self.raises:
            raise RuntimeError("no position now")
        return {"value": torch.ones(3)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["value"].tolist() == [1, 1, 1]


def opened(job: Job, root: str, memory: str, tier: str, **options: Any) -> Checkpointer:
    host_tier.SHARED_MEMORY = Path(memory)
    partner = Partner(across_hosts=False, memory=memory, address="127.0.0.1") if tier == "partner" else None
    return job.checkpointer(Path(root), **{"host_every": 1, "host_generations": 2, "partner": partner, **options})


def together() -> None:
    if dist.is_initialized():
        dist.barrier()


def skips(rank: int, world: int, root: str, memory: str, tier: str) -> tuple[list, list[int], int, int, bool]:
    """One generation holds the newest save, and the other is busy: with the disk's save, or with a partner's copy."""
    job, counted, ops, go = Job(layers=1), Counted(), HeldOps(), threading.Event()
    job.advance(9)  # the optimizer has all of its state: every save has the same plan
    begin = PartnerFile.begin
    PartnerFile.begin = lambda file: (go.wait(60) if file._errand.step == 1 else None, begin(file))[1]  # type: ignore
    with opened(job, root, memory, tier, counted=counted, ops=ops) as ckpt:
        looks, values = [], ckpt._live.values
        ckpt._live.values = lambda *what: (looks.append(what), values(*what))[1]  # type: ignore[method-assign]
        begun, seen = [], []
        for step in range(5):
            begun.append(ckpt.save(step, disk=tier == "host" and step == 0, host=True))
            seen.append((counted.reads, len(looks)))
            job.advance(step)
            if step == 3:
                ops.let_go.set()
                go.set()
                ckpt.wait()
            elif step == 0 or (step == 1 and tier == "host"):  # else it stays busy
                while isinstance(ckpt.host, host_tier.HostTier) and ckpt.host.turns._committing():
                    time.sleep(0.001)  # until the copies are handed over there is nothing to drain
                ckpt._tiers._committers[tier].drain()
            together()
        ckpt.wait()
        assert ckpt.host is not None
        skipped, state = ckpt.host.skipped, job.state()
        found = ckpt.restore()
        job.advance(4)
        return begun, [b == a for a, b in zip(seen, seen[1:])], skipped, found or -1, same(job.state(), state)


@pytest.mark.parametrize(("tier", "world"), [("host", 1), ("host", 2), ("partner", 1), ("partner", 2)])
def test_a_save_without_a_generation_leaves_the_state_unread(ranks, tmp_path, tier, world):
    memory = tmp_path / "shm"
    memory.mkdir()
    for begun, unread, skipped, found, alike in ranks(world, skips, str(tmp_path / "c"), str(memory), tier):
        assert begun == [True, True, False, False, True]
        assert unread == [False, True, True, False]
        assert (skipped, found, alike) == (2, 4, True)


def test_memory_that_takes_nothing_for_long_is_said_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(saver, "MISSED", 3)
    job, ops = Job(layers=1), HeldOps()
    job.advance(9)
    (tmp_path / "shm").mkdir()
    with opened(job, str(tmp_path / "c"), str(tmp_path / "shm"), "host", ops=ops) as ckpt:
        for step in range(8):
            assert ckpt.save(step, disk=step == 0, host=True) == (step < 2)  # the first is held up on its way to disk
            job.advance(step)
            while ckpt.host.turns._committing():
                time.sleep(0.001)
            ckpt._tiers._committers["host"].drain()
            assert caplog.text.count("found no place") == (step >= 4)
        ops.let_go.set()
        ckpt.wait()
        assert ckpt.save(9, disk=False, host=True)


def raises(rank: int, world: int, root: str, memory: str, tier: str, guilty: int) -> tuple[list, int, int, bool]:
    """The state of `guilty` cannot be read in steps 2, 3 and 5; no generation may be lost by it."""
    job, counted = Job(layers=1), Counted()
    job.advance(9)
    with opened(job, root, memory, tier, counted=counted) as ckpt:
        for step in range(8):
            counted.raises = rank == guilty and step in (2, 3, 5)
            if counted.raises:
                with pytest.raises(RuntimeError, match="no position now"):
                    ckpt.save(step, disk=False, host=True)
            else:
                ckpt.save(step, disk=False, host=True)
            counted.raises, state = False, job.state()
            job.advance(step)
            ckpt.wait()
            together()
        assert ckpt.host is not None
        skipped, found = ckpt.host.skipped, ckpt.restore()
        return [(report.step, report.ok) for report in ckpt.reports], skipped, found or -1, same(job.state(), state)


@pytest.mark.parametrize(("world", "guilty"), [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("tier", ["host", "partner"])
def test_a_state_that_raises_after_the_claim_gives_the_generation_back(ranks, tmp_path, tier, world, guilty):
    memory = tmp_path / "shm"
    memory.mkdir()
    for ended, skipped, found, alike in ranks(world, raises, str(tmp_path / "c"), str(memory), tier, guilty):
        assert ended == [(step, step not in (2, 3, 5)) for step in range(8)]
        assert (skipped, found, alike) == (0, 7, True)


def grows(rank: int, world: int, root: str, memory: str, tier: str) -> tuple[list, int, int, bool]:
    """At steps 3 and 4 there is one more tensor, at 6 one less, and in step 4 rank 0 has no memory for the new plan."""
    job, more = Job(layers=1), nn.ParameterDict()
    job.advance(9)
    with opened(job, root, memory, tier, more=more) as ckpt:
        assert ckpt.host is not None
        prepare = ckpt.host._prepare

        def short(*what: Any) -> None:
            if rank == 0 and step == 4:
                raise MemoryError("none left")
            prepare(*what)

        ckpt.host._prepare = short  # type: ignore[method-assign]
        for step in range(8):
            if step in (3, 4):
                more[str(step)] = nn.Parameter(torch.full((300, 300), float(step)))
            if step == 6:
                del more["4"]
            ckpt.save(step, disk=False, host=True)
            state = job.state(), [p.tolist() for p in more.values()]
            job.advance(step)
            ckpt.wait()
            together()
        skipped = ckpt.host.skipped
        with torch.no_grad():
            more["3"].zero_()
        found = ckpt.restore()
        alike = same(job.state(), state[0]) and [p.tolist() for p in more.values()] == state[1]
        return [(report.step, report.ok) for report in ckpt.reports], skipped, found or -1, alike


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("tier", ["host", "partner"])
def test_a_claim_that_a_new_plan_makes_void_is_made_again(ranks, tmp_path, tier, world):
    memory = tmp_path / "shm"
    memory.mkdir()
    for ended, skipped, found, alike in ranks(world, grows, str(tmp_path / "c"), str(memory), tier):
        assert ended == [(step, step != 4) for step in range(8)]
        assert (skipped, found, alike) == (0, 7, True)


def often(rank: int, world: int, root: str, memory: str) -> tuple[list[bool], int, list[tuple[int, bool]], int]:
    """An interval that is chosen from what saves cost, with copies that take several steps, longer on rank 1."""
    job, begin = Job(layers=1), PartnerFile.begin
    job.advance(9)
    PartnerFile.begin = lambda file: (time.sleep(0.05 * (1 + rank)), begin(file))[1]  # type: ignore[method-assign]
    with opened(job, root, memory, "partner", host_every=Frequency(mtbf_s=1e-3, overhead=1.0, first=1)) as ckpt:
        begun = []
        for step in range(60):
            begun.append(ckpt.step(step))
            job.advance(step)
            together()
        ckpt.wait()
        assert ckpt.host is not None
        ended = [(report.step, report.ok) for report in ckpt.reports]
        return begun, ckpt.host.skipped, ended, ckpt.restore() or -1


def test_skipped_saves_leave_all_ranks_at_one_interval(ranks, tmp_path):
    memory = tmp_path / "shm"
    memory.mkdir()
    first, second = ranks(2, often, str(tmp_path / "c"), str(memory))
    assert first == second
    begun, skipped, ended, found = first
    steps = [step for step, was in enumerate(begun) if was]
    assert skipped > 0 and ended == [(step, True) for step in steps] and found == steps[-1]
