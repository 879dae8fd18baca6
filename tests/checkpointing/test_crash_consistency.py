"""Power fails after every single operation on the disk: the newest acknowledged checkpoint is there, bit for bit."""

from __future__ import annotations

import inspect
import io
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import Job, same
from crash_disk import Disk, RecordingOps, build, merge, read_image

from undertow.checkpointing import files, plan, recycle
from undertow.checkpointing.files import FileOps
from undertow.checkpointing.folder import Folder
from undertow.dist.errors import UserError

CHUNK = 16384


@pytest.fixture(autouse=True)
def small_tensors_are_lazy_too(monkeypatch):
    monkeypatch.setattr(plan, "SMALL_BYTES", 4096)


@pytest.fixture
def any_file_system_recycles(monkeypatch):
    """Leases are tried elsewhere (test_recycle); what a crash leaves must be tried wherever the tests run."""
    monkeypatch.setattr(recycle, "mount_of", lambda root, mounts=None: ("ext4", frozenset()))
    monkeypatch.setattr(files, "_alone", lambda handle: True)


class Tape:
    """A job whose disk is recorded, and what it was told about its checkpoints."""

    def __init__(self, base: Path, **options: Any) -> None:
        base.mkdir()
        self.base, self.ops = base, RecordingOps()
        self.layers = 1
        self.versions: dict[int, list[dict[str, Any]]] = {}
        self.shards: set[bytes] = set()
        self.job = Job(width=64, layers=1)
        # in a folder that is not there yet: its own name must be durable too
        self.ckpt = self.job.checkpointer(base / "new" / "ckpt", keep=2, ops=self.ops, chunk_bytes=CHUNK, **options)

    def save(self, step: int) -> None:
        self.versions.setdefault(step, []).append(self.job.state())
        self.ckpt.save(step)
        self.job.advance(step)
        assert self.ckpt.wait()[-1].ok, self.ckpt.reports[-1]
        self.ops.note("mark", "saved", step, len(self.versions[step]) - 1)
        self.shards.add((self.ckpt.folder.final(step) / "__0_0.distcp").read_bytes())

    def roll_back(self, step: int) -> None:
        self.ops.note("mark", "rolled back", step, 0)
        assert self.ckpt.restore(step) == step


def promised(marks: list[Any]) -> tuple[int, int] | None:
    """The newest (step, version) that the job was told is safe."""
    newest = None
    for what, step, version in marks:
        if what == "saved":
            newest = (step, version)
        elif newest is not None:
            newest = (min(step, newest[0]), 0)
    return newest


def restored(root: Path, layers: int = 1) -> tuple[int | None, dict[str, Any]]:
    other = Job(seed=99, width=64, layers=layers)
    with other.checkpointer(root, chunk_bytes=CHUNK) as ckpt:
        return ckpt.restore(), other.state()


def judge(tape: Any, marks: list[Any], image: dict[str, bytes | None], root: Path) -> None:
    """Restore from `image`: what comes back is a state that was saved, and none older than what was promised."""
    expected = promised(marks)
    build(image, root)
    try:
        step, state = restored(root / "new" / "ckpt", tape.layers)
    except UserError:
        assert expected is None, f"{expected} was promised and nothing can be restored"
        return
    finally:
        shutil.rmtree(root)
    if step is None:
        assert expected is None, f"{expected} was promised and nothing is there"
        return
    versions = tape.versions[step]
    least = 0
    if expected is not None:
        assert step >= expected[0], f"{expected} was promised and {step} came back"
        least = expected[1] if step == expected[0] else 0
    assert any(same(state, version) for version in versions[least:]), f"step {step} is not what was saved"


