"""A rank that must give a save up, or has no memory for one: it costs that save on all ranks, and all are in step."""

from __future__ import annotations

import pickle
import shutil
import sys
import time
from collections import namedtuple
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import Job, Moody, same

from undertow.checkpointing import Mirror, async_save, host_tier, open_checkpoint
from undertow.checkpointing.attempt import ANEW
from undertow.checkpointing.coordinate import Coordinator
from undertow.checkpointing.lifeline import Lifeline
from undertow.dist.errors import PeerLost, UserError

Usage = namedtuple("Usage", "total used free")


def one_raises(rank: int, world: int, root: str, memory: str, guilty: int, host: bool) -> tuple[list, int, bool]:
    """It raises at the first plan (0), between saves of one shape (2), and when all others plan anew (4)."""
    host_tier.SHARED_MEMORY = Path(memory)
    job, moody = Job(layers=1), Moody()
    with job.checkpointer(
        Path(root), moody=moody, host_every=int(host), mirror=Mirror(root + ".far", every=3), keep=None
    ) as ckpt:
        for step in range(6):
            moody.value, moody.size = step, int(step >= 4)
            moody.raises = rank == guilty and step % 2 == 0
            before = ckpt.failures
            if moody.raises:
                with pytest.raises(RuntimeError, match="no position now"):
                    ckpt.save(step, host=host)
                assert ckpt.failures > before  # counted here as well, at once
            else:
                ckpt.save(step, host=host)
            moody.raises, moody.value = False, -1
            state = job.state()
            job.advance(step)
            ckpt.wait()
        assert ckpt.restore() == 5
        found = sorted((report.step, report.tier, report.ok) for report in ckpt.reports)
        for report in ckpt.reports:
            assert report.ok or f"rank {guilty}: RuntimeError: the loader has no position now" in report.reason
        return found, moody.value, same(job.state(), state)


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("guilty", [0, 1])
def test_a_state_dict_that_raises_on_one_rank_costs_one_save_on_all(ranks, tmp_path, guilty, host):
    memory = tmp_path / "shm"
    memory.mkdir()
    first, second = ranks(2, one_raises, str(tmp_path / "root"), str(memory), guilty, host)
    assert first == second
    found, value, whole = first
    assert value == 5 and whole
    tiers = ["disk", "host"] if host else ["disk"]
    assert [row for row in found if row[1] != "mirror"] == [(s, t, s % 2 == 1) for s in range(6) for t in tiers]
    assert [row for row in found if row[1] == "mirror"] == [(0, "mirror", False), (3, "mirror", True)]
    assert not list(tmp_path.glob("root*/.step-*"))  # what the others wrote of refused saves is cleared away


def one_grows(rank: int, world: int, root: str, memory: str, guilty: int, host: bool) -> tuple[list, int]:
    """The state of one rank has another shape in steps 2 to 4, and in 7 again."""
    host_tier.SHARED_MEMORY = Path(memory)
    job, moody = Job(layers=1), Moody()
    with job.checkpointer(Path(root), moody=moody, host_every=int(host), keep=None) as ckpt:
        for step in range(8):
            moody.value, moody.size = step, int(rank == guilty and step in (2, 3, 4, 7))
            ckpt.save(step, host=host)
            job.advance(step)
            ckpt.wait()
        moody.value = -1
        assert ckpt.restore() == 6
        reports = sorted((report.step, report.tier, report.reason) for report in ckpt.reports)
        return reports, moody.value


@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("guilty", [0, 1])
def test_a_state_that_changes_on_one_rank_costs_one_save_each_time(ranks, tmp_path, guilty, host):
    """Nobody waits for a rank that has nothing to plan (240 s, three times: longer than `ranks` waits), and the next
    save has a plan of all."""
    memory = tmp_path / "shm"
    memory.mkdir()
    first, second = ranks(2, one_grows, str(tmp_path / "root"), str(memory), guilty, host)
    assert first == second
    reports, value = first
    assert value == 6
    lost = {step: reason for step, _, reason in reports if reason}
    assert lost.keys() == {2, 5, 7}
    for reason in lost.values():
        assert f"the state on rank {1 - guilty} has kept its shape" in reason and "anew at the next save" in reason
        assert f"on rank {guilty} 'moody" in reason and "'moody.more0'" in reason and "in per_rank" in reason


def one_raises_when_memory_is_gone(rank: int, world: int, root: str, memory: str, guilty: int) -> tuple[list, int]:
    """Somebody removes what is in memory, and the save that finds it out is one that a rank gives up."""
    host_tier.SHARED_MEMORY = Path(memory)
    job, moody = Job(layers=1), Moody()
    job.advance(9)  # the state keeps its shape from here on
    with job.checkpointer(Path(root), moody=moody, host_every=1, every=1, keep=None) as ckpt:
        for step in range(7):
            if step == 1:  # its place is asked for, and that of the next one is chosen
                dist.barrier()
                for path in Path(memory).iterdir() if rank == 0 else ():
                    shutil.rmtree(path)
                dist.barrier()
            moody.value, moody.raises = step, step == 1 and rank == guilty
            with pytest.raises(RuntimeError, match="no position now") if moody.raises else nullcontext():
                ckpt.step(step)
            job.advance(step)
            ckpt.wait()
        moody.value = -1
        assert ckpt.restore() == 6
        return [(report.step, report.tier, report.reason) for report in ckpt.reports if not report.ok], moody.value


