"""Builders by name, each made from one number of bytes: what `undertow simulate NAME --bytes …` offers.

Shapes are fixed where a number of bytes does not say enough; they are printed with the list, and a schedule of any
other shape can be written to a file by its builder (`str(schedule)`) and simulated from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ...dist.errors import UserError
from ..schedule import Schedule
from .all_gather import ring_all_gather
from .all_to_all import all_to_all
from .attention_named import SCHEDULES, even_attention
from .attention_shape import Heads
from .gemm_reduce_scatter import gemm_reduce_scatter
from .peers import NAMES, PEERS, even_peer, exchanging
from .reduce_scatter import direct_reduce_scatter, ring_reduce_scatter
from .ring_attention import ring_attention

_DTYPE, _ITEM = "bfloat16", 2
_N, _K, _HEADS, _HEAD_DIM = 8192, 2048, 32, 128
ATTENTION_HEADS = Heads(1, _HEADS, _HEADS, _HEAD_DIM, _HEAD_DIM, _DTYPE)


@dataclass(frozen=True)
class Entry:
    """`build(world, rows)`; a row has `row_bytes`, and `nbytes` of the command line mean `meaning`."""

    build: Callable[[int, int], Schedule]
    row_bytes: int
    meaning: str


def _attention(name: str, backward: bool, world: int, rows: int) -> Schedule:
    """Teams that exchange heads are as large as the ranks allow; hybrids need a number of ranks that has a divisor."""
    even, inner = rows + rows % 2, exchanging(name, world, ATTENTION_HEADS)
    return even_attention(name, world, even, ATTENTION_HEADS, causal=True, backward=backward, inner=inner)


def _peer(way: str, backward: bool, world: int, rows: int) -> Schedule:
    return even_peer(way, world, rows + rows % 2, ATTENTION_HEADS, backward=backward)


CATALOG = {
    "ring_all_gather": Entry(lambda w, n: ring_all_gather(w, n, [], _DTYPE), _ITEM, "what one rank contributes"),
    "ring_reduce_scatter": Entry(
        lambda w, n: ring_reduce_scatter(w, n, [], _DTYPE), _ITEM, "the sum that one rank keeps"
    ),
    "direct_reduce_scatter": Entry(
        lambda w, n: direct_reduce_scatter(w, n, [], _DTYPE), _ITEM, "the sum that one rank keeps"
    ),
    "all_to_all": Entry(lambda w, n: all_to_all(w, n, [], _DTYPE), _ITEM, "what one rank sends to another"),
    "gemm_reduce_scatter": Entry(
        lambda w, n: gemm_reduce_scatter(w, n, _K, _N, _DTYPE, subchunks=4),
        _N * _ITEM,
        f"the sum that one rank keeps (rows of {_N}; x {_K} wide per rank; 4 subchunks)",
    ),
    "gemm_reduce_scatter_sequential": Entry(
        lambda w, n: gemm_reduce_scatter(w, n, _K, _N, _DTYPE, subchunks=4, overlap=False),
        _N * _ITEM,
        "as gemm_reduce_scatter; nothing is sent before the product is complete",
    ),
    "ring_attention": Entry(
        lambda w, n: ring_attention(w, n, q_heads=_HEADS, kv_heads=_HEADS, head_dim=_HEAD_DIM, dtype=_DTYPE),
        2 * _HEADS * _HEAD_DIM * _ITEM,
        f"K and V of one rank ({_HEADS} heads of {_HEAD_DIM}, queries alike)",
    ),
    "ring_attention_causal": Entry(
        lambda w, n: ring_attention(
            w, n, q_heads=_HEADS, kv_heads=_HEADS, head_dim=_HEAD_DIM, dtype=_DTYPE, causal=True
        ),
        2 * _HEADS * _HEAD_DIM * _ITEM,
        "as ring_attention, causal over contiguous chunks",
    ),
}
CATALOG |= {
    f"attention_{name}{'_backward' if backward else ''}": Entry(
        partial(_attention, name, backward),
        2 * _HEADS * _HEAD_DIM * _ITEM,
        f"{what}; causal over zigzag shards, size as ring_attention",
    )
    for name, what in SCHEDULES.items()
    for backward in (False, True)
}
CATALOG |= {
    f"peer_{name}{'_backward' if backward else ''}": Entry(
        partial(_peer, way, backward),
        2 * _HEADS * _HEAD_DIM * _ITEM,
        f"{way}: {PEERS[way].about}; modelled with the same kernels, causal, size as ring_attention",
    )
    for name, way in NAMES.items()
    for backward in (False, True)
}


def by_name(name: str, world: int, nbytes: int) -> Schedule:
    """The schedule `name` for `world` ranks and about `nbytes` (rounded to whole rows, at least one)."""
    if name not in CATALOG:
        raise UserError(f"no schedule is called '{name}'", expected=f"a file, or one of {', '.join(CATALOG)}")
    entry = CATALOG[name]
    return entry.build(world, max(1, round(nbytes / entry.row_bytes)))
