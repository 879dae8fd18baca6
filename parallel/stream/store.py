"""Where a layer's input and attention output wait between forward and backward.

The layer algorithm speaks to a `Slot` and does not know whether rows stayed on the device, went to host memory
(`offload`) or will be computed again from an earlier layer (`Derived`). Backward reads chunks from the last to the
first and tells the slot when a chunk is done, so that a slot may put the next layer's rows into the freed place.

Legend: B batch, T tokens, C rows of a chunk, d channels, H heads, E head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Bounds = Sequence[tuple[int, int]]


class Slot(Protocol):
    """The waiting room of one layer call; used once."""

    keeps_attention: bool

    def keep_input(self, x_BTd: Tensor) -> None:
        """Called before the layer runs. The slot may read x until `backward` ends; nobody writes to it."""
        ...

    def keep_attention(self, chunk: int, out_BHCE: Tensor, lse_BHC: Tensor) -> None: ...

    def begin(self) -> None:
        """Backward of this layer starts."""
        ...

    def rows(self, chunk: int) -> Tensor:
        """Input rows [B, C, d] on the device, in the current stream's order."""
        ...

    def attention(self, chunk: int) -> tuple[Tensor, Tensor] | None: ...

    def release(self, chunk: int) -> None:
        """Backward of this chunk has been enqueued; its rows are not read again."""
        ...


class DeviceSlot:
    """Holds references: no copy, no memory beyond the tensors themselves."""

    def __init__(self, bounds: Bounds, keeps_attention: bool = False) -> None:
        self.keeps_attention = keeps_attention
        self._bounds = bounds
        self._x: Tensor | None = None
        self._attention: dict[int, tuple[Tensor, Tensor]] = {}

    def keep_input(self, x_BTd: Tensor) -> None:
        self._x = x_BTd.detach()

    def keep_attention(self, chunk: int, out_BHCE: Tensor, lse_BHC: Tensor) -> None:
        if self.keeps_attention:
            self._attention[chunk] = (out_BHCE, lse_BHC)

    def begin(self) -> None:
        if self._x is None:
            raise RuntimeError("a streamed layer was differentiated twice; retain_graph=True is not supported")

    def rows(self, chunk: int) -> Tensor:
        assert self._x is not None
        start, stop = self._bounds[chunk]
        return self._x[:, start:stop]

    def attention(self, chunk: int) -> tuple[Tensor, Tensor] | None:
        return self._attention.pop(chunk, None)

    def release(self, chunk: int) -> None:
        if chunk == 0:
            self._x = None


class Derived(DeviceSlot):
    """Keeps no input: computes it again from the layer before, whose own slot keeps it.

    `rerun(rows)` runs that layer forward on the rows its slot hands out. Halves what is kept for one more forward of
    every second layer.
    """

    def __init__(
        self, bounds: Bounds, parent: Slot, rerun: Callable[[Slot], Tensor], keeps_attention: bool = False
    ) -> None:
        super().__init__(bounds, keeps_attention)
        self._parent, self._rerun = parent, rerun

    def keep_input(self, x_BTd: Tensor) -> None:
        return

    def begin(self) -> None:
        with torch.no_grad():
            self._x = self._rerun(self._parent)
        super().begin()
