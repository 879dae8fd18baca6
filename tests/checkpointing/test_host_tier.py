"""Checkpoints in shared memory: they outlive a killed process, never an overwritten one, and are freed in the end."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import Job, same

from undertow.checkpointing import host_tier, restore
from undertow.checkpointing.files import FileOps
from undertow.checkpointing.layout import CHUNK_BYTES
from undertow.checkpointing.manifest import METADATA, checksums
from undertow.dist.errors import UserError


@pytest.fixture(autouse=True)
def own_memory(tmp_path, monkeypatch):
    """A folder in place of /dev/shm: what these tests leave behind is nobody's problem, and neither is its size."""
    memory = tmp_path / "shm"
    memory.mkdir()
    monkeypatch.setattr(host_tier, "SHARED_MEMORY", memory)
    return memory


def held(memory: Path) -> list[str]:
    return sorted(path.name for path in memory.rglob("step-*"))


def killed(root: Path, steps: int, at: str, *, every: int = 0) -> None:
    """Fork a process that saves every step to memory and dies by SIGKILL in the save of the last one, inside `at`."""
    pid = os.fork()
    if pid == 0:
        try:
            job, step = Job(layers=1), 0

            class Dies(FileOps):
                def die(self, where: str) -> None:
                    if where == at and step == steps:
                        os.kill(os.getpid(), signal.SIGKILL)

                def write_file(self, path: Path, data: bytes) -> None:
                    self.die(path.name)
                    super().write_file(path, data)

                def rename(self, source: Path, target: Path) -> None:
                    super().rename(source, target)
                    self.die("rename")

            with job.checkpointer(root, every=every, host_every=1) as ckpt:
                ckpt.host.folder.ops = Dies(direct=False)
                for step in range(1, steps + 1):
                    ckpt.step(step)
                    job.advance(step)
                    if step < steps or at != "copy":
                        ckpt.wait()
                    else:
                        os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def expected(step: int) -> dict:
    """The state at the save of `step`."""
    job = Job(layers=1)
    for number in range(1, step):
        job.advance(number)
    return job.state()


@pytest.mark.parametrize("at", ["__0_1.distcp", ".metadata", "manifest.json", "rename", "COMMIT.json", "copy"])
def test_a_killed_process_restarts_from_the_step_before(tmp_path, at):
    last = 3 if at == ".metadata" else 5  # later it is there
    killed(tmp_path / "c", last, at)
    other = Job(seed=9, layers=1)
    with other.checkpointer(tmp_path / "c", host_every=1) as ckpt:
        step = ckpt.restore()
        assert step in (4, 5) if at == "copy" else step == last - 1
        assert same(other.state(), expected(step))


def test_a_process_killed_again_and_again_never_loses_more_than_a_step(tmp_path):
    last = 0
    for kill in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                job = Job(seed=50 * (kill > 0), layers=1)  # the first one's weights come back in the others
                with job.checkpointer(tmp_path / "c", host_every=1) as ckpt:
                    start = ckpt.restore() or 0
                    for step in range(start, start + 4):
                        if step:
                            job.advance(step)
                        ckpt.step(step + 1)
                        ckpt.wait()
                    os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        last += 4
    other = Job(seed=50, layers=1)
    with other.checkpointer(tmp_path / "c", host_every=1) as ckpt:
        assert ckpt.restore() == last
    assert same(other.state(), expected(last))


def test_memory_and_disk_together(tmp_path, own_memory):
    """Every step in memory, every third on disk; the newest of both is restored, and disk alone is enough."""
    root = tmp_path / "c"
    killed(root, 8, "COMMIT.json", every=3)
    assert "step-000000007" in held(own_memory)
    other = Job(seed=9, layers=1)
    with other.checkpointer(root, host_every=1) as ckpt:
        assert ckpt.restore() == 7
        assert same(other.state(), expected(7))
        assert ckpt.folder.committed() == [3, 6]
    alone = Job(seed=9, layers=1)
    with alone.checkpointer(root) as ckpt:
        assert ckpt.restore() == 6
    assert same(alone.state(), expected(6))


def test_the_disk_gets_what_memory_held(tmp_path):
    job, states = Job(layers=1), {}
    with job.checkpointer(tmp_path / "c", every=2, host_every=1, keep=None) as ckpt:
        for step in range(7):
            states[step] = job.state()
            ckpt.step(step)
            job.advance(step)
        reports = ckpt.wait()
        assert all(report.ok for report in reports), reports
        assert {report.tier for report in reports} == {"host", "disk"}
        assert ckpt.folder.committed() == [0, 2, 4, 6]
    for step in (6, 4, 2, 0):
        other = Job(seed=9, layers=1)
        with other.checkpointer(tmp_path / "c") as ckpt:
            ckpt.restore(step)
        assert same(other.state(), states[step])


