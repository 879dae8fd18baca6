"""From arena slots to files: each filled chunk is hashed, written and its slot given back, while later ones still fill.

Writers take chunks in any order, since every chunk has its own offset. A failed write fails the save and nothing else:
slots go on being given back, so that training never waits for a save that is lost.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..dist.trace import Trace
from .arena import Memory
from .copies import HostCopier
from .files import SECTOR, FileOps, together
from .layout import Image
from .manifest import FileRecord, checksum
from .recycle import Pool


class ShardFile:
    """One rank's shard file being written, with its folder; made by the first write or by `begin`. Thread-safe.
    `followers`: so many other tiers read the chunks as they come (`await_chunk`), and each calls `leave` in the end.
    `pool`: where the file may come from, to be written over."""

    def __init__(self, ops: FileOps, path: Path, image: Image, *, followers: int = 0, pool: Pool | None = None) -> None:
        self.ops, self.path, self.image = ops, path, image
        self._pool, self._recycled = pool, False
        self._handle = self._reader = -1
        self._followers = followers
        self._left: set[int] = set()
        self._written = bytearray(image.chunks)
        self.sums: list[str] = [""] * image.chunks
        self._issued = self._done = 0
        self._changed = threading.Condition()

    def _open(self) -> int:
        with self._changed:
            if self._handle < 0:
                self.ops.mkdir(self.path.parent)
                rounded = -(-self.image.size // SECTOR) * SECTOR
                if self._pool is None:
                    self._handle = self.ops.create(self.path, rounded)
                else:
                    self._handle, self._recycled = self._pool.create(self.path, rounded)
                if len(self._left) < self._followers:
                    # held open: the file is renamed, and retention may remove it before it is read
                    self._reader = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            return self._handle

    def write(self, chunk: int, slot: int, memory: Memory) -> None:
        """Hash and write a chunk from its slot."""
        begin, end = self.image.chunk_range(chunk)
        self.sums[chunk] = checksum(memory.view(slot, end - begin))
        rounded = -(-(end - begin) // SECTOR) * SECTOR  # the last chunk's rest is cut off again by `finish`
        self.ops.pwrite(self._open(), memory.view(slot, rounded), begin)
        with self._changed:
            self._written[chunk] = 1
            self._changed.notify_all()

    def await_chunk(self, chunk: int, failed: Callable[[], BaseException | None]) -> int:
        """For a follower: the handle from which `chunk` can be read now. Raises what `failed` returns meanwhile."""
        with self._changed:
            while not self._written[chunk]:
                if (error := failed()) is not None:
                    raise error
                self._changed.wait(timeout=0.2)
            return self._reader

    def leave(self, follower: object) -> None:
        """This follower reads no more; it may say so twice."""
        with self._changed:
            self._left.add(id(follower))
            if len(self._left) >= self._followers and self._reader >= 0:
                handle, self._reader = self._reader, -1
                os.close(handle)

    def begin(self) -> None:
        """Writers bring its chunks. The file is made now, if none was there yet: a shard may have no chunk at all."""
        self._open()

    def issue(self, chunks: int) -> None:
        """Count so many chunks as given to writers."""
        with self._changed:
            self._issued += chunks

    def done(self) -> None:
        """Count one chunk as dealt with, written or not."""
        with self._changed:
            self._done += 1
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when every chunk given to a writer has been dealt with."""
        with self._changed:
            self._changed.wait_for(lambda: self._done == self._issued)

    def finish(self) -> FileRecord:
        """Make the file durable; its record."""
        handle, self._handle = self._open(), -1
        acts: list[Callable[[], None]] = [partial(self.ops.finish, handle, self.image.size)]
        if self._pool is not None and self._recycled:
            acts.append(self._pool.settle)
        together(self.ops.syncs, *acts)
        return FileRecord(self.image.size, tuple(self.sums))

    def abandon(self) -> None:
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            self.ops.abandon(handle)


def flush_chunk(
    file: ShardFile,
    snapshot: Any,
    mark: Any,
    chunk: int,
    slot: int,
    *,
    memory: Memory,
    copier: HostCopier,
    trace: Trace,
) -> None:
    """What a writer thread does with one chunk."""
    try:
        copier.wait(mark)
        if snapshot.error is None:
            with trace.span("flush", step=snapshot.step, chunk=chunk):
                file.write(chunk, slot, memory)
    except BaseException as error:
        snapshot.fail(error)
    finally:
        memory.release(slot)
        file.done()
