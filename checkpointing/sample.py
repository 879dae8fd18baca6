"""A cheap proof that nobody wrote a tensor while its copy was under way.

`tensor._version` misses fused optimizers, `.data`, NumPy views and raw kernels. So 512 bytes from each of the start,
middle and end of every lazy tensor are copied when the snapshot begins and again at the fence, and compared bit for
bit. An optimizer step changes every element of what it updates, so it cannot hide; a writer of a few elements elsewhere
in a large tensor can, and docs/checkpointing.md names that limit. This runs on the training thread at every save, so
the samples of thousands of tensors are gathered by one `torch.cat`, which launches a handful of kernels on a GPU: a
strided view takes the three places of a tensor at once, and words of eight bytes stand for every dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

BYTES, WORD = 512, 8  # sampled at each of three places, compared in units of


class Sampler:
    """Samples of fixed contiguous `tensors`, kept on their own device; nothing here waits for a device."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        groups: dict[tuple[torch.dtype, torch.device, int], list[torch.Tensor]] = {}
        for tensor in tensors:
            probe = _probe(tensor)
            groups.setdefault((probe.dtype, tensor.device, probe.ndim), []).append(probe)
        self._groups = [_Group(probes) for probes in groups.values()]

    @torch.no_grad()
    def before(self) -> None:
        """Sample at the start of a snapshot."""
        for group in self._groups:
            torch.cat(group.probes, out=group.first)

    @torch.no_grad()
    def changed(self) -> list[torch.Tensor]:
        """Sample again and compare: one 0-d bool tensor per group of probes, true where a bit differs."""
        flags = []
        for group in self._groups:
            torch.cat(group.probes, out=group.second)
            flags.append((group.first != group.second).any())
        return flags


class _Group:
    """The probes of one width and shape on one device, and two buffers to hold them."""

    def __init__(self, probes: list[torch.Tensor]) -> None:
        self.probes = probes
        self.first = torch.cat(probes)
        self.second = torch.empty_like(self.first)


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