def test_memory_is_freed_when_the_disk_is_as_new(tmp_path, own_memory):
    job = Job(layers=1)
    with job.checkpointer(tmp_path / "c", every=1, host_every=1) as ckpt:
        for step in range(3):
            ckpt.step(step)
            job.advance(step)
    assert held(own_memory) == []
    with job.checkpointer(tmp_path / "c", host_every=1) as ckpt:
        ckpt.save(9, disk=False, host=True)
    assert held(own_memory) == ["step-000000009"]
    with job.checkpointer(tmp_path / "c", host_every=1) as ckpt:
        assert ckpt.restore() == 9


def test_a_rollback_forgets_what_came_after(tmp_path):
    job, states = Job(layers=1), {}
    with job.checkpointer(tmp_path / "c", every=2, host_every=1, keep=None) as ckpt:
        for step in range(6):
            ckpt.step(step)
            ckpt.wait()
            job.advance(step)
        ckpt.restore(2)
        job.advance(77)
        states[3] = job.state()
        ckpt.save(3, disk=False, host=True)
        ckpt.wait()
        job.advance(78)
        assert ckpt.restore() == 3
        assert same(job.state(), states[3])


def test_memory_of_a_folder_that_is_gone_is_freed(tmp_path, own_memory):
    killed(tmp_path / "c", 3, "COMMIT.json")
    assert held(own_memory)
    shutil.rmtree(tmp_path / "c")
    with Job(layers=1).checkpointer(tmp_path / "other", host_every=1):
        assert held(own_memory) == []