@pytest.mark.parametrize("guilty", [0, 1])
def test_no_rank_knows_a_place_in_memory_that_the_others_have_forgotten(ranks, tmp_path, guilty):
    """Chosen before the memory was lost, and kept by the rank that gave up the save in which others made it anew."""
    memory = tmp_path / "shm"
    memory.mkdir()
    for lost, value in ranks(2, one_raises_when_memory_is_gone, str(tmp_path / "c"), str(memory), guilty):
        assert value == 6 and {step for step, _, _ in lost} >= {1}
        assert all("no position now" in why or step > 1 and "RemoveIPC" in why for step, _, why in lost), lost


def test_each_tier_asks_for_a_plan_of_all_and_one_is_made(tmp_path):
    with Job(layers=1).checkpointer(tmp_path / "c") as ckpt:
        ckpt.save(1)
        (report,) = ckpt.wait()
        for planned in (False, True):  # the report of a slower tier comes after the new plan
            ckpt._live.heard(replace(report, step=2, ok=False, reason=f"lost; {ANEW}"), 0)
            assert ckpt._live.planned == planned
            ckpt.save(3)
            assert ckpt.wait()[-1].ok


def state_outgrows_memory(rank: int, world: int, root: str, memory: str) -> list[tuple]:
    """Shared memory is too small in steps 2 to 4, of which rank 1 has no room for an arena in 3; in 5, where there is
    enough again, a generation of rank 1 fails."""
    host_tier.SHARED_MEMORY, free = Path(memory), [1 << 40]
    host_tier.shutil.disk_usage = lambda path: Usage(1 << 40, 0, free[0])  # type: ignore[assignment]
    job, more, made = Job(layers=1), nn.ParameterList(), []
    with job.checkpointer(Path(root), more=more, host_every=1, every=1) as ckpt:
        real, generation = ckpt._budget.arena, host_tier.Generation

        def short(*what: Any, **named: Any) -> Any:
            made.append(step)
            if rank == 1 and step == 2:
                raise MemoryError("none left")
            return real(*what, **named)

        def full(path: Path, *rest: Any, **named: Any) -> Any:
            found = generation(path, *rest, **named)
            if rank == 1 and step == 5:
                raise OSError(28, "No space left on device")
            return found

        ckpt._budget.arena, host_tier.Generation = short, full  # type: ignore[method-assign, misc]
        for step in range(8):
            if step == 2:
                more.append(nn.Parameter(torch.ones(300, 300)))
            free[0] = 1000 if 2 <= step < 5 else 1 << 40
            ckpt.step(step)
            job.advance(step)
            ckpt.wait()
            held = [path for path in Path(memory).rglob(f"__{rank}_0.distcp") if path.parent.name.startswith(".step")]
            assert (0 < len(held) <= 3) == (step not in (2, 3, 4, 5))  # what cannot be used does not stay
        assert made.count(2) == 1 and 3 in made
        assert ckpt.restore() == 7
        return sorted((r.step, r.tier, r.ok, "" if r.ok else r.reason) for r in ckpt.reports)


def test_a_state_that_outgrows_shared_memory_goes_to_disk_and_comes_back(ranks, tmp_path):
    memory = tmp_path / "shm"
    memory.mkdir()
    first, second = ranks(2, state_outgrows_memory, str(tmp_path / "root"), str(memory))
    assert first == second
    lost = {(step, tier): reason for step, tier, ok, reason in first if not ok}
    assert lost.keys() == {(2, "disk"), *((step, "host") for step in (2, 3, 4, 5))}
    assert all("of shared memory" in lost[step, "host"] for step in (2, 3, 4))
    assert "rank 1: MemoryError: none left" in lost[2, "disk"]
    assert "rank 1: OSError" in lost[5, "host"]
    assert len(first) == 16


def test_memory_that_is_too_small_from_the_start_is_an_error_each_time(tmp_path, monkeypatch):
    """A setting to mend, not a fault of one save; whoever catches it and mends nothing is told again."""
    memory = tmp_path / "shm"
    memory.mkdir()
    monkeypatch.setattr(host_tier, "SHARED_MEMORY", memory)
    monkeypatch.setattr(host_tier.shutil, "disk_usage", lambda path: Usage(9, 0, 9))
    with Job(layers=1).checkpointer(tmp_path / "c", host_every=1) as ckpt:
        for step in (1, 2):
            with pytest.raises(UserError, match="pass host_every=0"):
                ckpt.step(step)


