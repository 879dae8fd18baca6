"""The eager part of an image: small tensors and whatever may change during forward, copied before `save` returns.

The frames around the payloads never change, so they are laid down once in a template; a save copies the payloads
between them, with one foreach copy on the device and memcpy in host memory, and hashes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .layout import Placed
from .plan import SavePlan


class Staging:
    """Templates for one plan. `host` returns fresh bytes each time; `device` refills one device buffer."""

    def __init__(self, plan: SavePlan, device: torch.device) -> None:
        split, border = plan.eager_host, plan.host_bytes
        self._host_items = plan.image.eager[:split]
        self._template = _template(self._host_items, 0, border)
        self._device_items = plan.image.eager[split:]
        self._buffer: torch.Tensor | None = None
        self._views: list[torch.Tensor] = []
        if self._device_items:
            template = _template(self._device_items, border, plan.image.eager_bytes)
            self._buffer = torch.from_numpy(template).to(device)
            self._border = border

    def host(self, tensors: Sequence[torch.Tensor]) -> np.ndarray:
        """The staged image bytes of the host tensors, uint8[plan.host_bytes]."""
        staged = self._template.copy()
        for placed, tensor in zip(self._host_items, tensors):
            nbytes = placed.frame.nbytes
            if nbytes:
                data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
                staged[placed.payload : placed.payload + nbytes] = data
        return staged

    @torch.no_grad()
    def device(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The staged image bytes of the device tensors, on the device, in the order of the current stream."""
        if self._buffer is None:
            return None
        if len(self._views) != len(tensors):
            self._views = [
                _view(self._buffer, placed, self._border, t) for placed, t in zip(self._device_items, tensors)
            ]
        filled = [(view, tensor.detach()) for view, tensor in zip(self._views, tensors) if tensor.numel()]
        if filled:
            torch._foreach_copy_([view for view, _ in filled], [tensor for _, tensor in filled])
        return self._buffer


def _template(items: Sequence[Placed], begin: int, end: int) -> np.ndarray:
    template = np.zeros(end - begin, dtype=np.uint8)
    for placed in items:
        head, tail = placed.start - begin, placed.payload + placed.frame.nbytes - begin
        template[head : head + len(placed.frame.prefix)] = np.frombuffer(placed.frame.prefix, dtype=np.uint8)
        template[tail : tail + len(placed.frame.suffix)] = np.frombuffer(placed.frame.suffix, dtype=np.uint8)
    return template


def _view(buffer: torch.Tensor, placed: Placed, border: int, like: torch.Tensor) -> torch.Tensor:
    begin = placed.payload - border
    return buffer[begin : begin + placed.frame.nbytes].view(like.dtype).view(like.shape)
