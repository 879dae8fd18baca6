"""The attention schedules by name: what each moves and by which routes; and plain problems to simulate them on.

`routes_of` and `moves_of` are the whole difference between the schedules; masks and layouts come in through the needs.
The two kinds of needs here are the even ones, full and causal zigzag, for the catalogue of `undertow simulate`;
`parallel.token_ring.problem` makes those of any mask.
"""

from __future__ import annotations

import math

from ...dist.errors import UserError
from ..schedule import Schedule
from .attention import attention
from .attention_shape import Heads, Need, Shape
from .attention_totals import Totals, totals
from .routes import Route, direct, ring, two_level

SCHEDULES = {
    "ring_kv": "keys and values go round a ring",
    "ring_kv_bookended": "ring_kv that begins and ends with half of the local block",
    "ring_kv_joined": "ring_kv, two arrivals to a block where they are needed by the same queries",
    "ring_kv_bidirectional": "half of the keys and values go round each way",
    "token_ring": "queries go round a ring, results straight home",
    "token_ring_bookended": "token_ring that begins and ends with half of the local block",
    "all_gather_kv": "all keys and values to all ranks at once",
    "all_gather_kv_joined": "all_gather_kv, all arrivals (backward: four) that the same queries need in one block",
    "need_only_kv": "keys and values straight to the ranks that need them",
    "need_only_q": "queries straight to the ranks that need them, results straight home",
    "double_ring": "keys and values: a ring of nodes, and a ring inside each",
    "ulysses": "all-to-all of heads before and after",
    "ulysses_ring": "heads within small teams, keys and values round a ring of teams",
    "ulysses_token": "heads within small teams, queries round a ring of teams",
}
MOVING_QUERIES = ("token_ring", "token_ring_bookended", "need_only_q", "ulysses_token")
BOOKENDED = ("ring_kv_bookended", "token_ring_bookended")
HALVES = {"ring_kv_bidirectional": "all", **dict.fromkeys(BOOKENDED, "local")}  # which needs are cut into two
# The most arrivals in one block, forward and backward: gradients of keys go home when their block ends, so the last
# block of a long list would leave nothing to hide that behind.
JOINED = {"ring_kv_joined": (2, 2), "all_gather_kv_joined": (1 << 30, 4)}


def moves_of(name: str) -> str:
    return "q" if name in MOVING_QUERIES else "kv"


def routes_of(name: str, size: int, *, causal: bool, node: int = 0) -> list[list[Route]]:
    """The routes to try between `size` teams, best by bytes. Under a causal mask the direction of a ring decides how
    many rows may stay behind early. `node`: ranks per node of a double ring; 0 takes the divisor nearest to the root.
    """
    if name == "ring_kv_bidirectional":
        return [[ring(size), ring(size, -1)]]
    if name.startswith("all_gather_kv"):
        return [[direct(size, buffers=0, narrow=False)]]
    if name in ("need_only_kv", "need_only_q"):
        return [[direct(size)]]
    if name == "double_ring":
        near = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
        return [[two_level(size, node or near)]]
    ways = [1, -1] if causal and size > 2 else [1]
    return [[ring(size, way, buffers=2 * max(JOINED.get(name, (1,))))] for way in ways]


def best_routes(
    name: str, shape: Shape, *, causal: bool, backward: bool, node: int = 0
) -> tuple[list[Route], list[Totals]]:
    """The routes whose busiest rank sends least, and the totals of each rank."""
    choices = routes_of(name, len(shape.q_rows) // shape.inner, causal=causal, node=node)
    plans = [(routes, totals(shape, routes, moves_of(name), backward=backward)) for routes in choices]
    return min(plans, key=lambda plan: max(total.sent_bytes for total in plan[1]))


def even_needs(
    size: int, rows: int, *, causal: bool, halves: str = "", layout: str = "zigzag"
) -> dict[tuple[int, int], tuple[Need, ...]]:
    """Of equal shards of `rows` (even): a full mask, or a causal one over zigzag (or, uncut, contiguous) shards."""
    if rows % 2:
        raise UserError(f"{rows} rows in zigzag halves", expected="an even number")
    if causal and layout == "contiguous":
        triangle = (Need(0, rows, 0, rows, rows * (rows + 1) // 2),)
        square = (Need(0, rows, 0, rows, rows * rows),)
        return {(i, j): triangle if i == j else square for i in range(size) for j in range(i + 1)}

    def need(i: int, j: int, k0: int, k1: int) -> Need:
        keys = k1 - k0
        if not causal:
            return Need(0, rows, k0, k1, rows * keys)
        if i == j:  # a triangle of the shard's own rows; its second half of keys is a triangle of half the rows
            low, high = ((n * (n + 1)) // 2 for n in (rows - k1, rows - k0))
            return Need(0, rows, k0, k1, high - low)
        if i > j:  # the early half of the keys only
            seen = max(0, min(k1, rows // 2) - k0)
            return Need(0, rows, k0, k0 + seen, rows * seen) if seen else Need(0, 0, k0, k0, 0)
        return Need(rows // 2, rows, k0, k1, rows // 2 * keys)

    found = {}
    for i in range(size):
        for j in range(size):
            reach = rows // 2 if causal and i > j else rows
            cut = halves == "all" or (halves == "local" and i == j)
            edges = [0, reach // 2, reach] if cut else [0, reach]
            found[i, j] = tuple(need(i, j, a, b) for a, b in zip(edges, edges[1:]))
    return found


def even_attention(
    name: str, world: int, rows: int, heads: Heads, *, causal: bool, backward: bool = False, inner: int = 1
) -> Schedule:
    """The schedule called `name` over `world` equal shards of `rows`; `inner` ranks exchange heads."""
    if world % inner or rows % 2:
        raise UserError(
            f"{world} ranks of {rows} rows, {inner} exchange heads", expected="a divisor, and an even number"
        )
    size = world // inner
    needs = even_needs(size, rows * inner, causal=causal, halves=HALVES.get(name, ""))
    shape = Shape((rows,) * world, (rows,) * world, heads, needs, inner, JOINED.get(name, (1, 1)))
    routes, _ = best_routes(name, shape, causal=causal, backward=backward)
    return attention(name, shape, routes, moves=moves_of(name), backward=backward, bookends=name in BOOKENDED)
