"""The gradient of a shared vector: pieces by last sharer, sent at the last bump, the mean of all ranks on each."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch

from undertow.comms.shared_gradient import SharedGradient, sharing_plan
from undertow.dist.errors import UserError


def random_uses(size: int, count: int) -> list[torch.Tensor]:
    return [torch.randint(0, size, (random.randrange(0, 2 * size),)) for _ in range(count)]


def test_a_piece_is_complete_exactly_with_its_last_sharer(seed):
    for _ in range(30):
        size, count = random.randrange(1, 40), random.randrange(1, 6)
        uses = random_uses(size, count)
        plan = sharing_plan(size, uses)
        assert sorted(plan.place.tolist()) == list(range(size))
        for entry in range(size):
            readers = [number for number, use in enumerate(uses) if entry in use.tolist()]
            at = int(plan.place[entry])
            owners = [piece.owner for piece in plan.pieces if piece.low <= at < piece.high]
            assert owners == ([min(readers)] if readers else [])
        owners = [piece.owner for piece in plan.pieces]
        assert owners == sorted(owners, reverse=True), "pieces leave in the order of backward"
        for number, touched in enumerate(plan.touched):
            seen = {int(plan.place[entry]) for entry in uses[number].tolist()}
            assert all(any(piece.low <= at < piece.high for at in seen) for piece in touched)
        assert all(plan.need(piece) >= 1 for piece in plan.pieces)


def test_where_all_share_everything_nothing_can_leave_early():
    (piece,) = sharing_plan(6, [torch.randperm(6) for _ in range(3)]).pieces
    assert (piece.owner, piece.low, piece.high) == (0, 0, 6)
    with pytest.raises(UserError, match="outside a vector of 6"):
        sharing_plan(6, [torch.tensor([6])])


class Watched:
    """Two ranks' messages within one process: what rank 0 sends is recorded, what it awaits is a given tensor."""

    rank, world = 0, 2

    def __init__(self, other: torch.Tensor) -> None:
        self.other, self.at, self.sent = other, 0, []
        self.seen = threading.Semaphore(0)

    def post_send(self, rows: torch.Tensor, to: int, tag: int) -> Any:
        self.sent.append((tag, rows.clone()))
        self.seen.release()

    def post_recv(self, rows: torch.Tensor, source: int, tag: int) -> Any:
        rows.copy_(self.other[self.at : self.at + rows.numel()])
        self.at = (self.at + rows.numel()) % self.other.numel()

    def wait(self, handle: Any, timeout_s: float) -> None:
        pass

    def close(self) -> None:
        pass


def test_a_piece_leaves_while_earlier_layers_are_still_computed():
    """Layer 2 alone reads entries 4 and 5, layers 1 and 2 entry 3, all the rest: three pieces, one at each layer."""
    uses = [torch.tensor([0, 1, 2, 0]), torch.tensor([3, 0]), torch.tensor([4, 5, 3, 1])]
    messenger = Watched(torch.zeros(6))
    shared = SharedGradient(6, uses, messenger=messenger, timeout_s=240)
    for turn in (1, 2):  # epochs: a second backward begins at nothing
        shared.begin()
        shared.add(2, torch.tensor([1.0, 2.0, 3.0, 4.0]))
        assert messenger.seen.acquire(timeout=240)  # before any other layer has added
        assert len(messenger.sent) == 3 * turn - 2 and messenger.sent[-1][1].tolist() == [1.0, 2.0]
        shared.add(1, torch.tensor([10.0, 20.0]))
        assert messenger.seen.acquire(timeout=240)
        assert messenger.sent[-1][1].tolist() == [13.0], "complete: layer 2 has added 3, layer 1 10"
        shared.add(0, torch.tensor([100.0, 200.0, 300.0, 400.0]))
        assert shared.finish().tolist() == [260.0, 102.0, 150.0, 6.5, 0.5, 1.0]  # halves: the other rank has zeros
        assert messenger.seen.acquire(timeout=240)
    assert shared.sent == 6 and shared.contributions == 6 and shared.bytes == 2 * 4 * 6
    shared.close()


def test_a_missing_or_doubled_contribution_is_an_error():
    shared = SharedGradient(3, [torch.tensor([0]), torch.tensor([1])])
    shared.begin()
    shared.add(1, torch.ones(1))
    with pytest.raises(UserError, match="second contribution of use 1"):
        shared.add(1, torch.ones(1))
    with pytest.raises(UserError, match=r"no contribution of uses \[0\]"):
        shared.finish()
    shared.close()


def on_ranks(rank: int, world: int) -> tuple[list[float], int, int]:
    torch.manual_seed(11)
    uses = [torch.randint(0, 50, (80,)), torch.randint(20, 70, (60,)), torch.randint(60, 90, (40,))]
    mine = [[torch.randn(len(use)) for use in uses] for _ in range(world)]
    shared = SharedGradient(90, uses, timeout_s=240)
    for _ in range(3):
        shared.begin()
        for number in (2, 1, 0):
            shared.add(number, mine[rank][number])
        found = shared.finish()
    exact = torch.zeros(90, dtype=torch.float64)
    for values in mine:
        for use, value in zip(uses, values):
            exact.index_add_(0, use, value.double() / world)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    shared.close()
    return found.tolist(), shared.sent, shared.bytes


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_have_the_same_bits_of_the_mean(world, ranks):
    results = ranks(world, on_ranks)
    assert all(found == results[0][0] for found, _, _ in results)
    assert all(sent == 3 * 3 * (world - 1) for _, sent, _ in results)
    assert all(0 < nbytes <= 3 * 4 * 90 * (world - 1) for _, _, nbytes in results)
