"""Bringing the state of a `Checkpointer` back: from its own tiers, or from a folder that stock DCP wrote.

All ranks call the same method. What is loaded is chosen, verified and compared with the state on all of them before
anything is written into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from ..dist.log import get_logger
from ..dist.trace import Trace
from .bucket_reader import BucketReader
from .coordinate import Coordinator
from .fit import Fit
from .foreign import Names, open_on_all
from .leftovers import later_in_memory
from .partner_restore import MemoryRestore
from .partner_tier import PartnerTier
from .recover import choose
from .restore import load_from
from .state import AppState
from .tiers import Tiers

log = get_logger(__name__)


class Restorer:
    """Loads into `state`. Nothing may be in flight. `allow`: classes that stored objects may unpickle to."""

    def __init__(
        self,
        state: AppState,
        tiers: Tiers,
        coordinator: Coordinator,
        allow: Sequence[type],
        *,
        timeout_s: float,
        trace: Trace,
    ) -> None:
        self._state, self._tiers, self._coordinator, self._allow = state, tiers, coordinator, tuple(allow)
        self._timeout_s, self._trace = timeout_s, trace
        self.origins: list[dict[str, int]] = []  # of the last restore, by rank: how much came from where

    def newest(self, step: int | None) -> int | None:
        """Load the newest checkpoint that verifies on all ranks, or exactly `step` and set later ones aside; its step,
        or None if there is none."""
        with self._trace.span("restore"):
            number = self._from_partners(step)
            if number is None:
                number = self._from_folders(step)
            if step is None and self._coordinator.rank == 0:
                host = self._tiers.host
                used = None if host is None else host.folder.root
                if hint := later_in_memory(self._tiers.folder.root, used, number):
                    log.warning("%s", hint)
            if number is None:
                return None
            self._tiers.restored(number)
            if self._coordinator.rank == 0 and (starts := self._tiers.folder.count_start(number)) > 1:
                log.warning("start %d from step %d without a newer checkpoint in between", starts, number)
            if step is not None:
                self._tiers.roll_back(number)
        return number

    def _from_folders(self, step: int | None) -> int | None:
        found = choose(self._tiers.folders, self._coordinator, step=step, timeout_s=self._timeout_s)
        if found is None:
            return None
        folder, number, manifest = found
        path = folder.final(number)  # in a bucket from its root on
        reader = folder.reader(number, manifest)
        if isinstance(reader, BucketReader):
            with closing(reader):  # the disk has its room back before training goes on
                load_from(self._state, reader, self._allow, exchange=self._exchange, before=reader.fetch)
        else:
            load_from(self._state, reader, self._allow, exchange=self._exchange)
        nbytes = sum(record.nbytes for record in manifest.files.values())
        place = f"{folder.root}/{path}" if isinstance(reader, BucketReader) else str(path)
        self.origins = [{place: nbytes}] * self._coordinator.world
        log.info("restored step %d from %s", number, place)
        return number

    def _from_partners(self, step: int | None) -> int | None:
        """From the memory of all machines, where a save there is as new as those in the folders."""
        tier = self._tiers.host
        if not isinstance(tier, PartnerTier):
            return None
        kept = [found for folder in self._tiers.folders for found in folder.committed()]
        back = MemoryRestore(tier, self._state, self._allow, self._exchange, timeout_s=self._timeout_s)
        number = back.newest(step, max(kept, default=None))
        self.origins = back.origins
        return number

    def foreign(self, path: Path, names: Names, *, verify: bool) -> None:
        """Load what stock DCP wrote to `path`; objects that `names` maps to None stay as they are."""
        with self._trace.span("restore"):
            reader = open_on_all(
                path, self._state, names, self._coordinator, self._allow, verify=verify, timeout_s=self._timeout_s
            )
            untouched = [label for label in names if names[label] is None]
            load_from(self._state, reader, self._allow, untouched, self._exchange)

    def _exchange(self, mine: Fit) -> list[Fit]:
        self._coordinator.round += 1
        name = f"restore/{self._coordinator.round}/fit"
        self._coordinator.say(name, mine)
        return self._coordinator.hear_all(name, timeout_s=self._timeout_s)
