"""A generation of the host-memory tier: one rank's shard file in shared memory, mapped, with a slot for every chunk.

Copies from the device land in it directly, so that the file is written when they are done, and another tier flushes it
from there. Whose turn it is to be overwritten is `host_tier`'s affair.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .arena import register
from .copies import HostCopier
from .manifest import FileRecord
from .plan import SavePlan

REMOVED = "was removed while it was written; systemd's RemoveIPC=yes does that at its user's logout"


def still_there(path: Path) -> None:
    """`OSError` where the file is gone: a checkpoint without it would be none."""
    try:
        os.stat(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} {REMOVED}") from error


class Generation:
    """One rank's shard file of one generation, mapped: the `Memory` of a snapshot, with a slot for every chunk."""

    def __init__(self, path: Path, plan: SavePlan, *, pinned: bool) -> None:
        self.chunk_bytes, self.nbytes = plan.image.chunk_bytes, plan.image.size
        rounded = max(1, -(-self.nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(handle, 0, rounded)
            self._map = mmap.mmap(handle, rounded)
            os.ftruncate(handle, self.nbytes)  # its last page stays, and with it the mapping
        finally:
            os.close(handle)
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        self._bytes[: self.nbytes : mmap.PAGESIZE] |= 0  # have the pages now, not during a step
        self.address = self._bytes.ctypes.data
        self._unpin = register(self, self.address, rounded) if pinned else None
        self._framed = bytearray(plan.image.chunks)  # a slot is always the same chunk's, and only payloads change

    @property
    def framed(self) -> bool:
        return 0 not in self._framed

    def lacks_frames(self, slot: int) -> bool:
        before, self._framed[slot] = self._framed[slot], 1
        return not before

    def reserve(self, count: int) -> list[int]:
        return [0] * count

    def await_room(self) -> None:
        """There is room for every chunk."""

    def places(self, rooms: Sequence[int], first: int) -> Sequence[int]:
        return range(first, first + len(rooms))

    def release(self, slot: int) -> None:
        """A chunk's slot stays the chunk's."""

    def slot_address(self, slot: int) -> int:
        return self.address + slot * self.chunk_bytes

    def view(self, slot: int, nbytes: int) -> memoryview:
        begin = slot * self.chunk_bytes
        return memoryview(self._map)[begin : begin + nbytes]

    def close(self) -> None:
        if self._unpin is not None:
            self._unpin()


class HostFile:
    """The `TierFile` of a generation: its bytes are in place when the copies are done."""

    def __init__(self, path: Path, generation: Generation, copier: HostCopier) -> None:
        self.path, self._generation, self._copier = path, generation, copier
        self._marks: list = []

    def note(self, mark: object) -> None:
        """The copies of some chunks have been issued."""
        self._marks.append(mark)

    def begin(self) -> None:
        """The copies bring its bytes."""

    def wait(self) -> None:
        for mark in self._marks[::-1]:  # the last one first: the others are done then
            self._copier.wait(mark)

    def finish(self) -> FileRecord:
        still_there(self.path)
        return FileRecord(self._generation.nbytes, ())

    def abandon(self) -> None:
        """The next save overwrites it."""
