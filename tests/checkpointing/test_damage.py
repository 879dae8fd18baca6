"""Damage of every kind to every file: the older checkpoint is restored, the damaged one set aside, never wrong data."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import Job, same

from undertow.checkpointing.manifest import COMMIT, MANIFEST
from undertow.dist.errors import UserError

FILES = ["__0_0.distcp", "__0_1.distcp", ".metadata", MANIFEST, COMMIT]


def flip_bit(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_last_byte(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 0xFF
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def empty(path: Path, rng: random.Random) -> None:
    os.truncate(path, 0)


def lengthen(path: Path, rng: random.Random) -> None:
    with path.open("ab") as file:
        file.write(b"\0" * rng.randrange(1, 5000))


def tear(path: Path, rng: random.Random) -> None:
    """A sector that was never written."""
    data = bytearray(path.read_bytes())
    begin = rng.randrange(0, len(data), 512)
    old = bytes(data[begin : begin + 512])
    data[begin : begin + 512] = bytes(len(old)) if any(old) else b"\x55" * len(old)
    path.write_bytes(data)


def remove(path: Path, rng: random.Random) -> None:
    path.unlink()


def replace_by_link(path: Path, rng: random.Random) -> None:
    """The same bytes, but outside of the checkpoint, where somebody else may change them."""
    elsewhere = path.parent.parent.parent / f"elsewhere-{path.name}"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


def replace_by_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def older_file(path: Path, rng: random.Random) -> None:
    """The file of the other checkpoint: whole, but of another step."""
    shutil.copy(path.parent.parent / "step-000000001" / path.name, path)


DAMAGE: list[Callable] = [
    flip_bit,
    flip_last_byte,
    truncate,
    empty,
    lengthen,
    tear,
    remove,
    replace_by_link,
    replace_by_folder,
    older_file,
]
HARMLESS = {(replace_by_link, MANIFEST), (replace_by_link, COMMIT)}  # read once, and the bytes are vouched for
NO_COMMIT = {(remove, COMMIT), (replace_by_folder, COMMIT)}  # as a crash leaves it: not a checkpoint at all


def two_checkpoints(root: Path) -> dict[int, dict]:
    job, states = Job(layers=1), {}
    with job.checkpointer(root, keep=None) as ckpt:
        for step in (1, 2):
            job.advance(step)
            states[step] = job.state()
            torch.rand(1)  # so that the objects of the two differ too
            ckpt.save(step)
        assert all(report.ok for report in ckpt.wait())
    return states


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("pristine") / "c"
    return root, two_checkpoints(root)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_the_older_one_is_restored(tmp_path, seed, pristine, damage, name):
    root, states = tmp_path / "c", pristine[1]
    shutil.copytree(pristine[0], root)
    whole = (root / "step-000000002" / name).read_bytes()
    damage(root / "step-000000002" / name, random.Random(seed))
    fits = (damage, name) in HARMLESS
    if damage is older_file:  # a file that does not change from step to step
        fits = (root / "step-000000002" / name).read_bytes() == whole
        assert not fits or name == ".metadata"
    job = Job(seed=9, layers=1)
    with job.checkpointer(root) as ckpt:
        assert ckpt.restore() == (2 if fits else 1)
        assert same(job.state(), states[2 if fits else 1])
        aside = [path for path in root.iterdir() if ".bad-" in path.name]
        assert len(aside) == (not fits and (damage, name) not in NO_COMMIT)
        for path in aside:
            assert path.name.startswith(".step-000000002.bad-")
            assert (path / "__0_0.distcp").exists() or name == "__0_0.distcp"
        job.advance(7)
        state = job.state()
        ckpt.save(2)
        assert ckpt.wait()[-1].ok
        assert ckpt.restore() == 2
        assert same(job.state(), state)


def test_when_all_are_damaged_the_run_is_told(tmp_path, pristine):
    shutil.copytree(pristine[0], tmp_path / "c")
    for step in (1, 2):
        flip_last_byte(tmp_path / "c" / f"step-{step:09d}" / "__0_0.distcp", random.Random(0))
    job = Job(seed=9, layers=1)
    before = job.state()
    with job.checkpointer(tmp_path / "c") as ckpt, pytest.raises(UserError, match="every checkpoint .* is damaged"):
        ckpt.restore()
    assert same(job.state(), before)
    assert len([path for path in (tmp_path / "c").iterdir() if ".bad-" in path.name]) == 2


def test_the_step_that_was_asked_for_is_damaged(tmp_path, pristine):
    shutil.copytree(pristine[0], tmp_path / "c")
    truncate(tmp_path / "c" / "step-000000002" / "__0_0.distcp", random.Random(1))
    job = Job(seed=9, layers=1)
    before = job.state()
    with job.checkpointer(tmp_path / "c") as ckpt:
        with pytest.raises(UserError, match="__0_0.distcp has .* bytes; its manifest says"):
            ckpt.restore(2)
        assert same(job.state(), before)
        assert ckpt.restore(1) == 1


def test_a_renamed_checkpoint_does_not_pass_for_a_newer_one(tmp_path, pristine):
    shutil.copytree(pristine[0], tmp_path / "c")
    shutil.copytree(tmp_path / "c" / "step-000000001", tmp_path / "c" / "step-000000050")
    job = Job(seed=9, layers=1)
    with job.checkpointer(tmp_path / "c") as ckpt:
        assert ckpt.restore() == 2
    assert same(job.state(), pristine[1][2])


def test_a_later_format_is_left_where_it_is(tmp_path, pristine):
    import json

    shutil.copytree(pristine[0], tmp_path / "c")
    path = tmp_path / "c" / "step-000000002" / COMMIT
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    job = Job(seed=9, layers=1)
    before = job.state()
    with job.checkpointer(tmp_path / "c") as ckpt, pytest.raises(UserError, match="format 2"):
        ckpt.restore()
    assert same(job.state(), before)
    assert path.exists()


def test_setting_aside_twice_under_a_clock_that_stands_still(tmp_path, pristine, monkeypatch):
    from undertow.checkpointing import folder

    monkeypatch.setattr(folder.time, "time_ns", lambda: 1)
    root = tmp_path / "c"
    for _ in range(2):
        shutil.copytree(pristine[0], root, dirs_exist_ok=True)
        empty(root / "step-000000002" / "__0_0.distcp", random.Random(0))
        with Job(seed=9, layers=1).checkpointer(root) as ckpt:
            assert ckpt.restore() == 1
    assert len([path for path in root.iterdir() if ".bad-" in path.name]) == 2


def test_a_clock_that_goes_back_changes_nothing(tmp_path, monkeypatch):
    from undertow.checkpointing import folder

    job, now = Job(layers=1), [2e9]

    def backwards() -> float:
        now[0] -= 1e8
        return now[0]

    monkeypatch.setattr(folder.time, "time", backwards)
    with job.checkpointer(tmp_path, every=1, keep=2) as ckpt:
        for step in range(4):
            ckpt.step(step)
            job.advance(step)
        ckpt.wait()
        assert ckpt.folder.committed() == [2, 3]
        assert ckpt.restore() == 3


def test_a_file_that_may_not_be_read_is_no_damage(tmp_path, pristine, monkeypatch):
    """Setting good checkpoints aside, one after the other, because of a permission would lose the run."""
    from undertow.checkpointing import verify

    shutil.copytree(pristine[0], tmp_path / "c")

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    job = Job(seed=9, layers=1)
    with job.checkpointer(tmp_path / "c") as ckpt:
        monkeypatch.setattr(verify.os, "pread", refuse)
        monkeypatch.setattr(verify.os, "preadv", refuse)
        with pytest.raises(UserError, match="cannot be read"):
            ckpt.restore()
        monkeypatch.undo()
        assert ckpt.restore() == 2
