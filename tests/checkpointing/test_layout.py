"""The image of a shard file: pieces, frames and eager part cover every byte exactly once, whatever the sizes."""

from __future__ import annotations

import random

import numpy as np
import torch

from undertow.checkpointing.frames import frame
from undertow.checkpointing.layout import PAGE, WORD, place

DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.float64, torch.int64, torch.bool)


SHAPES = ((), (0,), (1,), (17,), (39, 3), (5, 33), (40, 40), (0, 7), (2000,))  # few, because torch makes each frame


def random_frames(rng: random.Random, prefix: str, count: int):
    return [(f"{prefix}{i}", frame(rng.choice(SHAPES), rng.choice(DTYPES))) for i in range(count)]


def test_every_byte_of_the_image_comes_from_one_place(seed):
    rng = random.Random(seed)
    for _ in range(60):
        chunk_bytes = PAGE * rng.choice((1, 2, 5))
        eager, lazy = random_frames(rng, "e", rng.randrange(6)), random_frames(rng, "l", rng.randrange(6))
        image = place(eager, lazy, chunk_bytes=chunk_bytes)
        writes = np.zeros(image.size, dtype=np.int32)
        writes[: image.eager_bytes] += 1
        payloads = [rng.randbytes(framed.nbytes) for _, framed in lazy]
        built = bytearray(image.size)
        for chunk in range(image.chunks):
            begin, end = image.chunk_range(chunk)
            assert 0 < end - begin <= chunk_bytes
            for offset, data in image.static[chunk]:
                writes[begin + offset : begin + offset + len(data)] += 1
                built[begin + offset : begin + offset + len(data)] = data
            for piece in image.pieces[chunk]:
                assert piece.chunk_offset + piece.nbytes <= end - begin
                writes[begin + piece.chunk_offset : begin + piece.chunk_offset + piece.nbytes] += 1
                data = payloads[piece.item][piece.source_offset : piece.source_offset + piece.nbytes]
                built[begin + piece.chunk_offset : begin + piece.chunk_offset + piece.nbytes] = data
        assert (writes == 1).all()
        for placed, payload in zip(image.lazy, payloads):
            assert bytes(built[placed.start : placed.end]) == placed.frame.prefix + payload + placed.frame.suffix


def test_payloads_are_aligned_and_archives_do_not_overlap(seed):
    rng = random.Random(seed)
    for _ in range(60):
        image = place(random_frames(rng, "e", 7), random_frames(rng, "l", 7), chunk_bytes=PAGE)
        assert all(placed.payload % WORD == 0 for placed in image.eager)
        assert all(placed.payload % PAGE == 0 for placed in image.lazy)
        ends = [0]
        for placed in (*image.eager, *image.lazy):
            assert placed.start >= ends[-1]
            ends.append(placed.end)
        assert image.size == ends[-1]
        for placed, chunk in zip(image.lazy, image.last_chunk):
            if placed.frame.nbytes:
                begin, end = image.chunk_range(chunk)
                assert begin < placed.payload + placed.frame.nbytes <= end
