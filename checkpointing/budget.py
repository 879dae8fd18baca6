"""How much memory the bytes of a save may take on their way: the arena in host memory, the park on the device.

The arena is made with a plan; with a host-memory tier, when a save first needs it, since most runs never do.
"""

from __future__ import annotations

import psutil

from ..dist.errors import UserError
from .arena import Arena
from .layout import Image
from .park import Park


class Budget:
    """`wanted_bytes` of host memory: None takes the whole image, or half of what is free where that is less.
    `device_bytes`: what the park may have of the device."""

    def __init__(self, wanted_bytes: int | None, device_bytes: int = 0) -> None:
        self._wanted_bytes = wanted_bytes
        self.park = Park(device_bytes)
        self._arena: Arena | None = None
        self._proven = False

    @property
    def made(self) -> bool:
        """Whether the arena is there."""
        return self._arena is not None

    def of(self, image: Image) -> int:
        """The bytes that an arena for `image` has."""
        return min(self._wanted_bytes or psutil.virtual_memory().available // 2, image.size)

    def arena(self, image: Image, *, pinned: bool) -> Arena:
        """The arena for a save of `image` that begins now; `drop` comes before another image. `UserError` when the
        first one cannot be had, `MemoryError` later, in mid-run."""
        if self._arena is None:
            try:
                self._arena = Arena(self.of(image), image.chunk_bytes, pinned=pinned)
            except UserError as error:
                if self._proven:
                    raise MemoryError(str(error)) from error
                raise
            self._proven = True
        self._arena.peak = self._arena.occupied
        return self._arena

    @property
    def peak_bytes(self) -> int:
        """The most that was on its way at one time since the last save began."""
        return 0 if self._arena is None else self._arena.peak * self._arena.chunk_bytes

    def drop(self) -> None:
        """Free the arena and the park; nothing may be in flight."""
        self.park.drop()
        if self._arena is not None:
            self._arena.close()
            self._arena = None
