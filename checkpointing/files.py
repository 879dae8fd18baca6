"""Every operation that changes a disk, in one small class, so that tests can record, reorder, tear and fail them.

A file is durable only when it and its folder have been fsynced; a rename is durable when the folder has been. Whoever
writes a checkpoint goes through `FileOps` and never calls `os` itself; `tests/checkpointing` replays its recorded
trace against a model of a disk that loses what was not synced.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

CANNOT_RESERVE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)  # file systems without fallocate: go on without
SECTOR = 4096  # alignment that O_DIRECT needs of offset, length and address on every file system in use


class FileOps:
    """Plain POSIX files. `direct` asks for O_DIRECT and falls back to buffered writes where it is refused. `syncs`:
    whether fsync is called; in shared memory, which has no disk, it would only cost others the interpreter."""

    def __init__(self, *, direct: bool = True, syncs: bool = True) -> None:
        self.direct, self.syncs = direct, syncs

    def _sync(self, handle: int) -> None:
        if self.syncs:
            os.fsync(handle)

    def mkdir(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def create(self, path: Path, nbytes: int) -> int:
        """Create `path`, reserve `nbytes` so that a full disk is known before anything is copied; return the handle."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = -1
        if self.direct and hasattr(os, "O_DIRECT"):
            with suppress(OSError):  # tmpfs and some network file systems refuse O_DIRECT: buffered is right there
                handle = os.open(path, flags | os.O_DIRECT, 0o666)
        if handle < 0:
            handle = os.open(path, flags, 0o666)
        try:
            if nbytes:
                os.posix_fallocate(handle, 0, nbytes)
        except OSError as error:
            if error.errno not in CANNOT_RESERVE:
                os.close(handle)
                raise
        return handle

    def pwrite(self, handle: int, data: Any, offset: int) -> None:
        view = memoryview(data).cast("B")
        while view:
            written = os.pwrite(handle, view, offset)
            view, offset = view[written:], offset + written

    def finish(self, handle: int, nbytes: int) -> None:
        """Cut the file to `nbytes` (direct writes end on a sector), make it durable and close it."""
        try:
            os.ftruncate(handle, nbytes)
            self._sync(handle)
        finally:
            os.close(handle)

    def abandon(self, handle: int) -> None:
        os.close(handle)

    def write_file(self, path: Path, data: bytes) -> None:
        """Write a small file durably under its final name: scratch name, fsync, rename. The folder is not synced."""
        scratch = path.with_name(path.name + ".part")
        handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            self.pwrite(handle, data, 0)
            self._sync(handle)
        finally:
            os.close(handle)
        self.rename(scratch, path)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def fsync_dir(self, path: Path) -> None:
        if not self.syncs:
            return
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def rmtree(self, path: Path) -> None:
        """Remove a checkpoint folder: COMMIT first, so that a half-removed one is never taken for valid."""
        if path.is_symlink() or not path.is_dir():
            return
        names = sorted(os.listdir(path), key=lambda name: (name != "COMMIT.json", name))
        for name in names:
            child = path / name
            if child.is_dir() and not child.is_symlink():
                self.rmtree(child)
            else:
                self.unlink(child)
        os.rmdir(path)
