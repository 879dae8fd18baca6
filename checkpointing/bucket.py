"""Every k-th checkpoint in an object store: the option `bucket`, and one rank's shard file on its way there.

What the disk has written is read back chunk by chunk, compared with the checksum of the bytes in memory, and handed to
the library as parts of one upload, beside training and while later chunks are still copied: at most `uploads` + 1 parts
are in memory, whatever the size of the state. A store that is slow or away costs saves of this tier and no others; when
a save is still under way and another waits behind it, the next is refused rather than piled up.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..dist.errors import UserError
from ..dist.trace import Trace
from .flush import ShardFile
from .manifest import BadCheckpoint, FileRecord, checksum
from .object_store import ObjectStore, is_url
from .retention import Retention

LEAST_PART = 5 * 2**20  # S3 takes no smaller one, but for the last
KEYS = re.compile(r"\?|^(?!abfss?:).*@|:[^/]*@")  # but abfss://container@account/path
WAITING = 2  # saves in this tier, one under way and one behind it; each holds a file of the disk open


@dataclass(frozen=True)
class Bucket:
    """Copy the first checkpoint on disk at or after every `every`-th step to `url` (s3://bucket/prefix, gs://…, az://…),
    and keep there what `keep` says (a number of newest ones, a `Retention`, or None for all).

    `part_bytes` × (`uploads` + 1) is the most host memory that a rank's upload takes; parts grow by themselves where
    a file would have more than a store allows. A request that fails is tried again for `retry_s`. Credentials, region,
    endpoint and the time that a request may take come from the environment, never from here.
    """

    url: str
    every: int = 1
    keep: int | Retention | None = None
    part_bytes: int = 16 * 2**20
    uploads: int = 4
    retry_s: float = 60.0

    def __post_init__(self) -> None:
        if not is_url(self.url) or KEYS.search(self.url):
            raise UserError(
                "the URL of a Bucket",  # not shown: a wrong one may hold a key
                expected="one such as s3://bucket/prefix, gs://bucket/prefix or az://container/prefix, without keys",
                remedy="give credentials by the environment (AWS_ACCESS_KEY_ID …)",
            )
        if self.every < 1 or (isinstance(self.keep, int) and self.keep < 1):
            raise UserError(f"bucket every {self.every}, keep {self.keep}", expected="every ≥ 1, and keep ≥ 1 or None")
        if self.part_bytes < LEAST_PART or self.uploads < 1 or self.retry_s < 0:
            raise UserError(
                f"bucket part_bytes={self.part_bytes}, uploads={self.uploads}, retry_s={self.retry_s}",
                expected=f"part_bytes ≥ {LEAST_PART}, uploads ≥ 1, retry_s ≥ 0",
            )

    def open(self) -> ObjectStore:
        return ObjectStore(self.url, retry_s=self.retry_s)


class BucketFile:
    """One rank's shard file on its way from `written`, a followed file of another tier, to the key `path`. A
    `TierFile`. `failed` tells why the save is lost, once it is; `refused` that this rank does not even begin."""

    def __init__(
        self,
        store: ObjectStore,
        config: Bucket,
        path: Path,
        written: ShardFile,
        failed: Callable[[], BaseException | None],
        *,
        trace: Trace,
        refused: str = "",
    ) -> None:
        self.path, self._trace = path, trace
        self._store, self._config, self._written, self._failed = store, config, written, failed
        self._refused = refused

    def begin(self) -> None:
        """Upload chunk after chunk, as the first tier writes them."""
        if self._refused:
            raise RuntimeError(self._refused)
        ways = {"part_bytes": self._config.part_bytes, "uploads": self._config.uploads}
        with self._trace.span("upload", nbytes=self._written.image.size):
            self._store.upload(self.path.as_posix(), self._chunks(), self._written.image.size, **ways)
        self._written.leave(self)

    def _chunks(self) -> Iterator[bytes]:
        """Each chunk's bytes once they are on the disk; the library keeps them until they are sent."""
        image, sums = self._written.image, self._written.sums
        for chunk in range(image.chunks):
            begin, end = image.chunk_range(chunk)
            source = self._written.await_chunk(chunk, self._failed)
            data = os.pread(source, end - begin, begin)
            if len(data) != end - begin or checksum(data) != sums[chunk]:
                raise BadCheckpoint(f"chunk {chunk} of {self.path.name} has changed on the disk")
            yield data

    def wait(self) -> None:
        """Nothing to wait for: `begin` uploads."""

    def finish(self) -> FileRecord:
        return FileRecord(self._written.image.size, tuple(self._written.sums))

    def abandon(self) -> None:
        self._written.leave(self)
