"""The comparison with rivals' own code: bytes, memory and error of each, and a reason where one cannot run."""

from __future__ import annotations

import torch

from undertow.benchmarks.token_ring_rivals import WAYS, measure
from undertow.comms.builders.attention_shape import Heads

HERE = ["torch's ring, all-to-all", "its zigzag ring, in our executor", "undertow ring_kv", "undertow token_ring"]
ROWS = 16


def _rows(rank, world):
    torch.set_num_threads(1)
    return [measure(way, Heads(1, 4, 4, 8, 8), ROWS) for way in [*HERE, "ring-flash-attention"]]


def test_rivals_and_ours_are_exact_and_their_bytes_add_up(ranks):
    """Two ranks: the ring sends K, V once, then K, V and dK, dV; torch sends dK, dV once more, to bring them home."""
    for rows in ranks(2, _rows):
        *found, absent = rows
        assert set(HERE) < set(WAYS) and absent.reason and not absent.sent_bytes
        for row in found:
            assert not row.reason and max(row.errors) < 1e-5 and row.peak_bytes > 0, row
        torchs, plain, ours, _ = (row.sent_bytes / (ROWS * 4 * 8 * 4) for row in found)
        assert (torchs, plain) == (8, 6) and ours <= plain