@pytest.mark.slow
def test_no_power_failure_loses_or_invents_a_checkpoint(tmp_path, seed):
    tape = Tape(tmp_path / "real", recycle=False)
    with tape.ckpt:
        for step in (1, 2, 3, 4):
            tape.save(step)
        tape.save(4)  # again, with another state
        tape.roll_back(3)
        tape.save(4)
        tape.save(5)
    disk = Disk(tape.base, tape.ops.log)
    assert len(disk.ops) > 150
    assert same(restored(tape.base / "new" / "ckpt")[1], tape.versions[5][0])
    judged = set()
    for count in range(len(disk.ops) + 1):
        marks = disk.marks(count)
        for trial, keep in enumerate((0.0, 0.5, 0.5, 0.8)):
            rng = random.Random(f"{seed}/{count}/{trial}")
            image = disk.after_crash(count, rng, keep)
            known = hash((promised(marks), tuple(sorted(image.items()))))
            if known in judged:
                continue
            judged.add(known)
            try:
                judge(tape, marks, image, tmp_path / "crashed")
            except BaseException as error:
                done = [str(entry[:2]) for entry in tape.ops.log[:count]][-4:]
                raise AssertionError(f"after {count} operations, keep {keep}, seed {seed}: {error}\n{done}") from error
    assert len(judged) > len(disk.ops)


@pytest.mark.slow
def test_no_power_failure_shows_a_recycled_file(tmp_path, seed, any_file_system_recycles):
    """Files of expired checkpoints are written over: whatever of that reached the disk, what was promised comes back,
    and no folder with a `.metadata`, which DCP would read without a COMMIT.json, holds a file of two saves."""
    tape = Tape(tmp_path / "real", recycle=True)
    with tape.ckpt:
        for step in (1, 2, 3, 4, 5):
            tape.save(step)
        tape.save(5)
    log = tape.ops.log
    into = [rest[1] for kind, *rest in log if kind == "rename" and rest[0].parent.name.endswith("-0")]
    assert len(into) >= 2 and all(".tmp-" in path.parent.name for path in into), "nothing was recycled"
    disk, judged = Disk(tape.base, log), set()
    for count in range(len(disk.ops) + 1):
        for trial, keep in enumerate((0.0, 0.5, 0.5)):
            image = disk.after_crash(count, random.Random(f"{seed}/{count}/{trial}"), keep)
            marks = disk.marks(count)
            known = hash((promised(marks), tuple(sorted(image.items()))))
            if known in judged:
                continue
            judged.add(known)
            done = f"after {count} operations, keep {keep}, seed {seed}"
            for name, data in image.items():
                if name.endswith(".distcp") and f"{name.rpartition('/')[0]}/.metadata" in image and "_0.d" in name:
                    assert data in tape.shards, f"{done}: {name} is not what was saved"
            try:
                judge(tape, marks, image, tmp_path / "crashed")
            except BaseException as error:
                raise AssertionError(f"{done}: {error}\n{[str(entry[:2]) for entry in log[:count]][-4:]}") from error
    assert len(judged) > 100


@pytest.mark.slow
def test_a_power_failure_during_the_clean_up_after_a_power_failure(tmp_path, seed):
    """Crash a replacing save at every operation, then crash the recovery of that at every operation."""
    tape = Tape(tmp_path / "real")
    with tape.ckpt:
        tape.save(1)
        tape.save(2)
        tape.save(2)
    disk = Disk(tape.base, tape.ops.log)
    begin = max(i for i, op in enumerate(disk.ops) if op.mark and op.mark[1:] == [2, 0])
    checked = 0
    for count in range(begin, len(disk.ops), 3):
        rng = random.Random(f"{seed}/{count}")
        root = tmp_path / f"first-{count}"
        build(disk.after_crash(count, rng, 0.5), root)
        image = read_image(root)
        ops = RecordingOps()
        folder = Folder(root / "new" / "ckpt", ops)
        folder.take()
        folder.release()
        again = Disk(root, ops.log, {name: data for name, data in image.items() if not name.endswith(".lock")})
        for later in range(len(again.ops) + 1):
            judge(tape, disk.marks(count), again.after_crash(later, rng, 0.5), tmp_path / "second")
            checked += 1
        shutil.rmtree(root)
    assert checked > 20


def save_on_ranks(rank: int, world: int, base: str) -> tuple[list[tuple[int, tuple]], bytes]:
    """Saves of two steps and of one again, recorded; each rank writes its half of the tensors."""
    plan.SMALL_BYTES = 4096
    ops, job, versions = RecordingOps(), Job(width=64, layers=2), {}
    with job.checkpointer(Path(base) / "new" / "ckpt", ops=ops, chunk_bytes=CHUNK) as ckpt:
        for step in (1, 2, 2):
            versions.setdefault(step, []).append(job.state())
            ckpt.save(step)
            job.advance(step)
            assert ckpt.wait()[-1].ok
            if rank == 0:
                ops.note("mark", "saved", step, len(versions[step]) - 1)
    stored = io.BytesIO()  # tensors as such would travel in shared memory, which ends with the rank
    torch.save(versions, stored)
    return list(zip(ops.times_ns, ops.log)), stored.getvalue()


