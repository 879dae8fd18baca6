"""Layouts against written-out masks: random documents, padding, windows; every chunk, every pair of tokens."""

import random

import pytest
import torch

from undertow.parallel.stream.layout import Layout, Segment, read
from undertow.parallel.stream.protocol import Unsupported, documents_of


def mask_of(layout, window=None):
    """[B, T, T] bool from the spans of chunks of random sizes."""
    seen = torch.zeros(layout.batch, layout.tokens, layout.tokens, dtype=torch.bool)
    start = 0
    while start < layout.tokens:
        stop = min(layout.tokens, start + random.randint(1, 9))
        for span in layout.spans(start, stop, window):
            for q in range(span.q0, span.q1):
                high = span.k1 - (span.q1 - 1 - q) if span.causal else span.k1
                low = span.k0 if window is None else max(span.k0, q - window + 1)
                assert not seen[span.row, q].any(), "a query in two spans"
                seen[span.row, q, low:high] = True
        start = stop
    return seen


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_packed_documents(window, seed):
    for _ in range(20):
        batch, tokens = random.randint(1, 3), random.randint(1, 40)
        positions = torch.zeros(batch, tokens, dtype=torch.long)
        for row in positions:
            step = 0
            for t in range(tokens):
                step = 0 if random.random() < 0.15 else step + (t > 0)
                row[t] = step
        documents = documents_of(positions)
        at = torch.arange(tokens)
        expected = (documents[:, :, None] == documents[:, None, :]) & (at[:, None] >= at)
        if window is not None:
            expected &= at[:, None] - at < window
        layout = read(batch, tokens, None, positions)
        assert torch.equal(mask_of(layout, window), expected)
        assert layout.pairs(window) == expected.sum()


@pytest.mark.parametrize("side", ["left", "right", "both", "none", "all"])
def test_padding_is_what_torch_computes_with_a_boolean_mask(side, seed):
    tokens = 17
    mask = torch.ones(3, tokens, dtype=torch.long)
    for row in mask:
        if side in ("left", "both"):
            row[: random.randint(0, 8)] = 0
        if side in ("right", "both"):
            row[tokens - random.randint(0, 8) :] = 0
        if side == "all":
            row[:] = 0
    at = torch.arange(tokens)
    expected = (at[:, None] >= at)[None] & (mask[:, None, :] != 0)
    layout = read(3, tokens, mask, None)
    assert torch.equal(mask_of(layout), expected)
    assert layout.is_dense == bool(mask.all())


def test_masks_without_interval_form_are_refused():
    holes = torch.tensor([[1, 1, 0, 1]])
    with pytest.raises(Unsupported, match="between real ones"):
        read(1, 4, holes, None)
    with pytest.raises(Unsupported, match="padding masks"):
        read(1, 4, torch.ones(1, 1, 4, 4), None)


def test_a_chunk_touches_no_key_of_another_document():
    layout = read(1, 100, None, torch.arange(100)[None] % 10)
    spans = layout.spans(35, 60)
    assert [(s.q0, s.q1, s.k0, s.k1) for s in spans] == [(35, 40, 30, 40), (40, 50, 40, 50), (50, 60, 50, 60)]
    assert layout.pairs() == 10 * 55


def test_dense_and_positions_that_do_not_apply():
    assert Layout.dense(2, 5).rows[1] == (Segment(0, 5, 0, 5),)
    assert read(2, 5, None, torch.arange(5)[None] + 7).is_dense
    assert read(2, 5, None, None).is_dense
