"""Full disks, broken disks, locked folders: the save fails and says so, older ones stay, training goes on."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import Job, same

from undertow.checkpointing.files import FileOps
from undertow.dist.errors import UserError


def train_alone(steps: int) -> dict[str, Any]:
    job = Job(layers=1)
    for step in range(steps):
        job.advance(step)
    return job.state()


class Quota(FileOps):
    """A disk of `budget_bytes`, for where a real one cannot be mounted."""

    def __init__(self, root: Path, budget_bytes: int) -> None:
        super().__init__(direct=False)
        self.root, self.budget_bytes = root, budget_bytes

    def _need(self, nbytes: int) -> None:
        used = sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())
        if used + nbytes > self.budget_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def create(self, path: Path, nbytes: int) -> int:
        self._need(nbytes)
        return super().create(path, nbytes)

    def write_file(self, path: Path, data: bytes) -> None:
        self._need(len(data))
        super().write_file(path, data)


class SlowToFolders(FileOps):
    """A disk without room for a shard; those who write chunks are slow to make its folder."""

    def mkdir(self, path: Path) -> None:
        if not threading.current_thread().name.startswith("undertow-commit"):
            time.sleep(0.1)
        super().mkdir(path)

    def create(self, path: Path, nbytes: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_no_writer_makes_a_folder_again_that_is_being_cleared_away(tmp_path):
    job = Job(layers=1)
    with job.checkpointer(tmp_path / "c", every=1, ops=SlowToFolders()) as ckpt:
        for step in range(6):
            ckpt.step(step)
            job.advance(step)
            ckpt.wait()
        assert ckpt.failures == 6
        assert [path.name for path in (tmp_path / "c").iterdir() if ".tmp-" in path.name] == []


class GivesUpBadly(FileOps):
    """While `fails` is set, writing fails, and so does closing what was begun."""

    fails = False

    def pwrite(self, handle: int, data: Any, offset: int) -> None:
        if self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().pwrite(handle, data, offset)

    def abandon(self, handle: int) -> None:
        super().abandon(handle)
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_save_that_cannot_even_be_given_up_costs_no_later_one(tmp_path):
    """What goes wrong after a save has failed must not end the thread that commits: `close` would wait for ever."""
    job, ops = Job(layers=1), GivesUpBadly(direct=False)
    with job.checkpointer(tmp_path, ops=ops) as ckpt:
        for step in range(3):
            ops.fails = step == 1
            ckpt.save(step)
            job.advance(step)
            ckpt.wait()
        assert [report.ok for report in ckpt.reports] == [True, False, True]
        assert "Input/output error" in ckpt.reports[1].reason


def test_a_disk_that_is_full(tmp_path):
    """A tmpfs of 4 MiB where this user may mount one, else a quota: room for a few checkpoints of eight."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount)]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0
    ops = FileOps() if mounted else Quota(mount, 4 * 2**20)
    try:
        job, states = Job(layers=1), {}
        with job.checkpointer(mount / "c", every=1, keep=None, ops=ops) as ckpt:
            for step in range(8):
                states[step] = job.state()
                ckpt.step(step)
                job.advance(step)
                ckpt.wait()
            good = [report.step for report in ckpt.reports if report.ok]
            assert 2 <= len(good) < 8, "the disk was to become full in between"
            assert good == list(range(len(good)))
            assert ckpt.failures == 8 - len(good)
            assert all("No space left" in report.reason for report in ckpt.reports if not report.ok)
            assert ckpt.folder.committed() == good
            assert [path.name for path in (mount / "c").iterdir() if ".tmp-" in path.name] == []
            ckpt.folder.remove(0)  # somebody makes room, and the next interval saves again
            ckpt.folder.remove(1)
            ckpt.save(8)
            assert ckpt.wait()[-1].ok
        assert same(job.state(), train_alone(8))
        for step in (8, good[-1]):
            other = Job(seed=9, layers=1)
            with other.checkpointer(mount / "c") as ckpt:
                assert ckpt.restore(step) == step
            assert same(other.state(), states.get(step, job.state()))
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(mount)], check=True)


class Broken(FileOps):
    """One kind of operation fails while `on` is set: with `code`, from the `after`-th call on."""

    def __init__(self, kind: str, code: int, after: int = 0) -> None:
        super().__init__(direct=False)
        self.kind, self.code, self.after, self.on, self.calls = kind, code, after, False, 0
        self._lock = threading.Lock()

    def _check(self, kind: str) -> None:
        if self.on and kind == self.kind:
            with self._lock:
                self.calls += 1
                if self.calls > self.after:
                    raise OSError(self.code, os.strerror(self.code))

    def mkdir(self, path: Path) -> None:
        self._check("mkdir")
        super().mkdir(path)

    def create(self, path: Path, nbytes: int) -> int:
        self._check("create")
        return super().create(path, nbytes)

    def pwrite(self, handle: int, data: Any, offset: int) -> None:
        self._check("pwrite")
        super().pwrite(handle, data, offset)

    def finish(self, handle: int, nbytes: int) -> None:
        if self.on and self.kind == "finish":
            os.close(handle)
        self._check("finish")
        super().finish(handle, nbytes)

    def write_file(self, path: Path, data: bytes) -> None:
        self._check("write_file")
        super().write_file(path, data)

    def rename(self, source: Path, target: Path) -> None:
        self._check("rename")
        super().rename(source, target)

    def fsync_dir(self, path: Path) -> None:
        self._check("fsync_dir")
        super().fsync_dir(path)

    def rmtree(self, path: Path) -> None:
        self._check("rmtree")
        super().rmtree(path)


