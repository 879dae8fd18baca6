"""File operations that keep the interpreter lock do what Python's own do, errors included."""

from __future__ import annotations

import errno
import os

import pytest

from undertow.checkpointing.files import FileOps
from undertow.checkpointing.memory_ops import LONG_BYTES, MemoryOps


@pytest.mark.parametrize("nbytes", [0, 1, 300_000, LONG_BYTES + 1])
def test_a_file_is_written_whole_and_replaces_an_older_one(tmp_path, nbytes):
    data = os.urandom(nbytes)
    path = tmp_path / "é manifest.json"
    for content in (b"older and longer" * 99, data, b"x" * (nbytes // 2)):
        MemoryOps().write_file(path, content)
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("ops", [MemoryOps(), FileOps(direct=False, syncs=False)])
def test_errors_are_the_same(tmp_path, ops):
    missing = tmp_path / "not" / "there"
    with pytest.raises(FileNotFoundError) as error:
        ops.write_file(missing, b"x")
    assert error.value.filename == os.fspath(missing) + ".part"
    with pytest.raises(FileNotFoundError) as error:
        ops.rename(missing, tmp_path / "new")
    assert (error.value.filename, error.value.filename2) == (os.fspath(missing), os.fspath(tmp_path / "new"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "other").mkdir()
    with pytest.raises(OSError) as error:
        ops.rename(tmp_path / "other", tmp_path / "full")
    assert error.value.errno == errno.ENOTEMPTY
    with pytest.raises(OSError) as error:
        ops.unlink(tmp_path / "full")
    assert error.value.errno in (errno.EISDIR, errno.EPERM)
    ops.unlink(missing)
    ops.unlink(tmp_path / "full" / "x")
    ops.rename(tmp_path / "other", tmp_path / "full")
    assert os.listdir(tmp_path) == ["full"]


def test_what_was_left_half_written_is_written_over(tmp_path):
    (tmp_path / "mine.part").write_bytes(b"left over" * 1000)
    MemoryOps().write_file(tmp_path / "mine", b"short")
    assert (tmp_path / "mine").read_bytes() == b"short" and os.listdir(tmp_path) == ["mine"]


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "theirs").write_bytes(b"keep")
    (tmp_path / "mine.part").symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError) as error:
        MemoryOps().write_file(tmp_path / "mine", b"x")
    assert error.value.errno == errno.ELOOP and (tmp_path / "theirs").read_bytes() == b"keep"


def test_a_full_device_is_said():
    if not os.path.exists("/dev/full"):
        pytest.fail("every Linux has /dev/full")
    ops = MemoryOps()
    handle = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(OSError) as error:
            ops._checked(ops._library.write(handle, b"x", 1), b"/dev/full")
    finally:
        os.close(handle)
    assert error.value.errno == errno.ENOSPC and error.value.filename == "/dev/full"
