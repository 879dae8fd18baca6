"""Memory on the device for the end of the state, which then need not have left when the optimizer writes.

The link to host memory may be too slow for the time before the optimizer's step, and the arena too small. A copy within
the device is quick beside both, so the last chunks are parked there first, and leave from there when they can, even
while the optimizer writes. One save at a time uses the memory: the next one parks when all copies out of it have been
issued, which it then follows on the copies' stream, or when the save before has failed and nobody needs its bytes.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
import torch

from ..dist.log import get_logger, warn_once
from ..dist.units import format_bytes
from .copies import HostCopier
from .layout import Image, PieceTable

log = get_logger(__name__)


def first_parked(image: Image, device_bytes: int) -> int:
    """From which chunk on `device_bytes` hold the rest of `image`. Chunks with eager bytes are never parked: those have
    been copied already, into memory of their own."""
    eager = -(-image.eager_bytes // image.chunk_bytes)
    return max(eager, -(-(image.size - device_bytes) // image.chunk_bytes))


@dataclass
class Parking:
    """One save's use of `memory`, where the payloads of chunks `first`, `first` + 1, … lie as they do in the image.
    `left` is set when it needs the memory no more, and must be in any case; `before` are those of the saves before."""

    first: int
    memory: torch.Tensor
    chunk_bytes: int
    before: tuple[threading.Event, ...]
    left: threading.Event = field(default_factory=threading.Event)

    def free(self, *, wait: bool) -> bool:
        """Whether the saves before need the memory no more; with `wait` it returns when they do not."""
        return all(left.wait(None if wait else 0) for left in self.before)

    def places(self, table: PieceTable, rows: slice) -> np.ndarray:
        """The addresses of pieces of parked chunks."""
        chunks = table.chunk[rows] - self.first
        return self.memory.data_ptr() + chunks * self.chunk_bytes + table.chunk_offset[rows]


class Park:
    """At most `wanted_bytes` of the device, taken from torch's allocator when a save first needs them."""

    def __init__(self, wanted_bytes: int) -> None:
        self._wanted_bytes = wanted_bytes
        self.drop()

    def drop(self) -> None:
        """Give the memory back, as soon as the copies' stream is done with it; another image may follow."""
        self._memory: torch.Tensor | None = None
        self._refused = False
        self._lent: list[threading.Event] = []  # the `left` of saves that may need it still

    def parked_bytes(self, image: Image, copier: HostCopier) -> int:
        """How much of `image` is parked; nothing where copies are done at once, since there the state is no farther."""
        if not copier.queues or self._refused:
            return 0
        return max(0, image.size - first_parked(image, self._wanted_bytes) * image.chunk_bytes)

    def explain(self, image: Image, copier: HostCopier) -> str:
        """How much is parked, or why nothing is; '' where nothing was asked for."""
        if not self._wanted_bytes:
            return ""
        if nbytes := self.parked_bytes(image, copier):
            count = image.chunks - first_parked(image, self._wanted_bytes)
            return f"  device  the last {count} of {image.chunks} chunks, {format_bytes(nbytes)}, are parked there"
        if not copier.queues:
            return "  device  nothing is parked there (device_bytes): the state is in host memory"
        why = "so much is not free" if self._refused else "not one whole chunk of lazy tensors fits"
        return f"  device  nothing is parked there: {why} (device_bytes {format_bytes(self._wanted_bytes)})"

    def lend(self, image: Image, copier: HostCopier) -> Parking | None:
        """For a save of `image` that begins now; `copier.begin` comes after it. None where nothing is to be parked, or
        the device is full."""
        if not (nbytes := self.parked_bytes(image, copier)):
            return None
        if self._memory is None:
            try:
                self._memory = torch.empty(nbytes, dtype=torch.uint8, device=copier.device)
            except torch.OutOfMemoryError:
                self._refused = True
                warn_once(log, "%s are not free on the device: saves go on without device_bytes", format_bytes(nbytes))
                return None
            copier.keep(self._memory)
        first, before = first_parked(image, self._wanted_bytes), [left for left in self._lent if not left.is_set()]
        parking = Parking(first, self._memory, image.chunk_bytes, tuple(before))
        self._lent = [*before, parking.left]
        return parking