def test_too_little_memory_is_said_before_anything_is_written(tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(host_tier.shutil, "disk_usage", lambda path: usage(10**5, 0, 10**5))
    job = Job(layers=1)
    with job.checkpointer(tmp_path / "c", host_every=1) as ckpt:
        with pytest.raises(UserError, match="generations of .* need .* of shared memory"):
            ckpt.step(1)
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [".lock"]


def test_one_generation_is_refused(tmp_path):
    with pytest.raises(UserError, match="host_generations is 1"):
        Job(layers=1).checkpointer(tmp_path / "c", host_every=1, host_generations=1)


def test_memory_that_is_damaged_falls_back_to_the_disk(tmp_path, own_memory):
    killed(tmp_path / "c", 8, "COMMIT.json", every=3)
    (path,) = own_memory.rglob("step-000000007")
    os.truncate(path / "__0_0.distcp", 100)
    other = Job(seed=9, layers=1)
    with other.checkpointer(tmp_path / "c", host_every=1) as ckpt:
        step = ckpt.restore()
        assert step in (5, 6)  # an older generation, or the disk
        assert same(other.state(), expected(step))


def two_ranks(rank: int, world: int, root: str, memory: str) -> int | None:
    host_tier.SHARED_MEMORY = Path(memory)
    job = Job(layers=2)
    with job.checkpointer(Path(root), every=4, host_every=1) as ckpt:
        start = ckpt.restore() or 0
        for step in range(start, start + 3):
            ckpt.step(step + 1)
            job.advance(step + 1)
        assert all(report.ok for report in ckpt.wait()), [report.reason for report in ckpt.reports]
        state = job.state()
        assert ckpt.restore() == start + 3
        job.advance(start + 3)
        assert same(job.state(), state)
        return start


def test_two_ranks_share_memory(ranks, tmp_path, own_memory):
    assert ranks(2, two_ranks, str(tmp_path / "c"), str(own_memory)) == [0, 0]
    assert ranks(2, two_ranks, str(tmp_path / "c"), str(own_memory)) == [3, 3]


def test_memory_that_somebody_else_made_is_refused(tmp_path, own_memory, monkeypatch):
    """/dev/shm may be written by everyone: a folder of our name that is not ours must not be restored from."""
    job = Job(layers=1)
    with job.checkpointer(tmp_path / "c", host_every=1) as ckpt:
        name = ckpt.host.folder.root.name
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = own_memory / name
    if path.exists():
        shutil.rmtree(path)
    path.symlink_to(elsewhere)
    with pytest.raises(UserError, match="not this user's"):
        Job(layers=1).checkpointer(tmp_path / "c", host_every=1)
    assert list(elsewhere.iterdir()) == []


def saves_in_turn(rank: int, world: int, root: str, memory: str) -> tuple[list[str], list[int], int | None, bool]:
    """The claims that were asked for, the steps that were not committed, and what a restore finds."""
    host_tier.SHARED_MEMORY = Path(memory)
    job, asked = Job(layers=1), []
    job.advance(0)  # the optimizer has all of its state
    with job.checkpointer(Path(root), host_every=1) as ckpt:
        lead = ckpt._coordinator.lead

        def counted(name, *rest, **named):
            if name.endswith("/claim"):
                asked.append(name.split("/")[1])
            return lead(name, *rest, **named)

        ckpt._coordinator.lead = counted
        for step in range(6):
            ckpt.save(step, disk=False, host=True)
            job.advance(step + 1)
            ckpt.wait()
        for step, host in ((3, True), (4, True), (6, True), (7, False), (8, True), (9, True)):
            kept = job.state()
            ckpt.save(step, disk=not host, host=host)
            job.advance(step + 1)
            ckpt.wait()
        lost = [report.step for report in ckpt.reports if not report.ok]
    other = Job(seed=9, layers=1)
    with other.checkpointer(Path(root), host_every=1) as ckpt:
        found = ckpt.restore()
    return asked, lost, found, same(other.state(), kept)


@pytest.mark.parametrize("world", [1, 2])
def test_no_training_thread_waits_for_a_choice_that_was_made_before(tmp_path, own_memory, ranks, world):
    """With the commit of a save rank 0 chooses for the one after the next: the first two are asked for, and those that
    go back (7, 8); a save to disk alone (10) makes a choice vain."""
    for asked, lost, found, alike in ranks(world, saves_in_turn, str(tmp_path / "c"), str(own_memory)):
        assert (asked[:2], asked[2:4], lost, found, alike) == (["1", "2"], ["7", "8"], [], 9, True)
        assert set(asked[4:]) <= {"12"}  # whose turn was told with the save that was none of memory


def test_two_generations_are_enough_for_every_save_that_follows_a_commit(tmp_path):
    """What is chosen ahead for the save after the next one must leave the next one its turn."""
    job = Job(layers=1)
    job.advance(0)
    with job.checkpointer(tmp_path / "c", host_every=1, host_generations=2) as ckpt:
        for step in range(6):
            assert ckpt.step(step)
            job.advance(step + 1)
            ckpt.wait()
        assert ckpt.host.skipped == 0 and [report.ok for report in ckpt.reports] == [True] * 6


def somebody_cleans_up(rank: int, world: int, root: str, memory: str, what: str) -> tuple[list, int | None, bool]:
    """All of the memory folder is removed after step 3 (as logind does with RemoveIPC), or one rank's shard files."""
    host_tier.SHARED_MEMORY = Path(memory)
    job = Job(layers=1)
    job.advance(0)
    with job.checkpointer(Path(root), host_every=1, every=4, keep=None) as ckpt:
        for step in range(1, 10):
            if step == 4 and rank == 0:
                for path in Path(memory).iterdir() if what == "all" else Path(memory).rglob(f"__{world - 1}_0.distcp"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            if dist.is_initialized():
                dist.barrier()
            state = job.state()
            ckpt.step(step)
            job.advance(step)
            ckpt.wait()
        found = ckpt.restore()
        return [(r.step, r.tier, r.reason) for r in ckpt.reports if not r.ok], found, same(job.state(), state)


@pytest.mark.parametrize("what", ["all", "a shard"])
@pytest.mark.parametrize("world", [1, 2])
def test_memory_that_somebody_has_removed_is_had_anew(tmp_path, own_memory, ranks, world, what):
    """It costs the saves to memory that were on their way there, said why, and neither the training nor later ones."""
    for lost, found, alike in ranks(world, somebody_cleans_up, str(tmp_path / "c"), str(own_memory), what):
        assert {(step, tier) for step, tier, _ in lost} <= {(4, "host"), (5, "host"), (6, "host")}, lost
        assert (found, alike) == (9, True)
        if what == "a shard":
            assert lost and all("RemoveIPC" in reason for _, _, reason in lost)


def one_reads_slowly(rank: int, world: int, root: str, memory: str, slow: int) -> tuple[int | None, bool]:
    """A restore is the last thing that the ranks do, and `slow` still reads when the other has closed."""
    host_tier.SHARED_MEMORY = Path(memory)
    job = Job(layers=1)
    job.advance(0)
    with job.checkpointer(Path(root), host_every=1, every=1) as ckpt:
        ckpt.step(1)
        state = job.state()
        job.advance(1)
        ckpt.wait()
        if rank == slow:
            read = restore.load_tensors
            restore.load_tensors = lambda *args, **ways: (time.sleep(1.0), read(*args, **ways))
        found = ckpt.restore()
    return found, same(job.state(), state)


@pytest.mark.parametrize("slow", [0, 1])
def test_memory_is_not_given_back_while_another_rank_reads_it(tmp_path, own_memory, ranks, slow):
    assert ranks(2, one_reads_slowly, str(tmp_path / "c"), str(own_memory), slow) == [(1, True)] * 2
    assert not held(own_memory)  # it is afterwards, for the disk has it too


@pytest.mark.parametrize("removed", [False, True])
def test_a_step_that_is_saved_again_and_again_can_be_rolled_back(tmp_path, own_memory, removed):
    """A folder bears its step's name, so no two generations may hold the same one; or none, where all was removed."""
    job = Job(layers=1)
    with job.checkpointer(tmp_path / "c", host_every=1, keep=None) as ckpt:
        ckpt.save(1, host=True)
        state = job.state()
        ckpt.wait()
        for turn in range(4):
            job.advance(turn)
            ckpt.save(2, host=True)
        ckpt.wait()
        for path in own_memory.iterdir() if removed else ():
            shutil.rmtree(path)
        assert ckpt.restore(1) == 1 and same(job.state(), state)
        for step in (2, 3):
            job.advance(step)
            ckpt.save(step, host=True)
            state = job.state()
            assert all(report.ok for report in ckpt.wait())
        job.advance(9)
        assert ckpt.restore() == 3 and same(job.state(), state)


@pytest.mark.parametrize("ways", [(True, False), (True, True, True), (False, True, False, False)])
@pytest.mark.parametrize("wait", [False, True])
def test_of_saves_of_one_step_the_last_one_is_restored(tmp_path, own_memory, ways, wait):
    """To memory and disk, or to disk alone, which memory must not be nearer than with an older one."""
    job = Job(layers=1)
    with job.checkpointer(tmp_path / "c", host_every=1) as ckpt:
        for turn, host in enumerate(ways):
            job.advance(turn)
            assert ckpt.save(5, host=host)
            state = job.state()
            assert not wait or all(report.ok for report in ckpt.wait())
        job.advance(9)
        assert ckpt.restore() == 5 and same(job.state(), state)
        assert ckpt.host.skipped == 0  # each has waited for the one before
        ckpt.save(6, disk=False, host=True)
    with job.checkpointer(tmp_path / "c", host_every=1) as ckpt:
        assert ckpt.restore() == 6  # from the memory that the first one has left
        job.advance(9)
        state = job.state()
        assert ckpt.save(6)
        ckpt.wait()
        job.advance(9)
        assert ckpt.restore() == 6 and same(job.state(), state)


def test_metadata_that_is_there_is_not_written_again(tmp_path):
    """Once for each generation, as long as no object moves; every checkpoint has its own all the same."""
    job, written = Job(layers=1), []
    job.advance(0)
    with job.checkpointer(tmp_path / "c", host_every=1) as ckpt:
        host = ckpt.host
        assert host is not None
        write_file = host.folder.ops.write_file
        host.folder.ops.write_file = lambda path, data: (written.append(path.name), write_file(path, data))[1]
        for step in range(8):
            if step == 5:
                job.optimizer.param_groups[0]["lr"] = 0.1234567890123456  # a longer pickle: what follows it moves
            ckpt.step(step)
            job.advance(step + 1)
            assert ckpt.wait()[-1].ok
            newest = host.folder.committed()[-1]
            host.folder.check(newest, host.folder.manifest(newest), part=0, parts=1, on_bytes=lambda nbytes: None)
            data = (host.folder.final(newest) / METADATA).read_bytes()
            assert host.folder.manifest(newest).files[METADATA] == checksums(data, CHUNK_BYTES)
    assert written.count("manifest.json") == 8 and 3 <= written.count(METADATA) <= 6


def test_a_later_step_in_memory_where_a_job_does_not_look_is_said(tmp_path, caplog):
    job = Job(layers=1)

    def run(last: int, **options: int) -> tuple[int | None, int]:
        """What was restored, and how often it was said."""
        caplog.clear()
        with job.checkpointer(tmp_path / "c", **options) as ckpt:
            found = ckpt.restore()
            for step in range((found or 0) + 1, last + 1):
                ckpt.step(step)
                job.advance(step)
                ckpt.wait()
        return found, caplog.text.count("left step 3 of") and caplog.text.count("pass host_every=1 to go on from it")

    assert run(3, every=2, host_every=1) == (None, 0)  # memory has 3, the disk 2
    assert run(2, every=1) == (2, 1)
    assert run(4, every=1) == (2, 1)
    assert run(4, every=1) == (4, 0)
