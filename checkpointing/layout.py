"""Where each byte of a rank's shard file comes from: a pure plan that copy, flush and restore all read.

The file is an image made of fixed chunks (16 MiB: the unit of arena slots, checksums and writes). It starts with the
*eager* part, small tensors and everything that may change during forward, packed tightly; then the *lazy* tensors in
the order in which the optimizer will touch them, each payload at an offset that is a multiple of 4 KiB so that it can
be mapped or read directly. Nothing here touches a tensor's data, a file or a clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .frames import Frame

CHUNK_BYTES = 16 * 2**20
PAGE = 4096
WORD = 64  # torch reads payloads at any offset; 64 keeps every dtype aligned


@dataclass(frozen=True)
class Placed:
    """One tensor in the image: its archive is bytes [start, start + frame.size), its data starts at `payload`."""

    key: str
    start: int
    frame: Frame

    @property
    def payload(self) -> int:
        return self.start + len(self.frame.prefix)

    @property
    def end(self) -> int:
        return self.start + self.frame.size


@dataclass(frozen=True)
class Piece:
    """`nbytes` bytes at `source_offset` of lazy tensor `item` land at `chunk_offset` of a chunk."""

    item: int
    source_offset: int
    chunk_offset: int
    nbytes: int


@dataclass(frozen=True)
class PieceTable:
    """All pieces of an image, one entry of each array per piece; those of chunk c are [starts[c], starts[c + 1])."""

    item: np.ndarray
    source_offset: np.ndarray
    chunk_offset: np.ndarray
    nbytes: np.ndarray
    chunk: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class Image:
    """A shard file. `eager` and `lazy` are placed tensors; the eager part ends at `eager_bytes`."""

    eager: tuple[Placed, ...]
    lazy: tuple[Placed, ...]
    eager_bytes: int
    size: int
    chunk_bytes: int = CHUNK_BYTES

    @property
    def chunks(self) -> int:
        return -(-self.size // self.chunk_bytes)

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """The image offsets [begin, end) of a chunk; the last one is shorter."""
        begin = chunk * self.chunk_bytes
        return begin, min(begin + self.chunk_bytes, self.size)

    @cached_property
    def pieces(self) -> tuple[tuple[Piece, ...], ...]:
        """For each chunk, the slices of lazy tensors that lie in it, in image order."""
        table: list[list[Piece]] = [[] for _ in range(self.chunks)]
        for item, placed in enumerate(self.lazy):
            for chunk, offset, begin, nbytes in self._cut(placed.payload, placed.frame.nbytes):
                table[chunk].append(Piece(item, begin, offset, nbytes))
        return tuple(map(tuple, table))

    @cached_property
    def table(self) -> PieceTable:
        """`pieces` as arrays, for copying many at once."""
        rows = [(p.item, p.source_offset, p.chunk_offset, p.nbytes) for chunk in self.pieces for p in chunk]
        item, source_offset, chunk_offset, nbytes = np.array(rows, dtype=np.int64).reshape(-1, 4).T
        lengths = [len(chunk) for chunk in self.pieces]
        chunk = np.repeat(np.arange(self.chunks), lengths)
        starts = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        return PieceTable(item, source_offset, chunk_offset, nbytes, chunk, starts)

    @cached_property
    def static(self) -> tuple[tuple[tuple[int, bytes], ...], ...]:
        """For each chunk, the (chunk_offset, bytes) around lazy payloads: frames, and zeros in the gaps between."""
        table: list[list[tuple[int, bytes]]] = [[] for _ in range(self.chunks)]
        position = self.eager_bytes
        for placed in self.lazy:
            before = bytes(placed.start - position) + placed.frame.prefix
            for start, data in ((position, before), (placed.payload + placed.frame.nbytes, placed.frame.suffix)):
                for chunk, offset, begin, nbytes in self._cut(start, len(data)):
                    table[chunk].append((offset, data[begin : begin + nbytes]))
            position = placed.end
        return tuple(map(tuple, table))

    @cached_property
    def last_chunk(self) -> tuple[int, ...]:
        """For each lazy tensor, the chunk that holds its last byte."""
        return tuple((placed.payload + max(placed.frame.nbytes, 1) - 1) // self.chunk_bytes for placed in self.lazy)

    def _cut(self, start: int, nbytes: int) -> Iterator[tuple[int, int, int, int]]:
        """Cut [start, start + nbytes) at chunk borders: (chunk, offset in chunk, offset in the range, length)."""
        done = 0
        while done < nbytes:
            chunk, offset = divmod(start + done, self.chunk_bytes)
            length = min(self.chunk_bytes - offset, nbytes - done)
            yield chunk, offset, done, length
            done += length


def place(
    eager: Sequence[tuple[str, Frame]], lazy: Sequence[tuple[str, Frame]], *, chunk_bytes: int = CHUNK_BYTES
) -> Image:
    """Lay out (key, frame) lists in the given order."""
    if chunk_bytes % PAGE:
        raise ValueError(f"chunk_bytes {chunk_bytes} must be a multiple of {PAGE}")
    position, placed_eager, placed_lazy = 0, [], []
    for key, frame in eager:
        position = _payload_aligned(position, frame, WORD)
        placed_eager.append(Placed(key, position, frame))
        position = placed_eager[-1].end
    eager_bytes = position
    for key, frame in lazy:
        position = _payload_aligned(position, frame, PAGE)
        placed_lazy.append(Placed(key, position, frame))
        position = placed_lazy[-1].end
    return Image(tuple(placed_eager), tuple(placed_lazy), eager_bytes, position, chunk_bytes)


def _payload_aligned(position: int, frame: Frame, alignment: int) -> int:
    """The first start ≥ `position` at which the payload's offset is a multiple of `alignment`."""
    return position + (-(position + len(frame.prefix))) % alignment
