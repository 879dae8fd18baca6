"""The collectives that follow a product without overlap, on gloo: right, and by names that torch does not warn of."""

from __future__ import annotations

import warnings

import torch

from undertow.comms.cuda_collectives import all_gather_into, reduce_scatter_into


def _both(rank: int, world: int, sizes: tuple[int, ...]) -> None:
    rows, low = sum(sizes), sum(sizes[:rank])
    mine = slice(low, low + sizes[rank])
    y = torch.arange(3.0 * rows).view(rows, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = reduce_scatter_into(torch.empty(sizes[rank], 3), y * (rank + 1), sizes, None)
        whole = torch.full((rows, 3), float("nan"))
        all_gather_into(whole, y[mine].contiguous(), sizes, None)
    assert torch.equal(out, y[mine] * sum(range(1, world + 1)))
    assert torch.equal(whole, y)


def test_a_sum_and_a_gather_are_right_and_silent(ranks):
    ranks(3, _both, (2, 2, 2))
