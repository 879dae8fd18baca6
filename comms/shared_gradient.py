"""The gradient of a vector that several layers share: each entry leaves when its last sharer has added to it.

With shared weights "this layer's backward is done" says nothing: an entry is complete only after every layer that reads
it. So contributions are counted, as T3 counts the updates of an output tile: entries with the same sharers to wait for
form a piece, a layer's backward bumps the pieces that it has added to, and a communication thread sends a piece to the
other ranks at its last bump, while earlier layers are still computed. Partials are added in rank order, so all ranks
get the same bits. Where every layer shares every entry, nothing can leave before the end; `pieces` shows that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..dist.errors import UserError
from .board import Worker
from .chunk_plan import Piece
from .output_map import OutputMap
from .overlap_engine import add_in_order
from .tracker import Tracker
from .trigger import GlooMessenger, Messenger, fire


@dataclass(frozen=True)
class SharingPlan:
    """Which entries are complete when. `place` [m]: where each entry lies in the buffer that is sent, in which a
    piece's entries are neighbours. Piece.owner is the use that completes it; -1 for entries that nobody reads.
    `touched[u]`: the pieces that use u adds to."""

    place: Tensor
    pieces: tuple[Piece, ...]
    touched: tuple[tuple[Piece, ...], ...]

    def need(self, piece: Piece) -> int:
        """How many uses add to it."""
        return sum(piece in touched for touched in self.touched)


def sharing_plan(size: int, uses: Sequence[Tensor]) -> SharingPlan:
    """`uses[u]`: the entries of a vector of `size` that use u reads. Backward comes from the last use to the first, so
    an entry is complete with the first use that reads it."""
    first = torch.full((size,), -1, dtype=torch.long)
    for number in reversed(range(len(uses))):
        if uses[number].numel() and not 0 <= int(uses[number].min()) <= int(uses[number].max()) < size:
            raise UserError(f"use {number} reads entries outside a vector of {size}", expected=f"0 … {size - 1}")
        first[uses[number]] = number
    order = torch.argsort(first, descending=True, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(size)
    pieces, low = [], 0
    for number in reversed(range(len(uses))):
        count = int((first == number).sum())
        if count:
            pieces.append(Piece(number, 0, low, low + count))
        low += count
    touched = []
    for use in uses:
        owners = set(first[use].tolist())
        touched.append(tuple(piece for piece in pieces if piece.owner in owners))
    return SharingPlan(place, tuple(pieces), tuple(touched))


class SharedGradient:
    """Collects and averages the gradient of a float vector over `group`. Made, used and closed by all ranks alike.

    Per backward: `begin`, `add` once for every use from the last to the first, `finish`. `sent` and `early` count the
    messages, and those that were on their way before the last contribution of the backward.
    """

    def __init__(
        self,
        size: int,
        uses: Sequence[Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        group: dist.ProcessGroup | None = None,
        messenger: Messenger | None = None,
        timeout_s: float = 300.0,
    ) -> None:
        self.plan = sharing_plan(size, uses)
        alone = messenger is None and not (dist.is_initialized() and dist.get_world_size(group) > 1)
        self.messenger = None if alone else messenger or GlooMessenger(group, timeout_s)
        self.rank, self.world = (self.messenger.rank, self.messenger.world) if self.messenger else (0, 1)
        self.timeout_s = timeout_s
        self.sent = self.early = self.bytes = self.contributions = 0
        self._where = [self.plan.place[use] for use in uses]
        self._tracker = Tracker({piece: self.plan.need(piece) for piece in self.plan.pieces})
        self._peers = [peer for peer in range(self.world) if peer != self.rank]
        rules = OutputMap()
        for piece in self.plan.pieces:
            for peer in self._peers:
                rules = rules.dma_map(piece, peer, "store", self.plan.need(piece))
        self._rules = rules
        self._total = torch.zeros(size, dtype=dtype)
        self._staged = {peer: torch.zeros(size, dtype=dtype) for peer in self._peers}
        self._thread = Worker(f"undertow-shared-{self.rank}")
        self._left: set[int] = set()
        self._fired = 0

    def begin(self) -> None:
        """Before a backward: receives are posted, the communication thread waits for the first piece."""
        self._total.zero_()
        self._left, self._fired = set(range(len(self._where))), 0
        epoch = self._tracker.begin()
        self._arrivals = {}
        if self.messenger is None:
            return
        for number, piece in enumerate(self.plan.pieces):
            for peer in self._peers:
                rows = self._staged[peer][piece.low : piece.high]
                self._arrivals[piece, peer] = self.messenger.post_recv(rows, peer, number)
        self._sending = self._thread.submit(lambda: self._fire(epoch))

    def _fire(self, epoch: int) -> list:
        """In the communication thread."""
        messenger, numbers = self.messenger, {piece: number for number, piece in enumerate(self.plan.pieces)}
        assert messenger is not None

        def send(rule) -> object:
            rows = self._total[rule.piece.low : rule.piece.high]
            handle = messenger.post_send(rows, rule.dst, numbers[rule.piece])
            self._fired += 1
            self.early += bool(self._left)
            self.bytes += rows.numel() * rows.element_size()
            return handle

        return fire(self._rules, self._tracker, epoch, send, self.timeout_s)

    def add(self, use: int, values: Tensor) -> None:
        """The contribution of `use`, one value for each entry that it reads."""
        if use not in self._left:
            raise UserError(f"a second contribution of use {use} in one backward", expected="one from each use")
        self._total.index_add_(0, self._where[use], values.to(self._total.dtype))
        self._left.discard(use)
        self.contributions += 1
        for piece in self.plan.touched[use]:
            self._tracker.bump(piece)

    def finish(self) -> Tensor:
        """The mean over the ranks, in the vector's own order. Collective."""
        if self._left:
            error = UserError(f"no contribution of uses {sorted(self._left)}", expected="one from each use")
            self._tracker.fail(error)
            raise error
        out = self._total.clone()
        if self.messenger is not None:
            for _, handle in self._sending.get():
                self.messenger.wait(handle, self.timeout_s)
            for handle in self._arrivals.values():
                self.messenger.wait(handle, self.timeout_s)
            every = [self._total if rank == self.rank else self._staged[rank] for rank in range(self.world)]
            add_in_order(every, out)
            out /= self.world
            self.sent += self._fired
        return out[self.plan.place]

    def close(self) -> None:
        """End the thread and the messages; collective."""
        self._thread.stop()
        if self.messenger is not None:
            self.messenger.close()