FAULTS = [
    (kind, code, after)
    for kind, afters in {
        "mkdir": (0,), "create": (0,), "pwrite": (0, 1, 5), "finish": (0,), "write_file": (0, 1, 2, 3, 4),
        "rename": (0, 1, 2, 3, 4, 5), "fsync_dir": (0, 1, 2, 3, 4), "rmtree": (0,),
    }.items()
    for after in afters
    for code in ((errno.ENOSPC, errno.EIO) if kind == "pwrite" else (errno.EIO,))
]  # fmt: skip


@pytest.mark.parametrize(("kind", "code", "after"), FAULTS)
def test_a_disk_that_fails_for_a_while(tmp_path, kind, code, after):
    """Save 2 and the repeated save of step 1 meet the fault; 0 and 1 were before it, 3 comes after it."""
    job, states, ops = Job(layers=1), {}, Broken(kind, code, after)
    with job.checkpointer(tmp_path, keep=2, ops=ops) as ckpt:
        for step in range(5):
            ops.on = step in (2, 3)
            ops.calls = 0
            states.setdefault(step, []).append(job.state())
            ckpt.save(step)
            job.advance(step)
            report = ckpt.wait()[-1]
            if not ops.on:
                assert report.ok, report
            elif not report.ok:
                assert os.strerror(code) in report.reason
            assert 0 <= max(ckpt.folder.committed()) <= step
        hit = [report for report in ckpt.reports if not report.ok]
        assert ckpt.failures == len(hit)
        assert ops.calls == 0
    assert same(job.state(), train_alone(5)), "training went on as without checkpoints"
    other = Job(seed=9, layers=1)
    with other.checkpointer(tmp_path) as ckpt:
        assert ckpt.restore() == 4
        assert same(other.state(), states[4][0])
        for step in sorted(ckpt.folder.committed(), reverse=True):
            assert ckpt.restore(step) == step
            assert same(other.state(), states[step][0])


@pytest.mark.parametrize(("kind", "code", "after"), FAULTS)
def test_a_disk_that_fails_for_good(tmp_path, kind, code, after):
    job, ops = Job(layers=1), Broken(kind, code, after)
    with job.checkpointer(tmp_path, keep=None, ops=ops) as ckpt:
        states = {}
        for step in (0, 1):
            states[step] = job.state()
            ckpt.save(step)
            job.advance(step)
        ckpt.wait()
        ops.on = True
        for step in (1, 2, 3):
            states[(step, "later")] = job.state()
            ckpt.save(step)
            job.advance(step)
        ckpt.wait()
    other = Job(seed=9, layers=1)
    with other.checkpointer(tmp_path) as ckpt:
        step = ckpt.restore()
        assert step is not None
        assert step >= 1
        assert any(same(other.state(), state) for key, state in states.items() if key in (step, (step, "later")))


def test_two_jobs_on_one_folder(tmp_path):
    one, two = Job(layers=1), Job(seed=5, layers=1)
    with one.checkpointer(tmp_path, every=1) as ckpt:
        ckpt.save(0)
        with pytest.raises(UserError, match="is in use by process"):
            two.checkpointer(tmp_path)
        one.advance(0)
        ckpt.save(1)
        assert [report.ok for report in ckpt.wait()] == [True, True]
    with two.checkpointer(tmp_path) as ckpt:
        assert ckpt.restore() == 1
    assert same(one.state(), two.state())


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".lock").symlink_to(victim)
    with pytest.raises(UserError, match="cannot write to the checkpoint folder"):
        Job(layers=1).checkpointer(tmp_path / "c")
    assert victim.read_text() == "precious"


def test_planted_links_are_not_written_through(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    job = Job(layers=1)
    with job.checkpointer(tmp_path / "c") as ckpt:
        (tmp_path / "c" / "LATEST.part").symlink_to(victim)
        ckpt.save(0)
        ckpt.wait()
    assert victim.read_text() == "precious"
    with Job(seed=9, layers=1).checkpointer(tmp_path / "c") as ckpt:
        assert ckpt.restore() == 0


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the checkpoint folder"):
        Job(layers=1).checkpointer(tmp_path / "file" / "below")
