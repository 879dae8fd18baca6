"""File operations in shared memory that keep the interpreter lock while they run.

A commit there is some twenty calls of a few microseconds each. Python gives the interpreter lock away around every one
of them; in a background thread beside a training thread that is busy with Python, each then costs both a change of
threads, many times as long as the call. So the C library is called without giving the lock away. A large piece of
data is still written the usual way.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from .files import FileOps

LONG_BYTES = 2**20  # takes longer to write than a change of threads: a tenth of a millisecond
CREATE = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC  # pages that are there are quicker written over


def _library() -> ctypes.PyDLL:
    library = ctypes.PyDLL(None, use_errno=True)
    library.open.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_uint]
    library.write.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t]
    library.write.restype = ctypes.c_ssize_t
    library.ftruncate.argtypes = [ctypes.c_int, ctypes.c_long]
    library.rename.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    library.unlink.argtypes = [ctypes.c_char_p]
    library.access.argtypes = [ctypes.c_char_p, ctypes.c_int]
    return library


class MemoryOps(FileOps):
    """`FileOps` for files in shared memory: nothing is synced, and small files are written without a pause."""

    def __init__(self) -> None:
        super().__init__(direct=False, syncs=False)
        self._library = _library()

    def _write_scratch(self, scratch: Path, data: bytes, *, sync: bool = True) -> None:
        if len(data) > LONG_BYTES:
            super()._write_scratch(scratch, data, sync=sync)
            return
        name = os.fsencode(scratch)
        handle = self._checked(self._library.open(name, CREATE, 0o666), name)
        try:
            done = 0
            while done < len(data):
                rest = data[done:] if done else data
                written = self._library.write(handle, rest, len(rest))
                if written < 0 and ctypes.get_errno() == errno.EINTR:
                    continue
                done += self._checked(written, name)
            self._checked(self._library.ftruncate(handle, len(data)), name)
        finally:
            self._library.close(handle)

    def exists(self, path: Path) -> bool:
        return self._library.access(os.fsencode(path), os.F_OK) == 0

    def rename(self, source: Path, target: Path) -> None:
        names = os.fsencode(source), os.fsencode(target)
        self._checked(self._library.rename(*names), *names)

    def unlink(self, path: Path) -> None:
        name = os.fsencode(path)
        with suppress(FileNotFoundError):
            self._checked(self._library.unlink(name), name)

    @staticmethod
    def _checked(result: Any, name: bytes, other: bytes | None = None) -> int:
        """A call's result, or the `OSError` that Python would have raised."""
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), os.fsdecode(name), None, other and os.fsdecode(other))
        return result