def one_raises_in_async_save(rank: int, world: int, root: str, guilty: int) -> list[str]:
    ends, moody = [], Moody()
    for number in range(4):
        moody.value, moody.raises = number, rank == guilty and number % 2 == 0
        with pytest.raises(RuntimeError, match="no position now") if moody.raises else nullcontext():
            future = async_save({"moody": moody, "w": torch.full((4,), number)}, checkpoint_id=f"{root}/{number}")
        reason = "the loader has no position now" if moody.raises else str(future.exception() or "ok")
        ends.append(reason)
    return ends


@pytest.mark.parametrize("guilty", [0, 1])
def test_async_save_where_one_rank_raises(ranks, tmp_path, guilty):
    for ends in ranks(2, one_raises_in_async_save, str(tmp_path), guilty):
        assert [end == "ok" for end in ends] == [False, True, False, True]
        assert all("the loader has no position now" in end for end in (ends[0], ends[2]))
    assert open_checkpoint(tmp_path / "3")["w"].tolist() == [3, 3, 3, 3]


def one_grows_in_async_save(rank: int, world: int, root: str, guilty: int) -> list[str]:
    ends = []
    for number in range(4):
        state = {"w": torch.full((4,), number)} | ({"v": torch.ones(2)} if rank == guilty and number else {})
        future = async_save(state, checkpoint_id=f"{root}/{number}")  # a save that is lost ends no training
        ends.append(str(future.exception() or ""))
    return ends


@pytest.mark.parametrize("guilty", [0, 1])
def test_async_save_where_the_state_changes_on_one_rank(ranks, tmp_path, guilty):
    for ends in ranks(2, one_grows_in_async_save, str(tmp_path), guilty):
        assert [not end for end in ends] == [True, False, True, True]
        assert f"the state on rank {1 - guilty} has kept its shape" in ends[1]
    assert open_checkpoint(tmp_path / "3")["v"].tolist() == [1, 1]


def one_closes(rank: int, world: int, root: str, memory: str, grows: bool) -> list[str]:
    """Rank `world - 1` closes after the first save; the others go on: with the plan as it was, or with a new one."""
    host_tier.SHARED_MEMORY = Path(memory)
    job, moody = Job(layers=1), Moody()
    job.advance(9)
    with job.checkpointer(Path(root), moody=moody, host_every=1, timeout_s=600.0) as ckpt:
        ckpt.save(0, host=True)
        assert all(report.ok for report in ckpt.wait())
        if rank < world - 1:
            while not Path(f"{memory}/closed").exists():
                time.sleep(0.01)
            moody.size = int(grows)
            ckpt.save(1, host=True)
            ckpt.wait()
    if rank == world - 1:
        Path(f"{memory}/closed").touch()
    return [report.reason for report in ckpt.reports]


@pytest.mark.parametrize("grows", [False, True])
def test_a_rank_that_has_closed_is_not_waited_for(ranks, tmp_path, grows):
    """Its loop has ended, or raised: no save can be had without it, and the others learn that at once."""
    memory = tmp_path / "shm"
    memory.mkdir()
    *others, closed = ranks(3, one_closes, str(tmp_path / "root"), str(memory), grows)
    assert closed == ["", ""]
    for reasons in others:
        assert reasons[:2] == ["", ""] and len(reasons) == 4
        assert all("rank 2 has closed its Checkpointer" in reason for reason in reasons[2:]), reasons


class Between(dist.HashStore):
    """A store in which `words` are said after the first look at it."""

    def __init__(self, words: dict[str, str]) -> None:
        super().__init__()
        self.words = words

    def clone(self) -> Between:
        return self

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        found = super().compare_set(key, expected, desired)
        for other in list(self.words):
            self.set(other, pickle.dumps(self.words.pop(other)))
        return found


def test_a_word_that_was_said_before_the_verdict_is_heard():
    """Its rank gives up right after it: another that looks for the word, and then for a verdict, takes the word."""
    lifeline = Lifeline(0, 1, "t")
    said = Between({"plan/global/0": "FSDP 1 is refused", "plan/verdict/0": "rank 0 has given up"})
    talk = Coordinator(1, 2, said, "t", lifeline)
    deadline_s = time.monotonic() + 60
    assert talk.hear("plan/global", 0, deadline_s=deadline_s, unless="plan/verdict") == "FSDP 1 is refused"
    with pytest.raises(PeerLost, match="rank 0 has given up"):
        talk.hear("plan/local", 0, deadline_s=deadline_s, unless="plan/verdict")


@pytest.mark.parametrize("kind", ["hash", "tcp"])
def test_looking_for_a_word_does_not_say_one(kind):
    store = Between({}) if kind == "hash" else dist.TCPStore("127.0.0.1", 0, is_master=True)
    talk = Coordinator(0, 1, store, "t", Lifeline(0, 1, "t"))
    for _ in range(2):
        with pytest.raises(PeerLost, match="did not answer"):
            talk.hear("claim", 0, deadline_s=time.monotonic())
        assert not store.check(["claim/0"])
    assert talk.decide("claim", None) is None  # and the first word is still everyone's
    assert talk.decide("claim", (1, "folder")) is None
    assert talk.hear("claim", 0, deadline_s=time.monotonic()) is None
