"""What ring attention allocates while it runs, read off the schedule that it would run.

The schedule is `ring_kv`, which most models take: for it these are the bytes that the executor allocates, neither more
nor less (`tests/parallel/test_stream_context.py` counts them). Others hold up to twice as much, and what a kernel needs
inside is not seen here. Bytes grow with the rows of a rank, so a short sequence tells those of any; from six ranks on
they do not grow with the ranks. Schedules want a row of all sequences of a batch together, so several sequences are
copied first.
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


def ring_bytes(shape: DecoderShape, rows: int, ranks: int, *, batch: int = 1) -> tuple[int, int]:
    """Bytes of one call's buffers, results among them, in forward and backward, for `rows` of one of `ranks`, which are
    those of `batch` sequences; of the rank that holds most."""
    forward, backward = _per_block(
        min(ranks, 6), shape.heads, shape.kv_heads, shape.head_dim, NAMES[shape.element_size]
    )
    e, exact = shape.element_size, max(4, shape.element_size)
    given = e * (shape.q + 2 * shape.kv) if batch > 1 else 0
    more = e * shape.q + 2 * exact * shape.heads if batch > 1 else 0  # dout, log-sum-exp, delta
    return forward * rows // ROWS + rows * given, backward * rows // ROWS + rows * (given + more)


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
