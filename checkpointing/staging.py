"""The eager part of an image: small tensors and whatever may change during forward, copied before `save` returns.

The frames around the payloads never change, so they are laid down once in a template; a save copies the payloads
between them, with one foreach copy on the device and memcpy in host memory, and hashes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch

from .addresses import row_of_words
from .layout import WORD, Placed
from .plan import SavePlan


class Staging:
    """The staged eager part of one plan: [0, plan.host_bytes) in host memory, the rest on the device, where the buffer
    begins at image offset `device_begin`.

    Both buffers are used again by every save; the fence that begins a save has emptied them.
    """

    def __init__(self, plan: SavePlan, device: torch.device) -> None:
        border = plan.host_bytes - plan.host_bytes % WORD  # payloads keep the alignment that views need
        self.host = torch.from_numpy(_template(plan.image.eager[: plan.eager_host], 0, plan.host_bytes))
        tail = _template(plan.image.eager[plan.eager_host :], border, plan.image.eager_bytes)
        self.device = torch.from_numpy(tail).to(device)
        self.device_begin = border
        self._places = [
            (self.host, placed.payload, placed.frame.nbytes) for placed in plan.image.eager[: plan.eager_host]
        ] + [
            (self.device, placed.payload - border, placed.frame.nbytes)
            for placed in plan.image.eager[plan.eager_host :]
        ]
        self._split = plan.eager_host
        self._views: list[torch.Tensor] = []
        self._scalars = Scalars([], [])
        self._parts: list[tuple[list[int], list[torch.Tensor]]] = []

    def settle(self, tensors: Sequence[torch.Tensor], renewed: Collection[int]) -> None:
        """From now on `fill` is given these tensors, where they are now, but for those at the places `renewed`."""
        self._views = [
            buffer[begin : begin + nbytes].view(tensor.dtype).view(tensor.shape)
            for (buffer, begin, nbytes), tensor in zip(self._places, tensors)
        ]
        stay = [place for place in range(self._split) if place not in renewed and _is_scalar(tensors[place])]
        self._scalars = Scalars([self._views[place] for place in stay], [tensors[place] for place in stay])
        done = set(stay) if self._scalars else set()
        rest = [place for place in range(len(tensors)) if place not in done]
        parts = [place for place in rest if place < self._split], [place for place in rest if place >= self._split]
        self._parts = [(part, [self._views[place] for place in part]) for part in parts if part]

    @torch.no_grad()
    def fill(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copy the eager tensors, in plan order, between their frames; device copies in the current stream's order."""
        if not self._views:
            self.settle(tensors, range(len(tensors)))
        self._scalars.copy()
        for part, views in self._parts:
            torch._foreach_copy_(views, [tensors[place] for place in part])


class Scalars:
    """Copies many single float32 numbers of host memory at once: an optimizer counts its steps in one for each tensor,
    and one copy after the other would cost the training thread a microsecond each. False where that cannot be done."""

    def __init__(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        self._held = [tensor.detach() for tensor in (*targets, *sources)]  # their memory, while it is read and written
        self._ready = False
        if sources:
            try:
                self._from, read = self._row(sources)
                self._into, written = self._row(targets)
            except RuntimeError:  # copied one by one
                return
            self._read, self._written = torch.from_numpy(read), torch.from_numpy(written)
            self._ready = True

    @staticmethod
    def _row(tensors: Sequence[torch.Tensor]) -> tuple:
        begins = np.array([tensor.data_ptr() for tensor in tensors])
        return row_of_words(begins, torch.float32.itemsize, torch.int32, torch.device("cpu"))

    def __bool__(self) -> bool:
        return self._ready

    def copy(self) -> None:
        """Bit for bit: the numbers are moved as integers."""
        if self._ready:
            self._into.index_copy_(0, self._written, self._from.index_select(0, self._read))


def _is_scalar(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.numel() == 1 and tensor.device.type == "cpu"


def _template(items: Sequence[Placed], begin: int, end: int) -> np.ndarray:
    template = np.zeros(end - begin, dtype=np.uint8)
    for placed in items:
        head, tail = placed.start - begin, placed.payload + placed.frame.nbytes - begin
        template[head : head + len(placed.frame.prefix)] = np.frombuffer(placed.frame.prefix, dtype=np.uint8)
        template[tail : tail + len(placed.frame.suffix)] = np.frombuffer(placed.frame.suffix, dtype=np.uint8)
    return template
