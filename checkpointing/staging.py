"""The eager part of an image: small tensors and whatever may change during forward, copied before `save` returns.

The frames around the payloads never change, so they are laid down once in a template; a save copies the payloads
between them, with one foreach copy on the device and memcpy in host memory, and hashes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

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

    @torch.no_grad()
    def fill(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copy the eager tensors, in plan order, between their frames; device copies in the current stream's order."""
        if not self._views:
            self._views = [
                buffer[begin : begin + nbytes].view(tensor.dtype).view(tensor.shape)
                for (buffer, begin, nbytes), tensor in zip(self._places, tensors)
            ]
        for part in (slice(None, self._split), slice(self._split, None)):
            if tensors[part]:
                torch._foreach_copy_(self._views[part], list(tensors[part]))


def _template(items: Sequence[Placed], begin: int, end: int) -> np.ndarray:
    template = np.zeros(end - begin, dtype=np.uint8)
    for placed in items:
        head, tail = placed.start - begin, placed.payload + placed.frame.nbytes - begin
        template[head : head + len(placed.frame.prefix)] = np.frombuffer(placed.frame.prefix, dtype=np.uint8)
        template[tail : tail + len(placed.frame.suffix)] = np.frombuffer(placed.frame.suffix, dtype=np.uint8)
    return template
