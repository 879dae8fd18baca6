"""What ring attention allocates while it runs, read off the schedule that it would run.

The schedule is `ring_kv`: for it these are the bytes that the executor allocates, neither more nor less
(`tests/parallel/test_stream_context.py` counts them), and no schedule that holds more is tried while streaming
(`token_ring.gate.lean`). What a CUDA kernel allocates for one block is added, for a block of all rows. Bytes grow with
the rows of a rank, so a short sequence tells those of any; from six ranks on they do not grow with the ranks. Schedules
want a row of all sequences of a batch together, so several sequences are copied first.
"""

from __future__ import annotations

from functools import lru_cache

from ...comms.builders.attention_shape import Heads
from ...comms.cost import buffer_bytes
from ..masks import Mask
from ..memory_model import DecoderShape
from ..token_ring.problem import Problem

ROWS = 64
NAMES = {2: "bfloat16", 4: "float32", 8: "float64"}


def ring_bytes(shape: DecoderShape, rows: int, ranks: int, *, batch: int = 1, kernel: bool = True) -> tuple[int, int]:
    """Bytes of one call's buffers, results among them, in forward and backward, for `rows` of one of `ranks`, which are
    those of `batch` sequences; of the rank that holds most. `kernel`: with what a CUDA kernel needs for a block."""
    forward, backward = _per_block(
        min(ranks, 6), shape.heads, shape.kv_heads, shape.head_dim, NAMES[shape.element_size]
    )
    e, exact = shape.element_size, max(4, shape.element_size)
    given = e * (shape.q + 2 * shape.kv) if batch > 1 else 0
    more = e * shape.q + 2 * exact * shape.heads if batch > 1 else 0  # dout, log-sum-exp, delta
    inside = _inside(shape) if kernel else (0, 0)
    return forward * rows // ROWS + rows * (given + inside[0]), backward * rows // ROWS + rows * (
        given + more + inside[1]
    )


def _inside(shape: DecoderShape) -> tuple[int, int]:
    """Bytes of a row: output and log-sum-exp; and in backward what stands in for the output, dq and its float32 sums,
    row sums, and dk and dv for each query head (FlashAttention-2, grouped heads) before those of the key heads."""
    e = shape.element_size
    wide = 2 * e * shape.q if shape.q != shape.kv else 0
    return e * shape.q + 4 * shape.heads, shape.q * (2 * e + 4) + wide + 2 * e * shape.kv + 4 * shape.heads


@lru_cache(maxsize=64)
def _per_block(ranks: int, heads: int, kv_heads: int, head_dim: int, dtype: str) -> tuple[int, int]:
    if ranks == 1:
        e = {name: size for size, name in NAMES.items()}[dtype]
        out = ROWS * heads * (head_dim * e + 4)
        return out, ROWS * head_dim * e * (heads + 2 * kv_heads)
    partial = "float64" if dtype == "float64" else "float32"
    length = ranks * ROWS
    problem = Problem(
        ranks, length, length, Heads(1, heads, kv_heads, head_dim, head_dim, dtype, partial, ""), Mask(True)
    )
    forward, backward = (
        max(buffer_bytes(problem.schedule("ring_kv", backward=phase), rank) for rank in range(ranks))
        for phase in (False, True)
    )
    return forward, backward
