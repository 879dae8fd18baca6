"""Which checksum a checkpoint can afford: xxh3_128 against what the standard library and one rival offer.

Checkpoints are hashed on the CPU while the training step runs, so every byte hashed takes time from the data loader and
the flush. Plain is zlib.crc32, which needs no dependency. The arm `read` only adds up the words: what it costs to bring
the bytes to the core at all, and so the ceiling for any checksum. The prediction is a roofline: bytes over the smaller
of the algorithm's rate on a small buffer that stays in cache and the rate of `read` on another buffer of this size.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median
from typing import Any

import numpy as np
import xxhash

from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Trial

MIB = 2**20
IN_CACHE_BYTES = MIB // 16
PIECE = 1_000_003  # the reference feeds pieces of this odd size, so that no piece but the first starts aligned


@dataclass(frozen=True)
class Checksum:
    """An algorithm: in one call over a buffer, and as a stream of pieces."""

    name: str
    whole: Callable[[Any], Any]
    pieces: Callable[[Sequence[Any]], Any]


def _folded(step: Callable[[Any, int], int]) -> Callable[[Sequence[Any]], int]:
    def pieces(parts: Sequence[Any]) -> int:
        value = 0
        for part in parts:
            value = step(part, value)
        return value

    return pieces


def _hashed(new: Callable[[], Any]) -> Callable[[Sequence[Any]], bytes]:
    def pieces(parts: Sequence[Any]) -> bytes:
        state = new()
        for part in parts:
            state.update(part)
        return state.digest()

    return pieces


def read_words(buffer: Any) -> int:
    """The sum of the buffer's 64-bit words, modulo 2^64; its length is a multiple of 8. numpy's call costs some µs."""
    return int(np.frombuffer(buffer, dtype=np.uint64).sum(dtype=np.uint64))


def algorithms() -> list[Checksum]:
    found = [
        Checksum("crc32 (zlib)", zlib.crc32, _folded(zlib.crc32)),
        Checksum("xxh3_128", xxhash.xxh3_128_digest, _hashed(xxhash.xxh3_128)),
        Checksum("sha256", lambda data: hashlib.sha256(data).digest(), _hashed(hashlib.sha256)),
        Checksum("blake2b", lambda data: hashlib.blake2b(data).digest(), _hashed(hashlib.blake2b)),
    ]
    try:
        crc32c = importlib.import_module("crc32c").crc32c
    except ImportError:
        return found
    return [*found, Checksum("crc32c", crc32c, _folded(crc32c))]


@lru_cache
def rate(whole: Callable[[Any], Any], nbytes: int, runs: int) -> float:
    """Bytes per second of `whole` over one buffer used again and again; the median of `runs`."""
    buffer, times = np.ones(nbytes, np.uint8), []  # written once: untouched pages would all be one page, in cache
    for _ in range(runs + 1):
        start = time.perf_counter()
        whole(buffer)
        times.append(time.perf_counter() - start)
    return nbytes / median(times[1:])


def predicted_s(whole: Callable[[Any], Any], nbytes: int) -> float:
    return nbytes / min(rate(whole, IN_CACHE_BYTES, 51), rate(read_words, nbytes, 9))


def cases(context: Context) -> list[Case]:
    sizes = [MIB, 64 * MIB] if context.quick else [MIB // 4, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB]
    return [
        Case(
            name=f"{size // 1024} KiB" if size < MIB else f"{size // MIB} MiB",
            build=lambda size=size: trial(size, context.seed),
            plain="crc32 (zlib)",
            ours="xxh3_128",
            hardware="read",
            nbytes=size,
        )
        for size in sizes
    ]


def trial(nbytes: int, seed: int) -> Trial:
    """The arms over one random buffer; each one's reference is its own streamed digest of oddly cut pieces."""
    data = np.random.default_rng(seed).bytes(nbytes)
    view = memoryview(data)
    parts = [view[i : i + PIECE] for i in range(0, nbytes, PIECE)]
    arms = [
        Arm(
            a.name,
            run=lambda a=a: a.whole(data),
            reference=lambda a=a: a.pieces(parts),
            predicted_s=predicted_s(a.whole, nbytes),
        )
        for a in algorithms()
    ]
    if all(arm.name != "crc32c" for arm in arms):
        arms.append(Arm.missing("crc32c", "the package crc32c is not installed"))
    words = np.frombuffer(data, dtype=np.uint64)
    read = Arm(
        "read",
        run=lambda: read_words(data),
        reference=lambda: int((words >> 32).sum()) * 2**32 % 2**64 + int((words & 0xFFFFFFFF).sum()) & 2**64 - 1,
    )
    return Trial([*arms, read], reference=lambda: None)


BENCHMARK = Benchmark(
    name="checksum",
    claim="xxh3_128 hashes a checkpoint near the speed of reading it",
    cases=cases,
    packages=("xxhash", "crc32c"),
    x_label="buffer",
)

if __name__ == "__main__":
    from undertow.benchmarks.cli import main

    sys.exit(main(["checksum", *sys.argv[1:]]))
