"""What earlier jobs of a checkpoint folder have left in host memory where the present one does not look.

A job without `host_every`, or with another kind of it, restores from what it knows. If memory holds a later step, the
user should hear of it: steps are lost otherwise, and a later job that looks there would leave the new branch for it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from . import host_tier
from .memory_folder import MemoryFolder
from .memory_ops import MemoryOps
from .partner_memory import PartnerMemory


def later_in_memory(root: Path, used: Path | None, step: int | None) -> str:
    """Says that host memory of the checkpoint folder `root`, elsewhere than in `used`, holds a step after `step`; ''
    where it does not."""
    for way, folder, steps in _memories(root):
        later = [found for found in steps if step is None or found > step] if folder != used else []
        if later:
            restored = "nothing is" if step is None else f"step {step} is"
            return (
                f"{restored} restored, but an earlier job has left step {max(later)} of {root} in {folder}: pass {way} "
                "to go on from it, or remove it, for a later job with such memory would go back to it"
            )
    return ""


def _memories(root: Path) -> Iterator[tuple[str, Path, list[int]]]:
    """The option that looks there, the folder, and the whole steps in it."""
    plain = host_tier.SHARED_MEMORY / host_tier.memory_name(root)
    with suppress(OSError):
        status = os.lstat(plain)
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
            yield "host_every=1", plain, MemoryFolder(plain, MemoryOps()).committed()
    partner = PartnerMemory(host_tier.SHARED_MEMORY, root)
    yield "host_every=1 and partner=Partner()", partner.root, [one.step for one in partner.entries() if one.commit]
