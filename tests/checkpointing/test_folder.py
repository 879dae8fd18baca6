"""The checkpoint folder: one job at a time, foreign files refused untouched, and order restored after a crash."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path

import pytest

from undertow.checkpointing.files import FileOps
from undertow.checkpointing.folder import Folder, read_manifest
from undertow.checkpointing.manifest import COMMIT, LATEST, BadCheckpoint, Manifest, NewerFormat, checksums
from undertow.dist.errors import UserError

OPS = FileOps(direct=False)


def commit(folder: Folder, step: int, payload: bytes = b"payload", token: str = "0a") -> Path:
    """A checkpoint whose shard holds `payload`."""
    scratch = folder.scratch(step, token)
    OPS.mkdir(scratch)
    OPS.write_file(scratch / "__0_0.distcp", payload)
    files = {"__0_0.distcp": checksums(payload, 4096), ".metadata": checksums(b"m", 4096)}
    return folder.commit(scratch, Manifest(step, 1, 4096, files, {}, {}, {}), b"m")


@pytest.fixture
def folder(tmp_path):
    folder = Folder(tmp_path / "ckpt", OPS)
    folder.take()
    yield folder
    folder.release()


def names(folder: Folder) -> set[str]:
    return set(os.listdir(folder.root)) - {".lock"}


def test_commit_is_complete_and_named(folder):
    path = commit(folder, 12)
    assert path == folder.root / "step-000000012"
    assert folder.committed() == [12]
    assert read_manifest(path).step == 12
    assert (folder.root / LATEST).read_text() == "step-000000012\n"
    assert names(folder) == {"step-000000012", LATEST}


def test_steps_sort_by_number_beyond_nine_digits(folder):
    for step in (5, 1_000_000_000, 999_999_999):
        (folder.final(step)).mkdir()
        (folder.final(step) / COMMIT).write_text("{}")
    assert folder.committed() == [5, 999_999_999, 1_000_000_000]


def test_a_second_commit_of_a_step_replaces_the_first(folder):
    commit(folder, 3, b"first")
    commit(folder, 3, b"second", token="0b")
    assert (folder.final(3) / "__0_0.distcp").read_bytes() == b"second"
    assert names(folder) == {"step-000000003", LATEST}


def test_a_folder_has_one_owner(folder):
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on .*, this very one.* close\\(\\)"):
        Folder(folder.root, OPS).take()
    folder.release()
    other = Folder(folder.root, OPS)
    other.take()
    other.release()


def test_the_lock_does_not_outlive_its_owner_in_a_forked_child(folder):
    """Data loader workers inherit the open file; they must not keep the folder locked after `release`."""
    pid = os.fork()
    if not pid:
        time.sleep(600)
        os._exit(0)
    try:
        folder.release()
        other = Folder(folder.root, OPS)
        other.take()
        other.release()
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    ready, say = os.pipe()
    pid = os.fork()
    if not pid:
        Folder(tmp_path / "c", OPS).take()
        os.write(say, b"taken")
        time.sleep(600)
        os._exit(0)
    try:
        assert os.read(ready, 5) == b"taken"
        with pytest.raises(UserError, match=f"process {pid} on"):
            Folder(tmp_path / "c", OPS).take()
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(say)
    folder = Folder(tmp_path / "c", OPS)
    folder.take()
    folder.release()


def test_foreign_files_are_refused_and_nothing_is_left_behind(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match="holds other files \\(thesis.tex\\)"):
        Folder(tmp_path, OPS).take()
    assert sorted(os.listdir(tmp_path)) == before


def test_a_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UserError, match="cannot write to the checkpoint folder"):
        Folder(tmp_path / "file", OPS).take()
    assert (tmp_path / "file").read_text() == "precious"


def test_our_own_leftovers_are_no_strangers(folder):
    commit(folder, 1)
    (folder.root / ".step-000000002.tmp-0a0b").mkdir()
    (folder.root / "LATEST.part").write_text("x")
    folder.release()
    folder.take()
    assert folder.committed() == [1]


def test_a_crash_while_writing_leaves_a_scratch_folder_that_is_cleared(folder):
    commit(folder, 1)
    scratch = folder.scratch(2, "0a")
    OPS.mkdir(scratch)
    OPS.write_file(scratch / "__0_0.distcp", b"half")
    folder.release()
    folder.take()
    assert names(folder) == {"step-000000001", LATEST}


@pytest.mark.parametrize("with_new", [False, True])
def test_a_crash_between_the_renames_brings_the_old_one_back(folder, with_new):
    commit(folder, 3, b"first")
    os.rename(folder.final(3), folder.root / ".step-000000003.old-1f")
    if with_new:  # the second rename has happened, COMMIT.json has not
        folder.final(3).mkdir()
        (folder.final(3) / "__0_0.distcp").write_bytes(b"second")
    folder.release()
    folder.take()
    assert folder.committed() == [3]
    assert (folder.final(3) / "__0_0.distcp").read_bytes() == b"first"
    aside = [name for name in names(folder) if ".bad-" in name]
    assert len(aside) == with_new


def test_a_crash_after_the_commit_keeps_the_new_one(folder):
    commit(folder, 3, b"first")
    os.rename(folder.final(3), folder.root / ".step-000000003.old-1f")
    commit(folder, 3, b"second", token="0b")
    folder.release()
    folder.take()
    assert (folder.final(3) / "__0_0.distcp").read_bytes() == b"second"
    assert names(folder) == {"step-000000003", LATEST}


def test_a_commit_after_a_rollback_leaves_the_other_branch(folder):
    for step in (10, 20, 30):
        commit(folder, step)
    commit(folder, 15)
    assert folder.committed() == [10, 15]
    assert sorted(name.split(".left-")[0] for name in names(folder) if "left" in name) == [
        ".step-000000020",
        ".step-000000030",
    ]


class Refusing(FileOps):
    """Fails the n-th renaming or syncing of a folder, and optionally everything after it."""

    def __init__(self, at: int, *, for_good: bool) -> None:
        super().__init__(direct=False)
        self.left, self.for_good = at, for_good

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0 or (self.left < 0 and self.for_good):
            raise OSError(5, "Input/output error")

    def rename(self, source: Path, target: Path) -> None:
        self._count()
        super().rename(source, target)

    def fsync_dir(self, path: Path) -> None:
        self._count()
        super().fsync_dir(path)


@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize("at", range(1, 9))
def test_a_commit_that_fails_leaves_a_whole_checkpoint_of_that_step(tmp_path, at, for_good):
    """Replace step 3 with a disk that fails at one place: the first or the second is there after the next start."""
    folder = Folder(tmp_path / "c", OPS)
    folder.take()
    commit(folder, 2, b"older")
    commit(folder, 3, b"first")
    scratch = folder.scratch(3, "0b")
    OPS.mkdir(scratch)
    OPS.write_file(scratch / "__0_0.distcp", b"second")
    files = {"__0_0.distcp": checksums(b"second", 4096), ".metadata": checksums(b"m", 4096)}
    folder.ops = Refusing(at, for_good=for_good)
    with pytest.raises(OSError, match="Input/output"):
        folder.commit(scratch, Manifest(3, 1, 4096, files, {}, {}, {}), b"m")
    folder.ops = OPS
    if not for_good:
        assert 3 in folder.committed()  # in the same process too
    folder.release()
    folder.take()
    assert folder.committed() == [2, 3]
    assert read_manifest(folder.final(3)).step == 3
    assert (folder.final(3) / "__0_0.distcp").read_bytes() in (b"first", b"second")
    assert (folder.final(2) / "__0_0.distcp").read_bytes() == b"older"
    folder.release()


def test_symlinks_are_not_taken_for_checkpoints(folder, tmp_path):
    commit(folder, 1)
    outside = tmp_path / "outside"
    os.rename(folder.final(1), outside)
    (folder.root / "step-000000009").symlink_to(outside)
    assert folder.committed() == []


def test_removal_does_not_follow_symlinks(folder, tmp_path):
    outside = tmp_path / "precious"
    outside.mkdir()
    (outside / "file").write_text("precious")
    commit(folder, 1)
    (folder.final(1) / "link").symlink_to(outside)
    (folder.root / ".step-000000002.tmp-0a").symlink_to(outside)
    folder.remove(1)
    folder.release()
    folder.take()
    assert (outside / "file").read_text() == "precious"
    assert folder.committed() == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / COMMIT).write_text(""),
        lambda path: (path / COMMIT).write_text("[]"),
        lambda path: (path / COMMIT).write_text('{"format": 1}'),
        lambda path: (path / COMMIT).write_bytes(b"\xff\x00"),
        lambda path: (path / "manifest.json").unlink(),
        lambda path: (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes() + b" "),
        lambda path: (path / "manifest.json").write_text("{}"),
    ],
)
def test_a_damaged_commit_or_manifest_is_said_to_be(folder, damage):
    path = commit(folder, 1)
    damage(path)
    with pytest.raises(BadCheckpoint):
        read_manifest(path)


def test_a_commit_of_a_later_format_is_left_alone(folder):
    path = commit(folder, 1)
    word = json.loads((path / COMMIT).read_text())
    (path / COMMIT).write_text(json.dumps(word | {"format": 2}))
    with pytest.raises(NewerFormat):
        read_manifest(path)


def test_lock_file_is_not_inherited_by_programs(folder):
    assert fcntl.fcntl(folder._lock, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
