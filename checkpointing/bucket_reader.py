"""Reading a checkpoint in an object store: only the chunks that are asked for, several at a time, checked before use.

A chunk that has come and has its checksum is kept in a local file without a name, as long as the checkpoint's own and
with holes for all else; the reader takes tensors from there. So what ranks download to verify a checkpoint is not
downloaded again to load it, memory holds no more than the chunks on their way, and a crash leaves nothing behind.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..dist.errors import UserError
from .manifest import BadCheckpoint, Manifest, ShardRecord, checksum
from .object_store import ObjectStore
from .reader import Reader, dtype_of, load_object
from .restore import items_of

DOWNLOADS = 8  # chunks at a time
SMALL = 2**20  # a tensor below is read into memory of its own: a mapping each would be too many
Chunk = tuple[str, int]  # file name, number


class Spool:
    """The verified chunks of the checkpoint at `key`, in `handles` (file name → local file) or, with None, forgotten
    once they are verified."""

    def __init__(self, store: ObjectStore, key: Path, manifest: Manifest, handles: Mapping[str, int] | None) -> None:
        self.key, self._store, self._manifest, self._handles = key.as_posix(), store, manifest, handles
        self._have: set[Chunk] = set()
        self._lock = threading.Lock()
        self._free: Callable[[], object] = lambda: None
        self.downloaded_bytes = 0
        self.closed = False

    @classmethod
    def local(cls, store: ObjectStore, key: Path, manifest: Manifest, folder: Path | None) -> Spool:
        """One with files in `folder` that vanish with this process."""
        handles: dict[str, int] = {}
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            for name, record in manifest.files.items():
                with tempfile.TemporaryFile(dir=folder) as file:
                    handles[name] = os.dup(file.fileno())
                os.ftruncate(handles[name], record.nbytes)
        except OSError as error:
            for handle in handles.values():
                os.close(handle)
            raise _no_room(error) from error
        made = cls(store, key, manifest, handles)
        made._free = weakref.finalize(made, _close, list(handles.values()))  # also when nobody closes it
        return made

    def fetch(self, chunks: Iterable[Chunk], on_bytes: Callable[[int], None] = lambda nbytes: None) -> None:
        """Have these chunks here. `BadCheckpoint` where one is missing or damaged, or cannot be had now."""
        with self._lock:
            todo = [chunk for chunk in dict.fromkeys(chunks) if chunk not in self._have]
            if not todo:
                return
            with ThreadPoolExecutor(min(DOWNLOADS, len(todo)), thread_name_prefix="undertow-download") as pool:
                jobs = [pool.submit(self._fetch_one, chunk) for chunk in todo]
                try:
                    for job in jobs:
                        on_bytes(job.result())
                finally:
                    for job in jobs:
                        job.cancel()

    def _fetch_one(self, chunk: Chunk) -> int:
        name, index = chunk
        record, begin = self._manifest.files[name], index * self._manifest.chunk_bytes
        nbytes = min(self._manifest.chunk_bytes, record.nbytes - begin)
        where = f"{self._store.url}/{self.key}/{name}"
        try:
            data = self._store.get_range(f"{self.key}/{name}", begin, nbytes)
        except OSError as error:
            raise BadCheckpoint(f"{where} cannot be read ({error.strerror})") from error
        if len(data) != nbytes or checksum(data) != record.chunks[index]:
            raise BadCheckpoint(f"{where} is damaged in bytes [{begin}, {begin + nbytes})")
        if self._handles is not None:
            try:
                _write(self._handles[name], data, begin)
            except OSError as error:
                raise _no_room(error) from error
            self._have.add(chunk)
        self.downloaded_bytes += nbytes
        return nbytes

    def span(self, name: str, begin: int, end: int) -> list[Chunk]:
        """The chunks that hold bytes [begin, end) of a file."""
        size = self._manifest.chunk_bytes
        return [(name, index) for index in range(begin // size, -(-end // size))] if end > begin else []

    def read(self, name: str, begin: int, nbytes: int) -> bytearray:
        assert self._handles is not None
        data = bytearray(nbytes)
        view = memoryview(data)
        while view:
            count = os.preadv(self._handles[name], [view], begin)
            view, begin = view[count:], begin + count
        return data

    def map(self, name: str, begin: int, nbytes: int) -> memoryview:
        """A private mapping of bytes that have been fetched: each is new, so that none is older than a chunk in it."""
        assert self._handles is not None
        first = begin - begin % mmap.ALLOCATIONGRANULARITY
        whole = mmap.mmap(self._handles[name], begin - first + nbytes, access=mmap.ACCESS_COPY, offset=first)
        return memoryview(whole)[begin - first :]

    def close(self) -> None:
        """Give the files' room back; a new one is needed then."""
        self._free()
        self._handles, self.closed = None, True


