"""The eager part of an image: small tensors and whatever may change during forward, copied before `save` returns.

The frames around the payloads never change, so they are laid down once in a template; a save copies the payloads
between them and hashes nothing. Small tensors of one device are copied by their addresses, all in two operations, since
one copy after the other would cost the training thread a microsecond each; the others by a foreach copy.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch

from .addresses import row_of_words
from .layout import WORD, Placed
from .plan import SavePlan

UNIT = torch.int32  # a word that is copied
HOST_BYTES, DEVICE_BYTES = 64, 64 * 1024  # up to which a tensor is copied word by word
WORDS = 2**21  # at most, of a device's tensors: two numbers of eight bytes are kept for each


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
        self._words: list[Words] = []
        self._parts: list[tuple[list[int], list[torch.Tensor]]] = []

    def settle(self, tensors: Sequence[torch.Tensor], renewed: Collection[int]) -> None:
        """From now on `fill` is given these tensors, where they are now, but for those at the places `renewed`."""
        self._views = [
            buffer[begin : begin + nbytes].view(tensor.dtype).view(tensor.shape)
            for (buffer, begin, nbytes), tensor in zip(self._places, tensors)
        ]
        self._words, self._parts = [], []
        every = range(len(tensors))
        for part, most in ((every[: self._split], HOST_BYTES), (every[self._split :], DEVICE_BYTES)):
            small = [place for place in part if place not in renewed and has_words(tensors[place], most)]
            words = Words([self._views[place] for place in small], [tensors[place] for place in small])
            if words:
                self._words.append(words)
            done = set(small) if words else set()
            rest = [place for place in part if place not in done]
            for kind in dict.fromkeys(tensors[place].dtype for place in rest):  # of several, none goes the quick way
                alike = [place for place in rest if tensors[place].dtype == kind]
                self._parts.append((alike, [self._views[place] for place in alike]))

    @torch.no_grad()
    def fill(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copy the eager tensors, in plan order, between their frames; device copies in the current stream's order."""
        if not self._views:
            self.settle(tensors, range(len(tensors)))
        for words in self._words:
            words.copy()
        for part, views in self._parts:
            torch._foreach_copy_(views, [tensors[place] for place in part])


class Words:
    """Copies small tensors of one device word by word, all at once: an optimizer counts its steps in one for each
    parameter, and norms have a few kilobytes. False where that cannot be done, or there is nothing to do."""

    def __init__(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        self._held = [tensor.detach() for tensor in (*targets, *sources)]  # their memory, while it is read and written
        self._ready = False
        if sources and sum(map(_words, sources)) <= WORDS:
            try:
                self._from, self._read = self._row(sources)
                self._into, self._written = self._row(targets)
            except RuntimeError:  # copied one by one
                return
            self._ready = True

    @staticmethod
    def _row(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        begins = [tensor.data_ptr() + UNIT.itemsize * np.arange(_words(tensor)) for tensor in tensors]
        row, places = row_of_words(np.concatenate(begins), UNIT.itemsize, UNIT, tensors[0].device)
        return row, torch.from_numpy(places).to(tensors[0].device)

    def __bool__(self) -> bool:
        return self._ready

    def copy(self) -> None:
        """Bit for bit: what is moved are integers."""
        if self._ready:
            self._into.index_copy_(0, self._written, self._from.index_select(0, self._read))


def has_words(tensor: torch.Tensor, most: int) -> bool:
    """Whether a tensor lies in one piece of whole words, and of `most` bytes at most."""
    nbytes = tensor.numel() * tensor.element_size()
    whole = nbytes % UNIT.itemsize == 0 and tensor.data_ptr() % UNIT.itemsize == 0
    plain = tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
    return 0 < nbytes <= most and whole and plain


def _words(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size() // UNIT.itemsize


def _template(items: Sequence[Placed], begin: int, end: int) -> np.ndarray:
    template = np.zeros(end - begin, dtype=np.uint8)
    for placed in items:
        head, tail = placed.start - begin, placed.payload + placed.frame.nbytes - begin
        template[head : head + len(placed.frame.prefix)] = np.frombuffer(placed.frame.prefix, dtype=np.uint8)
        template[tail : tail + len(placed.frame.suffix)] = np.frombuffer(placed.frame.suffix, dtype=np.uint8)
    return template
