"""Which saves all machines' memories together still hold.

The leaders of the machines tell what lies in their memory. A save counts when one of them has its manifest and COMMIT
and every file is somewhere. Of every file there are two copies, on different machines, so that what one machine loses
is never the end of a save.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..dist.errors import UserError
from .manifest import BadCheckpoint, Manifest, checksum, require_known_format
from .partner_memory import Entry
from .partner_tier import PartnerTier


@dataclass(frozen=True)
class Copy:
    """One copy of a file: the machine whose `leader` hands it out, and the entry that holds it."""

    leader: int
    entry: str
    own: bool


@dataclass(frozen=True)
class Candidate:
    """A save that memory holds: `manifest` as its bytes; `copies` of each file, those of the ranks themselves first."""

    step: int
    manifest: bytes
    copies: Mapping[str, tuple[Copy, ...]]


def candidates(words: Sequence[tuple[int, Sequence[Entry]]]) -> list[Candidate]:
    """What can be restored, newest first; `words` are (leader, what lies in its machine's memory)."""
    saves: dict[str, list[tuple[int, Entry]]] = {}
    for leader, entries in words:
        for entry in entries:
            saves.setdefault(entry.save, []).append((leader, entry))
    found = []
    for parts in saves.values():
        vouched = [entry.manifest for _, entry in parts if _vouched(entry)]
        if vouched and (copies := _cover(Manifest.loads(vouched[0], Path("memory")), parts)):
            number = parts[0][1].number
            found.append((parts[0][1].step, number, Candidate(parts[0][1].step, vouched[0], copies)))
    return [candidate for _, _, candidate in sorted(found, key=lambda item: item[:2], reverse=True)]


def _vouched(entry: Entry) -> bool:
    try:
        commit = json.loads(entry.commit)
        require_known_format(commit["format"], Path(entry.name))
        if commit["manifest"] != checksum(entry.manifest):
            return False
        return Manifest.loads(entry.manifest, Path(entry.name)).step == entry.step
    except (ValueError, KeyError, TypeError, BadCheckpoint, UserError):  # damaged, or a later version's
        return False


def _cover(manifest: Manifest, parts: Sequence[tuple[int, Entry]]) -> dict[str, tuple[Copy, ...]]:
    """Where each file is; empty when one is nowhere."""
    found = {}
    for name, record in manifest.files.items():
        there = [(leader, entry) for leader, entry in parts if entry.files.get(name) == record.nbytes]
        if not there:
            return {}
        found[name] = tuple(
            Copy(leader, entry.name, entry.kind == "own")
            for leader, entry in sorted(there, key=lambda part: (part[1].kind != "own", part[0]))
        )
    return found


def survey(tier: PartnerTier, name: str, step: int | None, newest: int | None, *, timeout_s: float) -> list[Candidate]:
    """What memory holds and is as new as the `newest` step in the folders (rank 0 knows it), or is exactly `step`; all
    ranks get the same."""
    here = tier.coordinator
    here.say(name, (here.rank, tier.memory.entries() if tier.crew.leads else []))
    if here.rank == 0:
        found = candidates(here.hear_all(name, timeout_s=timeout_s))
        found = [one for one in found if (one.step == step if step is not None else one.step >= (newest or 0))]
        here.say(f"{name}/found", found)
    return here.hear(f"{name}/found", 0, deadline_s=time.monotonic() + timeout_s)
