"""A file as `torch.save` writes it, whose tensors leave the device later: for frameworks that name their own files.

`torch.load` and the framework's converters read the result. What may change at once is copied at once: everything that
is not a tensor, and every tensor for which `lazy` says no. The others are copied in the background and must not be
written before `fence`; samples before and after tell when somebody did.
"""

from __future__ import annotations

import copy
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash

from .attempt import SaveLost
from .copies import HostCopier, copier_for
from .layout import CHUNK_BYTES
from .manifest import FileRecord, checksum
from .sample import Sampler
from .seal import Seal

Keys = tuple[Any, ...]  # the keys on the way to a value


class HostBuffers:
    """Host memory kept from save to save, pinned where there is a GPU: allocating it anew costs more than the copy."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, bool], list[torch.Tensor]] = {}
        self._lock = threading.Lock()

    def take(self, nbytes: int, *, pinned: bool) -> torch.Tensor:
        with self._lock:
            free = self._free.get((nbytes, pinned))
            if free:
                return free.pop()
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)

    def give_back(self, buffer: torch.Tensor, *, pinned: bool) -> None:
        with self._lock:
            self._free.setdefault((buffer.numel(), pinned), []).append(buffer)


class LazyFile:
    """The file `path` of `state`, a nesting of dicts, lists and tuples. `lazy(keys)` says which tensors may leave late.

    When this returns the copies have begun. Then `copy` and `write` on one background thread, and `fence` on the
    training thread before anyone writes.
    """

    def __init__(self, path: Path, state: Any, lazy: Callable[[Keys], bool], buffers: HostBuffers) -> None:
        self.path, self._lazy, self._buffers = path, lazy, buffers
        self._held: list[tuple[torch.Tensor, bool]] = []
        self._pairs: deque[tuple[torch.Tensor, torch.Tensor]] = deque()  # (host, source), still to be copied
        self._seen: dict[Any, torch.Tensor] = {}
        self._copied = threading.Condition()
        self._judging = threading.Lock()
        self._copying = 0
        self.tensor_bytes = 0
        self._state = self._host(state, ())
        sources = [source for _, source in self._pairs]
        self._copier: HostCopier = copier_for(sources)
        self._seal = Seal(0, sources, Sampler(sources)) if sources else None
        self._moved = False
        self._copier.begin()
        if self._copier.device.type == "cuda":  # queueing is cheap, and the stream does the waiting
            with self._copier.side():
                while self._copy_one():
                    pass
        self._mark = self._copier.mark()

    def _host(self, value: Any, keys: Keys) -> Any:
        if isinstance(value, torch.Tensor):
            return self._host_tensor(value, keys)
        if type(value) in (dict, OrderedDict):
            pairs = [(key, self._host(item, (*keys, key))) for key, item in value.items()]
            return OrderedDict(pairs) if type(value) is OrderedDict else dict(pairs)
        if type(value) in (list, tuple):
            items = [self._host(item, (*keys, index)) for index, item in enumerate(value)]
            return tuple(items) if type(value) is tuple else items
        return copy.deepcopy(value)

    def _host_tensor(self, value: torch.Tensor, keys: Keys) -> torch.Tensor:
        value = value.detach()
        strided = value.layout == torch.strided and not value.is_quantized and value.numel() > 0
        if not (strided and value.is_contiguous() and self._lazy(keys)):
            return value.to("cpu", copy=True)
        place = (value.data_ptr(), value.dtype, tuple(value.shape))
        if place not in self._seen:  # tied weights are written once
            nbytes, pinned = value.numel() * value.element_size(), value.is_cuda
            buffer = self._buffers.take(nbytes, pinned=pinned)
            self._held.append((buffer, pinned))
            self._seen[place] = buffer.view(value.dtype).view(value.shape)
            self._pairs.append((self._seen[place], value))
            self.tensor_bytes += nbytes
        return self._seen[place]

    def _copy_one(self) -> bool:
        with self._copied:
            if not self._pairs:
                return False
            host, source = self._pairs.popleft()
            self._copying += 1
        try:
            host.copy_(source, non_blocking=True)
        finally:
            with self._copied:
                self._copying -= 1
                self._copied.notify_all()
        return True

    def copy(self) -> None:
        """In the background: copy what has not left yet."""
        while self._copy_one():
            pass

    def fence(self) -> None:
        """On the training thread: what it does next cannot change the file."""
        self.copy()
        with self._copied:
            self._copied.wait_for(lambda: not self._copying)
        with self._judging:
            self._copier.order_after(self._mark)
            self._judge()

    def _judge(self) -> None:
        """Sample again, unless that is done: nobody has been allowed to write yet."""
        if self._seal is not None and self._seal.verdict is None:
            self._moved = self._seal.moved()
            self._seal.sample(self._copier)

    def write(self) -> FileRecord:
        """In the background: write `path` with the suffix .part, durably. `SaveLost` if torn."""
        self.copy()
        with self._judging, self._copier.side():
            self._judge()
            self._mark = self._copier.mark()  # a fence that comes now lets the samples be taken first
        self._copier.wait(self._mark)
        if self._seal is not None and self._seal.verdict is not None:
            flag, mark = self._seal.verdict
            self._copier.wait(mark)
            if self._moved or bool(flag):
                raise SaveLost(f"{self.path.name}: the state was written while it was being copied")
        with _Hashing(self.part) as file:
            self._dump(self._state, file)
            return file.finish()

    def _dump(self, state: Any, file: Any) -> None:
        torch.save(state, file)

    @property
    def part(self) -> Path:
        return self.path.with_name(self.path.name + ".part")

    def release(self) -> None:
        """Give the host memory back."""
        self._state = None
        for buffer, pinned in self._held:
            self._buffers.give_back(buffer, pinned=pinned)
        self._held.clear()


class _Hashing:
    """A file object that sums up each chunk while it is written."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        self._digest, self._room, self._nbytes = xxhash.xxh3_128(), CHUNK_BYTES, 0
        self._sums: list[str] = []

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        count = len(view)
        while view:
            piece = view[: self._room]
            self._digest.update(piece)
            written = 0
            while written < len(piece):
                written += os.write(self._handle, piece[written:])
            self._room -= len(piece)
            self._nbytes += len(piece)
            view = view[len(piece) :]
            if not self._room:
                self._cut()
        return count

    def flush(self) -> None:
        """Nothing is buffered."""

    def _cut(self) -> None:
        self._sums.append(self._digest.hexdigest())
        self._digest, self._room = xxhash.xxh3_128(), CHUNK_BYTES

    def finish(self) -> FileRecord:
        if self._room < CHUNK_BYTES:
            self._cut()
        os.fsync(self._handle)
        return FileRecord(self._nbytes, tuple(self._sums))

    def __enter__(self) -> _Hashing:
        return self

    def __exit__(self, *unused: object) -> None:
        os.close(self._handle)


def sum_file(path: Path) -> FileRecord:
    """The record of a file that somebody else wrote, made durable."""
    sums = []
    with open(path, "rb") as file:
        while data := file.read(CHUNK_BYTES):
            sums.append(checksum(data))
        os.fsync(file.fileno())
        return FileRecord(file.tell(), tuple(sums))


def check_file(path: Path, record: FileRecord) -> str:
    """What is wrong with the file, or ''."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size != record.nbytes:
                return f"{path.name} has {os.fstat(file.fileno()).st_size} bytes instead of {record.nbytes}"
            for index, expected in enumerate(record.chunks):
                if checksum(file.read(CHUNK_BYTES)) != expected:
                    return f"chunk {index} of {path.name} is damaged"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return ""
