"""Files of expired checkpoints are written over only where nobody can see it; else they are removed as ever.

On a file system without leases nothing is recycled, and these tests then ask for that (`leases`).
"""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import Job, same

from undertow.checkpointing import files, open_checkpoint, recycle
from undertow.checkpointing.files import FileOps, looks
from undertow.checkpointing.recycle import Pool, choose

SHARD = "__0_0.distcp"


@pytest.fixture
def leases(tmp_path, monkeypatch) -> bool:
    """Whether the kernel gives leases on files of the tests' file system, of whatever kind it is."""
    monkeypatch.setattr(recycle, "mount_of", lambda root, mounts=None: ("ext4", frozenset()))
    handle = os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT)
    given = files._alone(handle)
    os.close(handle)
    (tmp_path / "probe").unlink()
    return given


# -- which disks ------------------------------------------------------------------------------------------------------


def mounts(root: Path, kind: str, options: str) -> str:
    device = os.stat(root).st_dev
    return (
        "21 27 0:999999 / /proc rw - proc proc rw\n"
        f"27 1 {os.major(device)}:{os.minor(device)} / /data rw,relatime shared:1 - {kind} /dev/vda {options}\n"
    )


@pytest.mark.parametrize(
    ("kind", "options", "wanted", "on", "word"),
    [
        ("ext4", "rw,discard", None, True, "ext4 mounted with discard"),
        ("xfs", "rw,attr2,discard", None, True, "xfs mounted with discard"),
        ("ext4", "rw", None, False, "without discard"),
        ("ext4", "rw,nodiscard", None, False, "without discard"),
        ("ext4", "rw", True, True, "recycle=True"),
        ("ext4", "rw,discard", False, False, "recycle=False"),
        ("nfs4", "rw,discard", True, False, "nfs4"),
        ("lustre", "rw,flock", True, False, "lustre"),
        ("btrfs", "rw,discard", None, False, "btrfs"),
    ],
)
def test_where_files_are_recycled(tmp_path, kind, options, wanted, on, word):
    choice = choose(tmp_path / "not" / "there", wanted, mounts(tmp_path, kind, options))
    assert (choice.on, word in str(choice)) == (on, True), choice


def test_a_mount_that_is_not_listed_recycles_nothing(tmp_path):
    assert choose(tmp_path, True, "") == recycle.Choice(
        False, "an unknown file system, of ext4 and xfs only files are recycled"
    )


# -- whose files ------------------------------------------------------------------------------------------------------


def test_a_file_of_ours_alone_is_written_over_in_place(tmp_path, leases):
    path = tmp_path / SHARD
    path.write_bytes(b"old" * 1000)
    before = path.stat()
    handle = FileOps(direct=False).reuse(path, 8192, looks(before))
    assert (handle >= 0) == leases
    if leases:
        os.pwrite(handle, b"new" * 2000, 0)
        FileOps(direct=False).finish(handle, 6000)
        assert path.read_bytes() == b"new" * 2000 and path.stat().st_ino == before.st_ino


@pytest.mark.parametrize("how", ["reader", "mapping", "process", "link", "mode", "symlink", "pipe", "folder"])
def test_a_file_that_somebody_may_read_is_left_as_it_is(tmp_path, leases, how):
    path, other = tmp_path / SHARD, tmp_path / "other"
    path.write_bytes(b"old" * 1000)
    like, held = looks(path.stat()), None
    if how == "reader":
        held = path.open("rb")
    elif how == "mapping":  # its descriptor is closed, the mapping stays
        with open(path, "rb") as file:
            held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    elif how == "process":  # what a forked data loader has inherited
        handle = os.open(path, os.O_RDONLY)
        held = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[handle], env={"PATH": ""}
        )
        os.close(handle)
    elif how == "link":  # a backup by hard links
        os.link(path, other)
    elif how == "mode":
        path.chmod(0o600 if path.stat().st_mode & 0o777 != 0o600 else 0o640)
    else:
        path.rename(other)
        if how == "symlink":
            path.symlink_to(other)
        elif how == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
    try:
        assert FileOps(direct=False).reuse(path, 8192, like) == -1
        assert (other if other.exists() else path).read_bytes() == b"old" * 1000
        if isinstance(held, mmap.mmap):
            assert held[:] == b"old" * 1000
    finally:
        if isinstance(held, subprocess.Popen):
            held.communicate(b"\n")
        elif held is not None:
            held.close()


