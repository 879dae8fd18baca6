"""Where a layer's input and attention output wait between forward and backward.

The layer algorithm speaks to a `Slot` and does not know whether rows stayed on the device, went to host memory
(`offload`) or will be computed again from an earlier layer (`Derived`). Backward reads chunks from the last to the
first and says when a chunk is done; the slot then tells the slot of the layer below to fetch the same rows, which land
in the memory that has just become free.

Legend: B batch, T tokens, C rows of a chunk, d channels, H heads, E head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Bounds = Sequence[tuple[int, int]]


class Slot:
    """The waiting room of one layer call, used once. This one holds references on the device: no copy.

    `below` is the slot of the layer before, whose backward comes next.
    """

    def __init__(self, bounds: Bounds, keeps_attention: bool = False, below: Slot | None = None) -> None:
        self.keeps_attention, self.below = keeps_attention, below
        self._bounds = bounds
        self._x: Tensor | None = None
        self._attention: dict[int, tuple[Tensor, ...]] = {}

    def keep_input(self, x_BTd: Tensor) -> None:
        """Called before the layer runs; nobody writes to x until its backward."""
        self._x = x_BTd.detach()

    def keep_attention(self, chunk: int, *parts: Tensor) -> None:
        """Called once per chunk of the forward, if `keeps_attention`: out [B, H, C, E] and lse [B, H, C], or what
        another attention gives for all rows, as chunk 0."""
        self._attention[chunk] = parts

    def begin(self) -> None:
        """Backward of this layer starts."""
        if self._x is None:
            raise RuntimeError("a streamed layer was differentiated twice; retain_graph=True is not supported")

    def prefetch(self, chunk: int) -> None:
        """These rows will be asked for soon, and there is room now."""

    def rows(self, chunk: int) -> Tensor:
        """Input rows [B, C, d] on the device, in the current stream's order."""
        assert self._x is not None
        start, stop = self._bounds[chunk]
        return self._x[:, start:stop]

    def attention(self, chunk: int) -> tuple[Tensor, ...] | None:
        """What was kept of the chunk, once."""
        return self._attention.pop(chunk, None)

    def release(self, chunk: int) -> None:
        """Backward of this chunk has been enqueued; its rows are not read again."""
        if chunk == 0:
            self._x = None
        if self.below is not None:
            self.below.prefetch(chunk)


class Derived(Slot):
    """Keeps no input: computes it again from the layer below, whose own slot keeps it, or is derived in its turn.

    `rerun(slot)` runs that layer forward on the rows its slot hands out. Where every n-th input is kept, the first
    backward of n layers computes the n - 1 inputs between, once, and each stays until its own layer's backward.
    """

    def __init__(
        self, bounds: Bounds, below: Slot, rerun: Callable[[Slot], Tensor], keeps_attention: bool = False
    ) -> None:
        super().__init__(bounds, keeps_attention, below)
        self._rerun = rerun

    def keep_input(self, x_BTd: Tensor) -> None:
        return

    def prefetch(self, chunk: int) -> None:
        assert self.below is not None
        self.below.prefetch(chunk)

    def begin(self) -> None:
        below = self.below
        assert below is not None
        if self._x is None:
            if isinstance(below, Derived):
                below.begin()
            with torch.no_grad():
                self._x = self._rerun(below)

    def release(self, chunk: int) -> None:
        if chunk == 0:
            self._x = None
