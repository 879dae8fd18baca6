"""A second home for checkpoints: what one tier writes is streamed to another, and committed there by itself.

Meant for a parallel file system behind a local disk, at a longer interval. Each chunk is read back from the disk as
soon as it is written there, while later ones are still copied, one buffer at a time and in the background: a slow
mirror holds no memory that training waits for. Its checksums must be those of the bytes in memory, so that a disk's
silent error does not travel on. Any further tier works alike: a `TierFile` and a `Folder` for its `Committer`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..dist.errors import UserError
from .files import SECTOR, FileOps
from .flush import ShardFile
from .manifest import BadCheckpoint, FileRecord, checksum
from .retention import Retention


@dataclass(frozen=True)
class Mirror:
    """Copy the first checkpoint at or after every `every`-th step to `root`, and keep there what `keep` says (a number
    of newest ones, a `Retention`, or None for all)."""

    root: Path | str
    every: int = 1
    keep: int | Retention | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or (isinstance(self.keep, int) and self.keep < 1):
            raise UserError(f"mirror every {self.every}, keep {self.keep}", expected="every ≥ 1, and keep ≥ 1 or None")


class MirrorFile:
    """One rank's shard file on its way from `written`, a followed file of another tier, to `path`. A `TierFile`.
    `failed` tells why the save is lost, once it is."""

    def __init__(
        self, ops: FileOps, path: Path, written: ShardFile, failed: Callable[[], BaseException | None]
    ) -> None:
        self.ops, self.path = ops, path
        self._written, self._failed = written, failed
        self._handle = -1

    def begin(self) -> None:
        """Copy chunk after chunk, as the first tier writes them."""
        image, sums = self._written.image, self._written.sums
        self.ops.mkdir(self.path.parent)
        self._handle = self.ops.create(self.path, _sectors(image.size))
        with mmap.mmap(-1, _sectors(image.chunk_bytes)) as memory:  # page-aligned, as O_DIRECT wants it
            for chunk in range(image.chunks):
                begin, end = image.chunk_range(chunk)
                source = self._written.await_chunk(chunk, self._failed)
                with memoryview(memory) as buffer, buffer[: end - begin] as view:
                    _read(source, view, begin)
                    if checksum(view) != sums[chunk]:
                        raise BadCheckpoint(f"chunk {chunk} of {self.path.name} has changed on the disk")
                    with buffer[: _sectors(end - begin)] as rounded:
                        self.ops.pwrite(self._handle, rounded, begin)
        self._written.leave(self)

    def wait(self) -> None:
        """Nothing to wait for: `begin` copies."""

    def finish(self) -> FileRecord:
        handle, self._handle = self._handle, -1
        self.ops.finish(handle, self._written.image.size)
        return FileRecord(self._written.image.size, tuple(self._written.sums))

    def abandon(self) -> None:
        self._written.leave(self)
        if self._handle >= 0:
            handle, self._handle = self._handle, -1
            self.ops.abandon(handle)


def _sectors(nbytes: int) -> int:
    """`nbytes` rounded up to what O_DIRECT can write."""
    return -(-nbytes // SECTOR) * SECTOR


def _read(handle: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.preadv(handle, [view], offset)
        if not count:
            raise BadCheckpoint("the file ends too early")
        view, offset = view[count:], offset + count
