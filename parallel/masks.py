"""Which keys a query sees, as arithmetic on spans: from two shards and a mask to a few plain kernel calls.

Every mask here is a band within a document: the key's position at most the query's (causal), and at least so far
behind it (window). Between two spans of one stride a band stays a band, whatever the layout: row t sees rows t + low
to t + high. `tiles` cuts it until each piece is one that flash kernels know: full, causal with its last query at its
last key (perhaps with a window), or the same read backwards, for the far end of a window. No mask tensor is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..dist.errors import UserError
from .partition import Span, document_bounds

FULL, CAUSAL, BACKWARDS = "full", "causal", "backwards"


@dataclass(frozen=True)
class Tile:
    """Query rows q0:q1 against key rows k0:k1 of two shards. `kind` 'causal': the last query stands at the last key,
    and sees `window` keys (None: all before); 'backwards': causal once both are reversed."""

    q0: int
    q1: int
    k0: int
    k1: int
    kind: str = FULL
    window: int | None = None

    @property
    def area(self) -> int:
        """Pairs that the mask shows."""
        rows, keys = self.q1 - self.q0, self.k1 - self.k0
        if self.kind == FULL:
            return rows * keys
        seen = [keys - rows + 1, keys]  # the first and the last query see so many, without a window
        if self.window is None or self.window >= seen[1]:
            return rows * (seen[0] + seen[1]) // 2
        short = max(0, self.window - seen[0])
        return rows * self.window - short * (short + 1) // 2


@dataclass(frozen=True)
class Mask:
    """`causal`: the last query of a document stands at its last key. `window` w: a query sees w keys up to itself.

    `prefix`: keys before it are seen by all queries. `cu_seqlens_q`, `cu_seqlens_k`: bounds of packed documents, which
    do not see each other.
    """

    causal: bool = False
    window: int | None = None
    prefix: int = 0
    cu_seqlens_q: tuple[int, ...] | None = None
    cu_seqlens_k: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.window is not None and (not self.causal or self.window < 1):
            raise UserError(f"window {self.window} with causal={self.causal}", expected="a window ≥ 1, and causal=True")
        if self.prefix and (not self.causal or self.window is not None or self.cu_seqlens_q is not None):
            raise UserError("a prefix without causal, or with window or cu_seqlens", expected="prefix and causal alone")
        if self.prefix < 0:
            raise UserError(f"prefix {self.prefix}", expected="at least 0")

    def documents(self, lq: int, lk: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """(queries, keys) of each document, as (start, stop)."""
        if self.cu_seqlens_q is None:
            return [((0, lq), (0, lk))]
        queries = document_bounds(self.cu_seqlens_q, lq)
        keys = document_bounds(self.cu_seqlens_k or self.cu_seqlens_q, lk)
        if len(queries) != len(keys):
            raise UserError(f"{len(queries)} documents of queries, {len(keys)} of keys", expected="as many")
        return list(zip(queries, keys))


def tiles(q_spans: Sequence[Span], k_spans: Sequence[Span], mask: Mask, lq: int, lk: int) -> tuple[Tile, ...]:
    """The kernel calls that a shard of queries makes on a shard of keys; each visible pair is in exactly one."""
    found: list[Tile] = []
    for (q_start, q_stop), (k_start, k_stop) in mask.documents(lq, lk):
        shift = k_stop - q_stop  # position of a query among the keys
        keys = list(_within(k_spans, k_start, k_stop, mask.prefix))
        for q_row, q in _within(q_spans, q_start, q_stop):
            for k_row, k in keys:
                stride = q.stride if q.count > 1 else k.stride
                if q.count > 1 and k.count > 1 and q.stride != k.stride:
                    raise UserError("queries and keys in layouts of different strides", remedy="use one layout")
                behind = q.start + shift - k.start
                open_ = not mask.causal or k.start + (k.count - 1) * k.stride < mask.prefix
                high = None if open_ else behind // stride
                low = None if mask.window is None else (behind - mask.window) // stride + 1
                found += _band(q_row, q_row + q.count, k_row, k_row + k.count, low, high)
    return tuple(_fused(found))


def _fused(found: list[Tile]) -> list[Tile]:
    """Tiles that together are one that kernels know become that one: fewer calls, and fewer merges of their results.

    A zigzag shard against itself is two triangles and the square between them, which is one triangle of all its rows.
    """
    left: dict[int, Tile] = dict(enumerate(found))  # by place, so that the order stays
    again = True
    while again:
        again = False
        full = {at: t for at, t in left.items() if t.kind == FULL}
        beside = {(t.q0, t.q1, t.k0): at for at, t in full.items()}
        below = {(t.k0, t.k1, t.q0): at for at, t in full.items()}
        corner = {(t.q0, t.k1 - t.q1): at for at, t in left.items() if t.kind == CAUSAL and t.window is None}
        for at, tile in list(left.items()):
            if left.get(at) != tile or tile.kind not in (FULL, CAUSAL) or tile.window is not None:
                continue
            if tile.kind == CAUSAL:
                parts = [at, corner.get((tile.q1, tile.k1 - tile.q1), -1)]
                other = left.get(parts[1], tile)
                parts.append(beside.get((other.q0, other.q1, tile.k0), -1))
                square = left.get(parts[2], tile)
                fits = (tile.q1, tile.k1 - tile.q1) == (other.q0, other.k1 - other.q1) and square == Tile(
                    other.q0, other.q1, tile.k0, other.k0
                )
                whole = Tile(tile.q0, other.q1, tile.k0, other.k1, CAUSAL)
            else:
                parts = [at, beside.get((tile.q0, tile.q1, tile.k1), below.get((tile.k0, tile.k1, tile.q1), -1))]
                other = left.get(parts[1], tile)
                fits = other in (Tile(tile.q0, tile.q1, tile.k1, other.k1), Tile(tile.q1, other.q1, tile.k0, tile.k1))
                whole = Tile(tile.q0, other.q1, tile.k0, other.k1)
            if fits and len(set(parts)) == len(parts) and all(part in left for part in parts):
                for part in parts:
                    del left[part]
                left[min(parts)] = whole
                again = True
    return [left[at] for at in sorted(left)]


def _within(spans: Sequence[Span], start: int, stop: int, cut: int = 0) -> Iterator[tuple[int, Span]]:
    """(row, span) of the positions `start` ≤ p < `stop`, split at position `cut`."""
    row = 0
    for span in spans:
        edges = [start, *([cut] if start < cut < stop else []), stop]
        at = [min(span.count, max(0, -(-(edge - span.start) // span.stride))) for edge in edges]
        for a, b in zip(at, at[1:]):
            if a < b:
                yield row + a, Span(span.start + a * span.stride, b - a, span.stride)
        row += span.count


def _band(q0: int, q1: int, k0: int, k1: int, low: int | None, high: int | None) -> list[Tile]:
    """Cut the band t + low ≤ s ≤ t + high of query rows t and key rows s, both counted from 0, into tiles."""
    if low is not None and high is not None and low > high:  # a window narrower than the stride
        return []
    if high is not None:  # rows that see nothing yet, keys that nobody sees any more
        skip = max(0, -high)
        q0, high, low = q0 + skip, high + skip, None if low is None else low + skip
        k1 = min(k1, k0 + q1 - q0 + high)
    if low is not None:
        q1 = min(q1, q0 + k1 - k0 - low)
        skip = max(0, low)
        k0, low, high = k0 + skip, low - skip, None if high is None else high - skip
    if high is not None:
        k1 = min(k1, k0 + q1 - q0 + high)
    rows, keys = q1 - q0, k1 - k0
    if rows <= 0 or keys <= 0:
        return []
    if high is not None and high >= keys - 1:
        high = None
    if low is not None and rows - 1 + low <= 0:
        low = None
    if high is not None:
        aligned = keys - high
        if aligned < rows:
            rest = None if low is None else low + aligned
            return [*_band(q0, q0 + aligned, k0, k1, low, high), *_band(q0 + aligned, q1, k0, k1, rest, None)]
        return [Tile(q0, q1, k0, k1, CAUSAL, None if low is None else high - low + 1)]
    if low is not None:
        if low < 0:
            return [Tile(q0, q0 - low, k0, k1), *_band(q0 - low, q1, k0, k1, 0, None)]
        return [Tile(q0, q1, k0, k1, BACKWARDS)]
    return [Tile(q0, q1, k0, k1)]
