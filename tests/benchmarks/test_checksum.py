"""The checksums that are timed are the published ones: known answers, and one call equals any stream of pieces."""

from __future__ import annotations

import random

import pytest

from undertow.benchmarks import checksum

# CRC-32's check value, FIPS 180-4's and RFC 7693's examples, and XXH3_128 of the empty input with seed 0.
KNOWN = {
    "crc32 (zlib)": (b"123456789", 0xCBF43926),
    "sha256": (b"abc", bytes.fromhex("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")),
    "blake2b": (
        b"abc",
        bytes.fromhex(
            "ba80a53f981c4d0d6a2797b69f12f6e94c212f14685ac4b74b12bb6fdbffa2d1"
            "7d87c5392aab792dc252d5de4533cc9518d38aa8dbf1925ab92386edd4009923"
        ),
    ),
    "xxh3_128": (b"", bytes.fromhex("99aa06d3014798d86001c324468d497f")),
}


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_known_answers(name):
    algorithm = next(a for a in checksum.algorithms() if a.name == name)
    data, digest = KNOWN[name]
    assert algorithm.whole(data) == digest
    assert algorithm.pieces([data]) == digest


def test_one_call_equals_any_pieces(seed):
    rng = random.Random(seed)
    data = rng.randbytes(5000)
    cuts = sorted(rng.randrange(5000) for _ in range(9))
    parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, 5000])]
    for algorithm in checksum.algorithms():
        assert algorithm.whole(data) == algorithm.pieces(parts), algorithm.name


def test_every_bit_counts(seed):
    rng = random.Random(seed)
    data = bytearray(rng.randbytes(1000))
    for algorithm in checksum.algorithms():
        before = algorithm.whole(bytes(data))
        place = rng.randrange(1000)
        data[place] ^= 1 << rng.randrange(8)
        assert algorithm.whole(bytes(data)) != before, algorithm.name


def test_read_words(seed):
    data = random.Random(seed).randbytes(800)
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, 800, 8)]
    assert checksum.read_words(data) == sum(words) % 2**64


def test_the_trial_is_right_about_itself(seed):
    trial = checksum.trial(8192, seed)
    for arm in trial.arms:
        if not arm.unavailable:
            assert arm.reference is not None and arm.run() == arm.reference()
    ours = next(arm for arm in trial.arms if arm.name == "xxh3_128")
    assert len(ours.run()) == 16 and ours.predicted_s is not None and ours.predicted_s > 0
