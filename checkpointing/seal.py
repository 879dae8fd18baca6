"""Whether somebody wrote lazy tensors while their copies were under way.

What a save's tensors look like when it begins is noted, and looked at again before anybody is let write: version
counters tell what torch knows of, samples (`sample`) tell, in the order of the copies, what it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch

from .copies import HostCopier
from .sample import Sampler
from .whereabouts import Versions

_version = attrgetter("_version")  # a tensor's


def _versions(tensors: Sequence[torch.Tensor]) -> list[int]:
    return list(map(_version, tensors))


class Seal:
    """Watches lazy `tensors` whose last byte lies in or before `chunk`: their version counters and samples."""

    def __init__(
        self, chunk: int, tensors: Sequence[torch.Tensor], sampler: Sampler, versions: Versions | None = None
    ) -> None:
        self.chunk, self._tensors, self._sampler = chunk, tensors, sampler
        self._now = partial(_versions, tensors) if versions is None else versions.now
        self._versions = self._now()
        self.verdict: tuple[torch.Tensor, Any] | None = None  # the samples', once they have been taken again
        self.behind: Any = None  # mark behind them, where they were taken in the order of the copies
        sampler.before()

    def sample(self, copier: HostCopier) -> None:
        """Take the samples again, in the order of the current stream, and have the verdict brought."""
        flags = self._sampler.changed()
        flag = flags[0] if len(flags) == 1 else torch.stack([flag.to(flags[0].device) for flag in flags]).any()
        self.verdict = copier.bring(flag)

    def moved(self) -> bool:
        """Whether a version counter has moved up to now."""
        return self._now() != self._versions
