"""Every operation that changes a disk, in one small class, so that tests can record, reorder, tear and fail them.

A file is durable only when it and its folder have been fsynced; a rename is durable when the folder has been. Whoever
writes a checkpoint goes through `FileOps` and never calls `os` itself; `tests/checkpointing` replays its recorded
trace against a model of a disk that loses what was not synced.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
        self.spare: Callable[[], bool] = lambda: False  # called when the disk is full: whether it gave room back

    def _sync(self, handle: int) -> None:
        if self.syncs:
            os.fsync(handle)

    def exists(self, path: Path) -> bool:
        return path.exists()

    def mkdir(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def create(self, path: Path, nbytes: int) -> int:
        """Create `path`, reserve `nbytes` so that a full disk is known before anything is copied; return the handle."""
        handle = self._open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            try:
                _reserve(handle, nbytes)
            except OSError as error:
                if error.errno != errno.ENOSPC or not self.spare():
                    raise
                _reserve(handle, nbytes)
        except OSError:
            os.close(handle)
            raise
        return handle

    def reuse(self, path: Path, nbytes: int, like: tuple[int, ...]) -> int:
        """Open `path`, which nobody is to find any more, to write over it, with room for `nbytes`; −1 where that is not
        safe: it does not look `like` a file made now (`looks`), has a second name, or is open or mapped elsewhere."""
        handle = -1
        try:
            handle = self._open(path, os.O_WRONLY | os.O_NONBLOCK)  # which never waits for what is no file, or leased
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or looks(status) != like or not _alone(handle):
                raise FileExistsError(path)
            _reserve(handle, nbytes)
        except OSError:
            if handle >= 0:
                os.close(handle)
            return -1
        return handle

    def _open(self, path: Path, flags: int) -> int:
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC
        if self.direct and hasattr(os, "O_DIRECT"):
            with suppress(OSError):  # tmpfs and some network file systems refuse O_DIRECT: buffered is right there
                return os.open(path, flags | os.O_DIRECT, 0o666)
        return os.open(path, flags, 0o666)

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
        try:
            self._write_scratch(scratch, data)
        except OSError as error:
            if error.errno != errno.ENOSPC or not self.spare():
                raise
            self._write_scratch(scratch, data)
        self.rename(scratch, path)

    def write_hint(self, path: Path, data: bytes) -> None:
        """The same for a file that nobody relies on: a crash may leave the old one, the new one or a torn one."""
        scratch = path.with_name(path.name + ".part")
        self._write_scratch(scratch, data, sync=False)
        self.rename(scratch, path)

    def _write_scratch(self, scratch: Path, data: bytes, *, sync: bool = True) -> None:
        handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            self.pwrite(handle, data, 0)
            if sync:
                self._sync(handle)
        finally:
            os.close(handle)

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


def together(syncs: bool, *acts: Callable[[], Any]) -> None:
    """Do all of these. Where they sync, at the same time, so that the file system makes one commit and the disk one
    flush for all: beside chunks that are being written, each flush waits for these, up to a tenth of a second. Raises
    what the first of those that failed has raised, when all have ended."""
    if not syncs:
        for act in acts:
            act()
        return
    with ThreadPoolExecutor(len(acts)) as pool:
        ended = [pool.submit(act) for act in acts]
    for each in ended:
        each.result()


def looks(status: os.stat_result) -> tuple[int, ...]:
    """Device, mode and owner of a file: what one written over must have in common with one made now."""
    return status.st_dev, status.st_mode, status.st_uid, status.st_gid


def _reserve(handle: int, nbytes: int) -> None:
    try:
        if nbytes:
            os.posix_fallocate(handle, 0, nbytes)
    except OSError as error:
        if error.errno not in CANNOT_RESERVE:
            raise


def _alone(handle: int) -> bool:
    """Whether no other open file and no mapping, in any process, leads to the file of `handle`: only then the kernel
    gives a write lease, and not where it cannot know (fcntl(2), Leases)."""
    try:
        fcntl.fcntl(handle, fcntl.F_SETSIG, signal.SIGURG)  # for who opens it just now; the default would kill us
        fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(handle, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return False
    return True
