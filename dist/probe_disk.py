"""Disk rates: writing and reading one file, past the page cache (O_DIRECT) and through it.

The scratch file is unlinked as soon as it is open, so that nothing is left behind even by SIGKILL; it is reopened
through /proc/self/fd. Every write ends with fsync, and the cache is dropped before the buffered read, so that all four
numbers tell of the device. Four threads write and read blocks of 8 MiB, because one request at a time does not fill an
NVMe drive. The bytes are random: some file systems compress.
"""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .errors import UserError
from .measure import Effort, Measurement, Skipped
from .units import format_bytes

BLOCK_BYTES = 8 << 20
THREADS = 4
_FULL_BYTES, _QUICK_BYTES = 1 << 30, 128 << 20


class ScratchFile:
    """An unlinked file of `nbytes` in `folder`. `UserError` when the folder cannot be written or lacks the space."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.nbytes = nbytes
        try:
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise UserError(f"cannot probe the disk at {folder} ({error.strerror})", expected="a folder") from error
        if free < 2 * nbytes:
            raise UserError(
                f"{folder} has {format_bytes(free)} left",
                expected=f"twice the scratch file of {format_bytes(nbytes)}",
                remedy="--disk-path another folder, --quick for a smaller file, or --only without disk",
            )
        try:
            self._fd, name = tempfile.mkstemp(prefix=".undertow-probe-", dir=folder)
        except OSError as error:
            raise UserError(
                f"cannot write in {folder} ({error.strerror})", expected="a folder where this user may write"
            ) from error
        os.unlink(name)
        self._block = mmap.mmap(-1, BLOCK_BYTES)  # pages: aligned as O_DIRECT wants
        self._block.write(os.urandom(BLOCK_BYTES))

    def close(self) -> None:
        os.close(self._fd)

    def write_s(self, direct: bool) -> float:
        """Seconds to write the whole file and fsync it; the file is emptied before."""
        os.ftruncate(self._fd, 0)
        fd = self._reopen(os.O_WRONLY, direct)
        try:
            return _timed(lambda: self._write(fd))
        finally:
            os.close(fd)

    def read_s(self, direct: bool) -> float:
        """Seconds to read the whole file, none of which is in the page cache."""
        fd = self._reopen(os.O_RDONLY, direct)
        try:
            os.fsync(self._fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            return _timed(lambda: _all(self.nbytes, lambda offset, buffer: _read(fd, offset, buffer)))
        finally:
            os.close(fd)

    def _write(self, fd: int) -> None:
        _all(self.nbytes, lambda offset, _: _whole(os.pwrite(fd, self._block, offset)))
        os.fsync(fd)

    def _reopen(self, flags: int, direct: bool) -> int:
        try:
            return os.open(f"/proc/self/fd/{self._fd}", flags | (os.O_DIRECT if direct else 0))
        except OSError as error:
            if direct:
                raise Skipped("this file system does not take O_DIRECT") from error
            raise


def plan(scratch: ScratchFile, quick: bool) -> list[Measurement]:
    """Write and read, direct and buffered; each read follows a write."""
    effort = Effort.of(quick)

    def rate(seconds: Callable[[], float]) -> float:
        return scratch.nbytes / statistics.median(seconds() for _ in range(min(3, effort.repeats)))

    return [
        Measurement("disks", "write_buffered", lambda: rate(lambda: scratch.write_s(direct=False))),
        Measurement("disks", "read_buffered", lambda: rate(lambda: scratch.read_s(direct=False))),
        Measurement("disks", "write_direct", lambda: rate(lambda: scratch.write_s(direct=True))),
        Measurement("disks", "read_direct", lambda: rate(lambda: scratch.read_s(direct=True))),
    ]


def scratch_bytes(quick: bool) -> int:
    return _QUICK_BYTES if quick else _FULL_BYTES


def _all(nbytes: int, block: Callable[[int, mmap.mmap], None]) -> None:
    """Run `block(offset, buffer of the thread)` for all offsets, on THREADS threads."""

    def stripe(first: int) -> None:
        buffer = mmap.mmap(-1, BLOCK_BYTES)
        for offset in range(first * BLOCK_BYTES, nbytes, THREADS * BLOCK_BYTES):
            block(offset, buffer)

    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(stripe, first) for first in range(THREADS)]:
            done.result()


def _read(fd: int, offset: int, buffer: mmap.mmap) -> None:
    _whole(os.preadv(fd, [buffer], offset))


def _whole(nbytes: int) -> None:
    if nbytes != BLOCK_BYTES:
        raise Skipped(f"a request of {format_bytes(BLOCK_BYTES)} moved only {format_bytes(nbytes)}")


def _timed(run: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    try:
        run()
    except OSError as error:  # ENOSPC, EIO, or an O_DIRECT that fails only at the first request
        raise Skipped(f"{error.strerror}") from error
    return time.perf_counter() - start_s
