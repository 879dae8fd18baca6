"""How a rank gets the bytes that it needs of a save in memory, verified before anything is written into the state.

What lies on its machine is only read; what does not is fetched once for the machine, into its memory. Every chunk is
compared with the manifest's checksum, and one that is damaged is replaced by another copy's.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..dist.errors import PeerLost
from .manifest import BadCheckpoint, Manifest, checksum
from .partner_crew import name_of
from .partner_holder import read
from .partner_memory import OPS, READ
from .partner_survey import Candidate, Copy
from .partner_tier import PartnerTier
from .partner_wire import Link
from .reader import Reader, dtype_of
from .restore import items_of

FETCHERS = 4  # threads, with a connection each, per rank
LOCKS = 64  # chunks that may be fetched at one time for a machine
OWN, HELD, FAR = 1, 2, 3  # where a chunk came from
SOURCES = {OWN: "memory of this machine", HELD: "partner copies on this machine", FAR: "memory of other machines"}


class MemoryReader(Reader):
    """Reads one candidate: `gather` brings and verifies what a rank needs, then tensors come as views, as ever."""

    def __init__(self, tier: PartnerTier, candidate: Candidate, manifest: Manifest, *, timeout_s: float) -> None:
        here = tier.coordinator
        super().__init__(tier.memory.root / f"{READ}{here.token}-{here.round}", manifest)
        self._tier, self._candidate, self._timeout_s = tier, candidate, timeout_s
        self._here = tier.crew.leaders[here.rank]
        self._threads = threading.local()
        self._links: list[Link] = []
        self._seen: dict[str, int] = {}
        self._lock = threading.Lock()
        self.origin: Counter[str] = Counter()

    # -- what is needed -----------------------------------------------------------------------------------------------

    def spans(self, targets: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, int, int]]:
        """(file, begin, end) of the boxes that fill `targets`."""
        for item, shard in items_of(targets, self.manifest):
            width = dtype_of(self.manifest.tensors[item.storage_index.fqn].dtype).itemsize
            first = last = 0  # elements of the box that is asked for, in the row-major shard
            for offset, length, size in zip(item.storage_offsets, item.lengths, shard.sizes):
                first, last = first * size + offset, last * size + offset + length - 1
            yield shard.file, shard.payload + first * width, shard.payload + (last + 1) * width

    def gather(self, spans: Iterable[tuple[str, int, int]]) -> None:
        """Have the chunks of `spans` on this machine, verified. `BadCheckpoint` where no copy of one is good."""
        size = self.manifest.chunk_bytes
        wanted: dict[tuple[str, int], None] = {}
        for file, begin, end in spans:
            for chunk in range(begin // size, -(-end // size)):
                wanted[(file, chunk)] = None
        if not wanted:
            return
        try:
            OPS.mkdir(self.path)
            lists = [list(wanted)[part::FETCHERS] for part in range(FETCHERS)]
            with ThreadPoolExecutor(FETCHERS, thread_name_prefix="undertow-gather") as pool:
                list(pool.map(self._bring_all, lists))
        except OSError as error:
            raise BadCheckpoint(f"cannot bring step {self.manifest.step} from memory ({error})") from error
        finally:
            for link in self._links:
                link.close()
            for handle in self._seen.values():
                os.close(handle)
            self._links, self._seen, self._threads = [], {}, threading.local()

    def _bring_all(self, chunks: Sequence[tuple[str, int]]) -> None:
        for file, chunk in chunks:
            self._bring(file, chunk)

    # -- one chunk ----------------------------------------------------------------------------------------------------

    def _bring(self, file: str, chunk: int) -> None:
        """Make one chunk good, once for all ranks of this machine: a byte of a file beside it says so."""
        with self._lock:
            if file not in self._seen:
                self._seen[file] = os.open(self.path / f"{file}.seen", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            seen = self._seen[file]
        with _locked(self.path / f"lock-{chunk % LOCKS}"):
            mark = os.pread(seen, 1, chunk)
            origin = mark[0] if mark else 0
            if not origin:
                origin = self._make_good(file, chunk)
                os.pwrite(seen, bytes([origin]), chunk)
        begin, end = self._range(file, chunk)
        with self._lock:
            self.origin[SOURCES[origin]] += end - begin

    def _range(self, file: str, chunk: int) -> tuple[int, int]:
        size = self.manifest.chunk_bytes
        return chunk * size, min((chunk + 1) * size, self.manifest.files[file].nbytes)

    def _make_good(self, file: str, chunk: int) -> int:
        record, (begin, end) = self.manifest.files[file], self._range(file, chunk)
        target, bad = self.place(file), []
        for copy in sorted(self._candidate.copies[file], key=lambda copy: (copy.leader != self._here, not copy.own)):
            near = copy.leader == self._here
            try:
                data = self._read(copy, file, begin, end - begin)
                if checksum(data) != record.chunks[chunk]:
                    raise BadCheckpoint("is damaged")
            except (OSError, PeerLost, BadCheckpoint, ValueError) as error:
                where = name_of(self._tier.crew.places[copy.leader])
                bad.append(f"{'its rank' if copy.own else 'its partner'}'s on {where}: {error}")
                continue
            if not near or bad or target != self._tier.memory.path(copy.entry, file):
                self._write(target, data, begin, record.nbytes)
            return (OWN if copy.own else HELD) if near else FAR
        raise BadCheckpoint(f"bytes [{begin}, {end}) of {file} are good in no copy ({'; '.join(bad)})")

    def _read(self, copy: Copy, file: str, begin: int, nbytes: int) -> Any:
        if copy.leader == self._here:
            return read(self._tier.memory, copy.entry, file, begin, nbytes)
        data = bytearray(nbytes)
        with memoryview(data) as view:
            head = {"do": "read", "entry": copy.entry, "file": file, "begin": begin, "nbytes": nbytes}
            self._link(copy.leader).read(head, view)
        return data

    def _link(self, leader: int) -> Link:
        """This thread's connection to a machine's leader."""
        links = self._threads.__dict__.setdefault("links", {})
        if leader not in links:
            links[leader] = self._tier.crew.link(leader, purpose="read", timeout_s=self._timeout_s)
            self._links.append(links[leader])
        links[leader].start()
        return links[leader]

    @staticmethod
    def _write(path: Path, data: Any, begin: int, nbytes: int) -> None:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(handle).st_size < nbytes:
                os.ftruncate(handle, nbytes)
            OPS.pwrite(handle, data, begin)
        finally:
            os.close(handle)

    def place(self, file: str) -> Path:
        """Where this rank reads a file: where it lies on this machine, or where it is brought to."""
        near = [copy for copy in self._candidate.copies[file] if copy.leader == self._here]
        return self._tier.memory.path(near[0].entry, file) if near else self.path / file

    def _map(self, name: str) -> mmap.mmap:
        if name not in self._maps:
            with open(self.place(name), "rb") as file:
                self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[name]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the processes and threads of this machine. Not `lockf`, which takes threads for a deadlock."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
