"""Who sees whom, as intervals: documents packed into a row, padding on either side, never a mask tensor.

Every mask that is streamed has the form "query i sees the keys of one interval that ends at i, or earlier": causal,
packed documents, padding, a sliding window. So a row is a list of segments, and a chunk of queries becomes a list of
spans, each one dense or causal block of attention. Keys of other documents are never touched, which is where packed
rows save time. A mask with holes has no such form and is refused.

Padding follows torch's scaled_dot_product_attention with a boolean mask: queries before the first real token see
nothing (output zero), queries after the last one see all real tokens. The one exception: with a sliding window the
latter see nothing; their output matters only if somebody trains on padding.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .protocol import Unsupported


@dataclass(frozen=True)
class Segment:
    """Queries start ≤ i < stop see keys keys_start ≤ j < min(i + 1, keys_stop)."""

    start: int
    stop: int
    keys_start: int
    keys_stop: int


@dataclass(frozen=True)
class Span:
    """Queries [q0, q1) of batch row `row` against keys [k0, k1); `causal` aligns the last query with the last key."""

    row: int
    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool


@dataclass(frozen=True)
class Layout:
    """The visibility of one batch: `rows[b]` covers tokens 0 … tokens - 1 in order."""

    tokens: int
    rows: tuple[tuple[Segment, ...], ...]

    @classmethod
    def dense(cls, batch: int, tokens: int) -> Layout:
        """Plain causal attention."""
        return cls(tokens, ((Segment(0, tokens, 0, tokens),),) * batch)

    @property
    def batch(self) -> int:
        return len(self.rows)

    @cached_property
    def is_dense(self) -> bool:
        return all(row == (Segment(0, self.tokens, 0, self.tokens),) for row in self.rows)

    @cached_property
    def _stops(self) -> tuple[list[int], ...]:
        return tuple([segment.stop for segment in row] for row in self.rows)

    def spans(self, q0: int, q1: int, window: int | None = None, row: int | None = None) -> list[Span]:
        """The blocks that queries q0 … q1 - 1 need, of all rows or of one; queries in no span see nothing."""
        found = []
        for b in range(self.batch) if row is None else (row,):
            for segment in self.rows[b][bisect_right(self._stops[b], q0) :]:
                if segment.start >= q1:
                    break
                first, last = max(q0, segment.start), min(q1, segment.stop)
                if segment.keys_start >= segment.keys_stop:
                    continue
                if segment.keys_stop >= segment.stop:
                    low = segment.keys_start if window is None else max(segment.keys_start, first - window + 1)
                    found.append(Span(b, first, last, low, last, causal=True))
                elif window is None:
                    found.append(Span(b, first, last, segment.keys_start, segment.keys_stop, causal=False))
        return found

    def sees(self, row: int, query: int, window: int | None = None) -> tuple[int, int]:
        """The keys [low, high) that one query sees; (0, 0) for none."""
        for span in self.spans(query, query + 1, window, row):
            return span.k0, span.k1
        return 0, 0

    def pairs(self, window: int | None = None) -> int:
        """How many (query, key) pairs are visible: the work of attention, for planners and reports."""
        total = 0
        for span in self.spans(0, self.tokens, window):
            queries, keys = span.q1 - span.q0, span.k1 - span.k0
            if not span.causal:
                total += queries * keys
                continue
            reach = keys if window is None else min(window, keys)
            total += reach * (reach + 1) // 2 + (queries - reach) * reach
        return total


def read(batch: int, tokens: int, attention_mask: Tensor | None, positions: Tensor | None) -> Layout:
    """The layout that these two tensors mean, by the rules of transformers.

    `attention_mask` [B, T], non-zero for real tokens; where it is given, `positions` says nothing about documents.
    Without it, a position in `positions` ([B, T] or [1, T]) that is not its left neighbour's plus one starts a
    document. One copy to the host. Raises `Unsupported` for masks of more dimensions and for masks with holes.
    """
    if attention_mask is not None:
        return _padded(batch, tokens, attention_mask)
    if positions is None or positions.shape[-1] != tokens or positions.dim() not in (1, 2):
        return Layout.dense(batch, tokens)
    positions = positions.reshape(-1, tokens)
    restarts = (positions[:, 1:] != positions[:, :-1] + 1).nonzero().tolist()
    if not restarts:
        return Layout.dense(batch, tokens)
    starts: list[list[int]] = [[0] for _ in range(positions.shape[0])]
    for row, before in restarts:
        starts[row].append(before + 1)
    rows = [tuple(Segment(a, b, a, b) for a, b in zip(s, [*s[1:], tokens])) for s in starts]
    return Layout(tokens, tuple(rows * batch if len(rows) == 1 else rows))


def _padded(batch: int, tokens: int, mask: Tensor) -> Layout:
    if mask.dim() != 2 or mask.shape[1] != tokens:
        raise Unsupported(f"attention_mask of shape {tuple(mask.shape)}: only [batch, tokens] padding masks are read")
    real = mask != 0
    edges = torch.stack((real.int().argmax(1), tokens - real.flip(1).int().argmax(1), real.sum(1))).tolist()
    rows = []
    for low, high, count in zip(*edges):
        if count == 0:
            rows.append((Segment(0, tokens, 0, 0),))
            continue
        if high - low != count:
            raise Unsupported("attention_mask with masked tokens between real ones")
        row = [Segment(0, low, 0, 0)] if low else []
        row.append(Segment(low, high, low, high))
        if high < tokens:
            row.append(Segment(high, tokens, low, high))
        rows.append(tuple(row))
    rows = rows * batch if len(rows) == 1 else rows
    return Layout(tokens, tuple(rows))
