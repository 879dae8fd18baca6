"""Host memory between the copies and the flush: a fixed number of chunk-sized slots, taken and given back in turn.

The memory is page-aligned (direct I/O writes from it), in huge pages where the kernel has them (a write of 16 MiB is
then made of fewer pieces), touched once at the start so that no save pays for page faults, and registered with CUDA
when there is a device, so that copies into it are asynchronous. When every slot is taken, `await_room` waits: a
budget smaller than the state costs waiting at the fence, never a failure.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import numpy as np
import torch

from ..dist.errors import UserError
from ..dist.log import get_logger, warn_once
from ..dist.units import format_bytes
from .cuda_runtime import CudaRuntime

log = get_logger(__name__)


class Memory(Protocol):
    """Where a snapshot's chunks are put: an `Arena`, or a host-memory tier's generation."""

    chunk_bytes: int
    address: int  # of slot 0; the others follow

    @property
    def framed(self) -> bool:
        """Whether no slot lacks the bytes around payloads."""
        ...

    def reserve(self, count: int) -> list[int]:
        """Room for up to `count` chunks, none if there is none now."""
        ...

    def await_room(self) -> None:
        """Return when there may be room: when some was given back, or soon."""
        ...

    def places(self, rooms: Sequence[int], first: int) -> Sequence[int]:
        """The slots of the image's chunks `first`, `first` + 1, … in the rooms that `reserve` gave."""
        ...

    def lacks_frames(self, slot: int) -> bool:
        """Whether the bytes around payloads must be laid down: not where a slot held the same chunk of the same plan
        before. Asking counts as having done it."""
        ...

    def release(self, slot: int) -> None: ...

    def slot_address(self, slot: int) -> int: ...

    def view(self, slot: int, nbytes: int) -> memoryview: ...


class Arena:
    """`slots` buffers of `chunk_bytes`. Thread-safe. Call `close` when nothing is in flight any more."""

    framed = False

    def __init__(self, budget_bytes: int, chunk_bytes: int, *, pinned: bool) -> None:
        self.chunk_bytes = chunk_bytes
        self.slots = max(2, -(-budget_bytes // chunk_bytes))
        try:
            self._memory = mmap.mmap(-1, self.slots * chunk_bytes)
        except (OSError, ValueError, OverflowError) as error:
            raise UserError(
                f"cannot allocate a checkpoint arena of {format_bytes(self.slots * chunk_bytes)} ({error})",
                expected="free host memory of that size",
                remedy="pass a smaller arena_bytes (a quarter of the state works; saves then wait at the fence)",
            ) from error
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(self._memory, dtype=np.uint8)
        self._bytes[:: mmap.PAGESIZE] = 0
        self.address = self._bytes.ctypes.data
        self._unpin = register(self, self.address, self._bytes.nbytes) if pinned else None
        self._free = deque(range(self.slots))
        self.peak = 0  # most slots in use at one time; whoever reads it may set it back
        self._changed = threading.Condition()
        self._closed = False

    @property
    def nbytes(self) -> int:
        return self.slots * self.chunk_bytes

    @property
    def occupied(self) -> int:
        """Slots in use now."""
        return self.slots - len(self._free)

    def reserve(self, count: int) -> list[int]:
        """Up to `count` free slots."""
        with self._changed:
            if self._closed:
                raise RuntimeError("the checkpoint arena is closed")
            taken = [self._free.popleft() for _ in range(min(count, len(self._free)))]
            self.peak = max(self.peak, self.occupied)
            return taken

    def await_room(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._closed, timeout=0.01)

    def places(self, rooms: Sequence[int], first: int) -> Sequence[int]:
        return rooms

    def lacks_frames(self, slot: int) -> bool:
        return True

    def release(self, slot: int) -> None:
        with self._changed:
            self._free.append(slot)
            self._changed.notify_all()

    def slot_address(self, slot: int) -> int:
        return self.address + slot * self.chunk_bytes

    def view(self, slot: int, nbytes: int) -> memoryview:
        """The slot's first `nbytes`, without a copy."""
        begin = slot * self.chunk_bytes
        return memoryview(self._memory)[begin : begin + nbytes]

    def close(self) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        if self._unpin is not None:
            self._unpin()


def register(owner: object, address: int, nbytes: int) -> Callable[[], None] | None:
    """Pin [address, address + nbytes) for CUDA as long as `owner` lives; how to end that sooner, or None and a warning
    when the driver refuses (a limit on locked memory): copies then block the training thread."""
    torch.cuda.init()
    code = CudaRuntime().register(address, nbytes)
    if code:
        warn_once(log, "host memory could not be pinned (CUDA error %d): checkpoint copies will block training", code)
        return None
    return weakref.finalize(owner, CudaRuntime().unregister, address)


def copy_bytes(target: int, source: int | bytes, nbytes: int) -> None:
    """memcpy to an address from an address or bytes; releases the interpreter lock while it runs."""
    ctypes.memmove(target, source, nbytes)