def test_a_larger_and_a_smaller_state(tmp_path, leases):
    ops = FileOps(direct=False)
    pool = Pool(tmp_path / "pool", ops, 1)
    expired, inodes = tmp_path / "expired", set()
    for number, size in enumerate((5000, 9000, 100)):
        path = tmp_path / f"{number}" / SHARD
        ops.mkdir(path.parent)
        handle, recycled = pool.create(path, -(-size // 4096) * 4096)
        assert recycled == (leases and number > 0)
        ops.pwrite(handle, bytes([number]) * size, 0)
        ops.finish(handle, size)
        assert path.read_bytes() == bytes([number]) * size
        inodes.add(path.stat().st_ino)
        path.parent.rename(expired)
        pool.fill(expired)
        ops.rmtree(expired)
    assert os.listdir(tmp_path / "pool") == [SHARD]
    assert not leases or len(inodes) == 1
    pool.close()
    assert not (tmp_path / "pool").exists()


def test_the_pool_takes_a_saves_shard_files_and_no_more(tmp_path, leases, monkeypatch):
    ops = FileOps(direct=False)
    pool, expired = Pool(tmp_path / "pool", ops, 2), tmp_path / "expired"

    def expire() -> None:
        expired.mkdir()
        for name in (
            "COMMIT.json",
            "manifest.json",
            ".metadata",
            SHARD,
            "__0_1.distcp",
            "__1_0.distcp",
            "__2_0.distcp",
        ):
            (expired / name).write_bytes(b"x")

    expire()
    pool.fill(expired)
    assert sorted(os.listdir(pool.folder)) == [SHARD, "__1_0.distcp"]
    assert sorted(os.listdir(expired)) == ["__0_1.distcp", "__2_0.distcp"], "nothing may name what is written over"
    ops.rmtree(expired)
    expire()
    pool.fill(expired)
    assert SHARD in os.listdir(expired), "a second set is nothing that the next save needs"
    ops.rmtree(expired)
    assert pool.empty() and not pool.empty()
    expire()
    monkeypatch.setattr(recycle.os, "statvfs", lambda path: os.statvfs_result((4096, 4096, 9, 0, 0, 9, 9, 9, 0, 255)))
    pool.fill(expired)
    assert os.listdir(pool.folder) == [], "on a disk that is nearly full nothing is held back"


def test_saves_that_overlap_have_two_sets(tmp_path, leases):
    """The second save finds the file taken by the first: from then on there is one for each, and none is made anew."""
    ops, made = FileOps(direct=False), []
    pool = Pool(tmp_path / "pool", ops, 1)

    def write(name: str) -> Path:
        path = tmp_path / name / SHARD
        ops.mkdir(path.parent)
        handle, recycled = pool.create(path, 4096)
        ops.finish(handle, 100)
        made.append(not recycled)
        return path.parent

    def expire(folder: Path) -> None:
        pool.fill(folder)
        ops.rmtree(folder)

    expire(write("0"))
    first, second = write("1"), write("2")
    expire(first)
    expire(second)
    expire(write("3"))
    assert sorted(os.listdir(pool.folder)) == [SHARD, f"{SHARD}.1"]
    expire(write("4"))
    pair = write("5"), write("6")
    assert made == ([True, False, True, False, False, False, False] if leases else [True] * 7)
    assert os.listdir(pool.folder) == []
    for folder in pair:
        expire(folder)
    pool.close()
    assert not pool.folder.exists()


# -- saves ------------------------------------------------------------------------------------------------------------


def save(ckpt: Any, job: Job, step: int) -> dict[str, Any]:
    state = job.state()
    ckpt.save(step)
    job.advance(step)
    assert ckpt.wait()[-1].ok, ckpt.reports[-1]
    return state


def test_saves_go_round_in_the_same_files(tmp_path, leases):
    job, inodes = Job(layers=1), []
    with job.checkpointer(tmp_path / "c", keep=2, recycle=True) as ckpt:
        for step in range(1, 6):
            state = save(ckpt, job, step)
            inodes.append((tmp_path / "c" / f"step-{step:09d}" / SHARD).stat().st_ino)
        assert ckpt.folder.committed() == [4, 5]
        assert "are written over by later saves (recycle=True); until then one set of them" in ckpt.explain()
        pooled = [path.name for path in (tmp_path / "c").iterdir() if ".tmp-" in path.name]
        assert len(pooled) == 1, "one folder of files to write over"
    if leases:
        assert len(set(inodes)) == 3 and inodes[3:] == inodes[:2]
    assert [path for path in (tmp_path / "c").iterdir() if ".tmp-" in path.name] == []
    for step in (5, 4):
        assert open_checkpoint(tmp_path / "c" / f"step-{step:09d}").keys()
    other = Job(seed=9, layers=1)
    with other.checkpointer(tmp_path / "c") as ckpt:
        assert ckpt.restore() == 5
    assert same(other.state(), state)


def test_without_it_every_save_has_files_of_its_own(tmp_path, leases):
    job = Job(layers=1)
    with job.checkpointer(tmp_path / "c", keep=1, recycle=False) as ckpt:
        for step in (1, 2, 3):
            save(ckpt, job, step)
            assert [path for path in (tmp_path / "c").iterdir() if ".tmp-" in path.name] == []
        assert "expired ones are removed (recycle=False)" in ckpt.explain()
    with Job(layers=1).checkpointer(tmp_path / "d", keep=None, recycle=True) as ckpt:
        assert "expired" not in ckpt.explain(), "nothing expires"


def test_what_a_reader_has_mapped_stays_what_it_was(tmp_path, leases):
    job = Job(layers=1)
    with job.checkpointer(tmp_path / "c", keep=1, recycle=True) as ckpt:
        save(ckpt, job, 0)
        state = save(ckpt, job, 1)
        weight = open_checkpoint(tmp_path / "c" / "step-000000001")["model.0.weight"]  # a mapping, not a copy
        for step in (2, 3, 4, 5):
            save(ckpt, job, step)
        assert torch.equal(weight, state["model.0.weight"])


def test_a_pool_that_a_crash_has_left_is_removed_and_no_checkpoint(tmp_path):
    left = tmp_path / "c" / ".step-000000000.tmp-1a2b3c4d-0"
    left.mkdir(parents=True)
    (left / SHARD).write_bytes(b"half of two saves")
    with Job(layers=1).checkpointer(tmp_path / "c") as ckpt:
        assert ckpt.restore() is None and ckpt.folder.committed() == []
        assert not left.exists()


@pytest.mark.parametrize("where", ["posix_fallocate", "pwrite"])
def test_a_full_disk_takes_the_pools_room_first(tmp_path, leases, monkeypatch, where):
    """Room for a new file, and for a small one, comes from the pool before a save fails."""
    ops = FileOps(direct=False)
    pool = Pool(tmp_path / "pool", ops, 1)
    pool.folder.mkdir()
    (pool.folder / "__3_0.distcp").write_bytes(b"x" * 4096)
    real = getattr(os, where)

    def full(*arguments: Any) -> Any:
        if any(pool.folder.iterdir()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(files.os, where, full)
    if where == "pwrite":
        ops.write_file(tmp_path / "manifest.json", b"{}")
        assert (tmp_path / "manifest.json").read_bytes() == b"{}"
    else:
        ops.finish(pool.create(tmp_path / SHARD, 4096)[0], 10)
        assert (tmp_path / SHARD).stat().st_size == 10
    assert not any(pool.folder.iterdir())


def save_on_ranks(rank: int, world: int, base: str) -> list[int]:
    recycle.mount_of = lambda root, mounts=None: ("ext4", frozenset())  # in a process of its own
    job, inodes = Job(layers=2), []
    with job.checkpointer(Path(base), keep=1, recycle=True) as ckpt:
        for step in range(4):
            save(ckpt, job, step)
            inodes.append((Path(base) / f"step-{step:09d}" / f"__{rank}_0.distcp").stat().st_ino)
            torch.distributed.barrier()  # rank 0 comes when it has filled the pool
    return inodes


def test_every_rank_takes_its_own(ranks, tmp_path, leases):
    results = ranks(2, save_on_ranks, str(tmp_path / "c"))
    for inodes in results:
        assert not leases or inodes[2] == inodes[0]
    assert not set(results[0]) & set(results[1]) or not leases
