"""A second home for checkpoints: files that are committed on one tier are streamed to another, and committed there too.

Meant for a parallel file system behind a local disk, at a longer interval. The copy is read from the file that is
already durable, one buffer at a time, in the background, and its checksums must be those that the first tier wrote, so
that a disk's silent error does not travel on. Any further tier works alike: a `TierFile` and a `Folder` for its
`Committer`.
"""

from __future__ import annotations

import mmap
import os
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
    """One rank's shard file on its way from `source`, a finished file of another tier, to `path`. A `TierFile`.

    It holds the source open from the start: retention may remove its name while the copy waits.
    """

    def __init__(self, ops: FileOps, source: Path, path: Path, written: ShardFile) -> None:
        self.ops, self.path = ops, path
        self._written = written
        self._problem = ""
        self._source = -1
        try:
            self._source = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._problem = f"{source} was not committed ({error.strerror})"

    def wait(self) -> None:
        """Nothing to wait for: `finish` copies."""

    def finish(self) -> FileRecord:
        if self._problem:
            raise BadCheckpoint(self._problem)
        image, sums = self._written.image, self._written.sums
        self.ops.mkdir(self.path.parent)
        handle = self.ops.create(self.path, -(-image.size // SECTOR) * SECTOR)
        try:
            with mmap.mmap(
                -1, -(-image.chunk_bytes // SECTOR) * SECTOR
            ) as memory:  # page-aligned, as O_DIRECT wants it
                for chunk in range(image.chunks):
                    begin, end = image.chunk_range(chunk)
                    with memoryview(memory) as buffer, buffer[: end - begin] as view:
                        _read(self._source, view, begin)
                        if checksum(view) != sums[chunk]:
                            raise BadCheckpoint(f"chunk {chunk} of {self.path.name} has changed on the disk")
                        with buffer[: -(-(end - begin) // SECTOR) * SECTOR] as rounded:
                            self.ops.pwrite(handle, rounded, begin)
        except BaseException:
            self.ops.abandon(handle)
            raise
        self.ops.finish(handle, image.size)
        self._close()
        return FileRecord(image.size, tuple(sums))

    def abandon(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._source >= 0:
            handle, self._source = self._source, -1
            os.close(handle)


def _read(handle: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.preadv(handle, [view], offset)
        if not count:
            raise BadCheckpoint("the file ends too early")
        view, offset = view[count:], offset + count