class BucketReader(Reader):
    """The `Reader` of a checkpoint in a bucket; `path` is for messages. What `shard` and `object` need is fetched when
    they are called, or all at once before, by `fetch`."""

    def __init__(self, path: Path, manifest: Manifest, spool: Spool) -> None:
        super().__init__(path, manifest)
        self.spool = spool
        self._fetched = False

    def fetch(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Fetch what will fill `targets`, and no more; from now on `shard` fetches nothing itself."""
        chunks: dict[Chunk, None] = {}
        for item, shard in items_of(targets, self.manifest):
            width = dtype_of(self.manifest.tensors[item.storage_index.fqn].dtype).itemsize
            first, last = _range_of(shard.sizes, item.storage_offsets, item.lengths)
            found = self.spool.span(shard.file, shard.payload + first * width, shard.payload + last * width)
            chunks |= dict.fromkeys(found)
        self.spool.fetch(chunks)
        self._fetched = True

    def shard(self, key: str, shard: ShardRecord) -> torch.Tensor:
        dtype = dtype_of(self.manifest.tensors[key].dtype)
        count = math.prod(shard.sizes)
        if count == 0:
            return torch.empty(shard.sizes, dtype=dtype)
        nbytes = count * dtype.itemsize
        if not self._fetched:
            self.spool.fetch(self.spool.span(shard.file, shard.payload, shard.payload + nbytes))
        take = self.spool.read if nbytes < SMALL else self.spool.map
        return torch.frombuffer(take(shard.file, shard.payload, nbytes), dtype=dtype, count=count).view(shard.sizes)

    def close(self) -> None:
        self.spool.close()

    def object(self, key: str, allowed: Sequence[type] = ()) -> Any:
        record = self.manifest.objects[key]
        self.spool.fetch(self.spool.span(record.file, record.start, record.start + record.length))
        return load_object(bytes(self.spool.read(record.file, record.start, record.length)), key, self.path, allowed)


def check_stored(store: ObjectStore, path: Path, manifest: Manifest) -> None:
    """Every object is there and as long as the manifest says, and has checksums."""
    try:
        found = store.list(path.as_posix())
    except OSError as error:
        raise BadCheckpoint(f"{store.url}/{path} cannot be listed ({error.strerror})") from error
    for name, record in manifest.files.items():
        if name not in found:
            raise BadCheckpoint(f"{store.url}/{path}/{name} is missing")
        if found[name][0] != record.nbytes:
            raise BadCheckpoint(
                f"{store.url}/{path}/{name} has {found[name][0]} bytes; its manifest says {record.nbytes}"
            )
        if record.nbytes and not record.chunks:
            raise BadCheckpoint(f"{store.url}/{path}/{name} has no checksums")


def download(
    store: ObjectStore,
    path: Path,
    manifest: Manifest,
    folder: Path,
    *,
    keys: Collection[str] | None = None,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Put the checkpoint's files into the local `folder`, or only what the tensors and objects `keys` need: the rest
    are holes then. For tools that read folders."""
    handles: dict[str, int] = {}
    try:
        for name, record in manifest.files.items():
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            handles[name] = os.open(folder / name, flags, 0o666)
            os.ftruncate(handles[name], record.nbytes)
        spool = Spool(store, path, manifest, handles)
        if keys is None:
            chunks = [(name, at) for name, record in manifest.files.items() for at in range(len(record.chunks))]
        else:
            spans = [shard for key in keys if key in manifest.tensors for shard in manifest.tensors[key].shards]
            spans += [manifest.objects[key] for key in keys if key in manifest.objects]
            chunks = [c for span in spans for c in spool.span(span.file, span.start, span.start + span.length)]
        spool.fetch(chunks, on_bytes)
        for handle in handles.values():
            os.fsync(handle)
    finally:
        for handle in handles.values():
            with suppress(OSError):
                os.close(handle)


def _range_of(sizes: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]) -> tuple[int, int]:
    """From the first to behind the last element of a part of a row-major box."""
    if not math.prod(lengths):
        return 0, 0
    first = last = 0
    for size, offset, length in zip(sizes, offsets, lengths):
        first, last = first * size + offset, last * size + offset + length - 1
    return first, last + 1


def _write(handle: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(handle, data, offset)
        data, offset = data[count:], offset + count


def _close(handles: Iterable[int]) -> None:
    for handle in handles:
        os.close(handle)


def _no_room(error: OSError) -> UserError:
    """The trouble is here and not in the store: no reason to set a checkpoint aside."""
    need = "; a rank needs room there for what it downloads" if error.errno == errno.ENOSPC else ""
    return UserError(
        f"cannot keep what a restore downloads ({error.strerror}{need})",
        expected="a folder for checkpoints, or for temporary files, with room",
    )
