"""A cheap proof that nobody wrote a tensor while its copy was under way.

`tensor._version` misses fused optimizers, `.data`, NumPy views and raw kernels. So a few hundred elements from the
start, middle and end of every lazy tensor are copied when the snapshot begins and again at the fence, and compared bit
for bit. An optimizer step changes every element of what it updates, so it cannot hide; a writer of a few elements
elsewhere in a large tensor can, and docs/checkpointing.md names that limit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

PROBE = 128  # elements at each of up to three places


class Sampler:
    """Samples of fixed contiguous `tensors`, kept on their own device; nothing here waits for a device."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        groups: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for tensor in tensors:
            groups.setdefault((tensor.dtype, tensor.device), []).extend(_probes(tensor))
        self._groups = [_Group(probes) for probes in groups.values()]

    @torch.no_grad()
    def before(self) -> None:
        """Sample at the start of a snapshot."""
        for group in self._groups:
            torch._foreach_copy_(group.first_views, group.probes)

    @torch.no_grad()
    def changed(self) -> list[torch.Tensor]:
        """Sample again and compare: one 0-d bool tensor per dtype and device, true where a bit differs."""
        flags = []
        for group in self._groups:
            torch._foreach_copy_(group.second_views, group.probes)
            flags.append((group.first.view(torch.uint8) != group.second.view(torch.uint8)).any())
        return flags


class _Group:
    """The probes of one dtype on one device, and two flat buffers to hold them."""

    def __init__(self, probes: list[torch.Tensor]) -> None:
        sizes = [probe.numel() for probe in probes]
        self.probes = probes
        self.first = torch.empty(sum(sizes), dtype=probes[0].dtype, device=probes[0].device)
        self.second = torch.empty_like(self.first)
        self.first_views = list(self.first.split(sizes))
        self.second_views = list(self.second.split(sizes))


def _probes(tensor: torch.Tensor) -> list[torch.Tensor]:
    flat = tensor.view(-1)
    starts = {0, max(0, flat.numel() // 2 - PROBE // 2), max(0, flat.numel() - PROBE)}
    return [flat[start : start + PROBE] for start in sorted(starts)]