@pytest.mark.slow
def test_no_power_failure_loses_what_two_ranks_wrote(ranks, tmp_path, seed):
    (tmp_path / "real").mkdir()
    results = ranks(2, save_on_ranks, str(tmp_path / "real"))
    tape = SimpleNamespace(versions=torch.load(io.BytesIO(results[0][1]), weights_only=True), layers=2)
    disk = Disk(tmp_path / "real", merge(log for log, _ in results))
    written = {entry[1].name for log, _ in results for _, entry in log if entry[0] == "create"}
    assert {"__0_0.distcp", "__1_0.distcp"} <= written
    judged = set()
    for count in range(len(disk.ops) + 1):
        marks = disk.marks(count)
        for trial, keep in enumerate((0.0, 0.5)):
            image = disk.after_crash(count, random.Random(f"{seed}/{count}/{trial}"), keep)
            known = hash((promised(marks), tuple(sorted(image.items()))))
            if known not in judged:
                judged.add(known)
                judge(tape, marks, image, tmp_path / "crashed")
    assert len(judged) > 40


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_the_model_forgets_what_was_not_synced(tmp_path, seed, keep):
    """The model itself: a synced file in a synced folder stays, the rest may not."""
    ops = RecordingOps()
    ops.mkdir(tmp_path / "r" / "d")
    ops.fsync_dir(tmp_path / "r")
    ops.write_file(tmp_path / "r" / "d" / "safe", b"s" * 3000)
    ops.fsync_dir(tmp_path / "r" / "d")
    handle = ops.create(tmp_path / "r" / "d" / "loose", 8192)
    ops.pwrite(handle, b"l" * 8192, 0)
    ops.abandon(handle)
    ops.rename(tmp_path / "r" / "d" / "safe", tmp_path / "r" / "d" / "moved")
    disk = Disk(tmp_path / "r", [entry for entry in ops.log if entry[1] != tmp_path / "r" or entry[0] == "syncdir"])
    images = [disk.after_crash(len(disk.ops), random.Random(seed + i), keep) for i in range(40)]
    assert all((image.get("d/safe") or image.get("d/moved")) == b"s" * 3000 for image in images)
    kept = [image for image in images if image.get("d/loose") == b"l" * 8192]
    assert len(kept) == (40 if keep == 1.0 else len(kept))
    assert (keep == 1.0) == (len(kept) == 40)
    if keep == 0.5:
        assert any("d/loose" not in image for image in images)
        assert any(set(image.get("d/loose", b"")) == {0, ord("l")} for image in images)
    if keep == 0.0:
        assert all("d/moved" not in image for image in images)


def test_nothing_changes_the_disk_past_the_recorder():
    """A method added to FileOps must be added to the recorder, or the tests above would see nothing of it."""
    known = {"mkdir", "create", "reuse", "pwrite", "finish", "abandon", "write_file", "rename"}
    known |= {"write_hint", "fsync_dir", "unlink", "rmtree"}
    named = {name for name, _ in inspect.getmembers(FileOps, inspect.isfunction) if name[0] != "_"}
    assert named - {"exists"} == known  # which only looks
    assert known <= set(vars(RecordingOps))


def test_each_operation_that_promises_durability_syncs(tmp_path, monkeypatch):
    """The recorder believes FileOps; this does not."""
    import os

    from undertow.checkpointing import files

    synced: list[tuple[str, int]] = []

    def fsync(handle: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{handle}"), os.fstat(handle).st_size))

    monkeypatch.setattr(files.os, "fsync", fsync)
    ops = FileOps(direct=False)
    handle = ops.create(tmp_path / "file", 4096)
    ops.pwrite(handle, b"x" * 4096, 0)
    ops.finish(handle, 100)
    assert synced == [(str(tmp_path / "file"), 100)]
    ops.write_file(tmp_path / "small", b"abc")
    assert synced[1:] == [(str(tmp_path / "small.part"), 3)]
    ops.fsync_dir(tmp_path)
    assert synced[2][0] == str(tmp_path)
