"""Back from memory: the newest save that all ranks can have, tried before any disk is read.

All ranks go through the same steps and agree after each: what one of them cannot have, none takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from ..dist.errors import UserError
from ..dist.log import get_logger
from ..dist.units import format_bytes
from .fit import Exchange
from .manifest import BadCheckpoint, Manifest
from .partner_reader import MemoryReader
from .partner_survey import Candidate, survey
from .partner_tier import PartnerTier
from .restore import load_from, own_objects
from .state import AppState

log = get_logger(__name__)


class MemoryRestore:
    """Restores `state` from all machines' memory; `origins[r]` tells then how many bytes rank r got from where."""

    def __init__(
        self, tier: PartnerTier, state: AppState, allow: Sequence[type], exchange: Exchange, *, timeout_s: float
    ) -> None:
        self._tier, self._state, self._allow, self._exchange = tier, state, allow, exchange
        self._here, self._timeout_s = tier.coordinator, timeout_s
        self.origins: list[dict[str, int]] = []

    def newest(self, step: int | None, kept: int | None) -> int | None:
        """Load the newest save in memory, unless `kept`, the newest in the folders, is newer; or exactly `step`. Its
        step, or None when the folders must do. `UserError` when there are none and what memory holds is damaged."""
        self._here.round += 1
        problem = ""
        for candidate in survey(self._tier, self._name("survey"), step, kept, timeout_s=self._timeout_s):
            try:
                self._load(candidate)
            except BadCheckpoint as error:
                problem = str(error)
                log.warning("step %d in memory is lost: %s", candidate.step, problem)
                continue
            self._tier.forget_after(candidate.step)
            self._tier.restored(candidate.step)
            self._tell(candidate.step)
            return candidate.step
        if self._all("kept", kept)[0] is None and problem:
            raise UserError(f"no save in memory is whole and none is on disk; at last: {problem}")
        if step is None:
            self._tier.restored(None)
        return None

    def _load(self, candidate: Candidate) -> None:
        self._here.round += 1
        manifest = Manifest.loads(candidate.manifest, Path(f"step {candidate.step} in memory"))
        reader = MemoryReader(self._tier, candidate, manifest, timeout_s=self._timeout_s)
        records = [manifest.objects[key] for key in own_objects(self._state, manifest)]
        objects = [(record.file, record.start, record.start + record.length) for record in records]
        try:
            self._together("objects", partial(reader.gather, objects))
            load_from(
                self._state,
                reader,
                self._allow,
                exchange=self._exchange,
                before=lambda targets: self._together("tensors", lambda: reader.gather(reader.spans(targets))),
            )
            self.origins = self._all("origin", dict(reader.origin))
        finally:
            if self._tier.crew.leads:  # all have read, or none will
                self._tier.memory.remove(reader.path.name)

    def _together(self, name: str, act: Callable[[], None]) -> None:
        """Act on all ranks; `BadCheckpoint` on all where one raises it."""
        problem = ""
        try:
            act()
        except BadCheckpoint as error:
            problem = f"rank {self._here.rank}: {error}"
        if problems := list(filter(None, self._all(name, problem))):
            raise BadCheckpoint(problems[0])

    def _all(self, name: str, word: object) -> list:
        """Every rank's word, through rank 0."""
        return self._tier.crew.table(self._name(name), word, timeout_s=self._timeout_s)

    def _name(self, name: str) -> str:
        return f"restore/{self._here.round}/memory/{name}"

    def _tell(self, step: int) -> None:
        lines = [f"rank {rank}: {_sources(origin.items())}" for rank, origin in enumerate(self.origins)]
        if self._here.rank == 0:
            log.info("restored step %d from memory, without the disk; %s", step, "; ".join(lines))


def _sources(origin: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{format_bytes(nbytes)} from the {source}" for source, nbytes in origin) or "nothing"
