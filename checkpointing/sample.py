"""A cheap proof that nobody wrote a tensor while its copy was under way.

`tensor._version` misses fused optimizers, `.data`, NumPy views and raw kernels. So 512 bytes from each of the start,
middle and end of every lazy tensor are copied when the snapshot begins and again at the fence, and compared bit for
bit. An optimizer step changes every element of what it updates, so it cannot hide; a writer of a few elements elsewhere
in a large tensor can, and docs/checkpointing.md names that limit.

This runs on the training thread at every save, so that one operation takes the samples of all tensors (`addresses`).
`torch.cat` does the same tensor by tensor: the quick way is compared with it once, and it is what is left where that
fails, or where a tensor does not begin at a whole word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ..dist.log import get_logger
from .addresses import row_of_words

log = get_logger(__name__)
BYTES, WORD = 512, 8  # sampled at each of three places, compared in units of
Gather = Callable[[torch.Tensor | None], torch.Tensor]  # samples into a tensor, or a new one


class Sampler:
    """Samples of fixed contiguous `tensors`, kept on their own device; only making it waits for a device."""

    @torch.no_grad()
    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._views = [tensor.detach() for tensor in tensors]  # their memory stays while samples are taken from it
        groups: dict[tuple, list[torch.Tensor]] = {}
        for view in self._views:
            probe = _probe(view)
            groups.setdefault((probe.dtype, view.device, probe.ndim, _lies_evenly(view)), []).append(probe)
        gathers = [_gather(probes) if even else _cat(probes) for (*_, even), probes in groups.items()]
        self._groups = [(gather, gather(None), gather(None)) for gather in gathers]

    @torch.no_grad()
    def before(self) -> None:
        """Sample at the start of a snapshot."""
        for gather, first, _ in self._groups:
            gather(first)

    @torch.no_grad()
    def changed(self) -> list[torch.Tensor]:
        """Sample again and compare: one 0-d bool tensor per group, true where a bit differs."""
        flags = []
        for gather, first, second in self._groups:
            gather(second)
            host = first.device.type == "cpu"
            flags.append(torch.tensor(not torch.equal(first, second)) if host else (first != second).any())
        return flags


def _lies_evenly(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % WORD == 0 and tensor.numel() * tensor.element_size() >= BYTES


def _cat(probes: list[torch.Tensor]) -> Gather:
    return lambda out: torch.cat(probes, out=out)


def _gather(probes: list[torch.Tensor]) -> Gather:
    """What collects the `probes` of one device, dtype and rank, by their addresses where that is the same."""
    if probes[0].dtype == torch.int64:
        try:
            quick = by_address(probes)
            if torch.equal(quick(None).view(-1), torch.cat(probes).view(-1)):
                return quick
        except RuntimeError as error:
            log.debug("tensors are sampled one by one (%s)", error)
    return _cat(probes)


def by_address(probes: Sequence[torch.Tensor]) -> Gather:
    """[3 N, 64] on the CPU and flat elsewhere: what lies at the places of N probes [3, 64] of int64."""
    device, count = probes[0].device, BYTES // WORD
    begins = np.array([[probe.data_ptr() + WORD * place * probe.stride(0) for place in range(3)] for probe in probes])
    words, found = row_of_words(begins, BYTES, torch.int64, device)
    places = torch.from_numpy(found.reshape(-1))
    if device.type == "cpu":  # row by row, which is quicker there
        words = words.as_strided((len(words) - count + 1, count), (1, 1))
    else:
        places = (places[:, None] + torch.arange(count)).view(-1).to(device)
    return lambda out: torch.index_select(words, 0, places, out=out)


def _probe(tensor: torch.Tensor) -> torch.Tensor:
    """[3, n] over a tensor's start, middle and end: int64, or uint8 where it lies oddly; all of a very small one."""
    flat = tensor.view(-1)
    size, nbytes = flat.element_size(), flat.numel() * flat.element_size()
    if nbytes < BYTES:
        return flat.view(torch.uint8)
    unit = torch.uint8 if flat.storage_offset() * size % WORD else torch.int64
    units = flat[: nbytes // WORD * WORD // size].view(unit)
    count = BYTES // units.element_size()
    return units.as_strided((3, count), ((len(units) - count) // 2, 1))
