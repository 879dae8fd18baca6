"""Which calls are worth recording, and which recording is that of a call: addresses decide.

A CUDA graph holds addresses, so a recording serves the calls whose operands lie where those of the recorded one did: a
layer's weight always does, and its activations do where the allocator does the same in every step. A call is recorded
when its addresses are seen again, because those that never come back would pay for a recording and never use it. This
is the bookkeeping only: it knows no tensor, stream or device (`cuda_recorder` does).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Generic, TypeVar

KEPT = 64  # recordings of an engine; a model has one for each of its layers
MOST_BYTES = 1 << 30  # of the memory that recordings hold, over all cases
SEEN = 1024  # addresses that are remembered
PATIENCE, PAUSE = 64, 1024  # after so many calls in a row with new addresses, so many are not looked at
WORTH, WASTED = 4, 8  # replays that pay for a recording; after so many in a row that were not paid for, no new ones

T = TypeVar("T")


@dataclass
class Case:
    """Calls that differ in their addresses only."""

    nbytes: int = 0  # of the memory that its recordings share, with those of all cases that say the same `memory`
    memory: Hashable = None
    ready: bool = False  # has run once: what is made at the first call is there
    strange: int = 0  # calls in a row whose addresses were new
    skip: int = 0  # calls that are not looked at
    wasted: int = 0  # recordings in a row that were dropped before they paid
    calls: int = 0
    replayed: int = 0


@dataclass
class Kept(Generic[T]):
    """A recording, how often it was used, and when last."""

    case: Case
    what: T
    turn: int
    used: int = 0


class Replays(Generic[T]):
    """Recordings of type T.

    A call that replays is looked for by one hash of its key, because a GPU may wait for the host that looks.
    """

    def __init__(self, *, kept: int = KEPT, most_bytes: int = MOST_BYTES) -> None:
        self.kept, self.most_bytes = kept, most_bytes
        self.off = ""  # why nothing is recorded or replayed any more
        self.cases: dict[Hashable, Case] = {}
        self._recordings: dict[Hashable, Kept[T]] = {}
        self._seen: dict[Hashable, None] = {}
        self._turn = 0  # counts what is kept and used

    def __len__(self) -> int:
        return len(self._recordings)

    def case(self, case: Hashable) -> Case:
        found = self.cases.get(case)
        if found is None:
            if len(self.cases) >= SEEN:  # shapes that change at every call
                del self.cases[next(old for old, state in self.cases.items() if not state.nbytes)]  # KEPT < SEEN have
            found = self.cases[case] = Case()
        return found

    def looks(self, case: Hashable) -> bool:
        """Count a call; whether its addresses are to be looked at."""
        if self.off:
            return False
        state = self.case(case)
        state.calls += 1
        if state.skip:
            state.skip -= 1
            return False
        return True

    def find(self, key: Hashable) -> T | None:
        """The recording of a call that is to be made; `key` says all that it depends on."""
        found = self._recordings.get(key)
        if found is None:
            return None
        self._turn += 1
        found.turn, found.used = self._turn, found.used + 1
        found.case.strange, found.case.replayed = 0, found.case.replayed + 1
        return found.what

    def see(self, addresses: Hashable) -> bool:
        """Whether a call had these addresses before; they are remembered."""
        before = self._seen.pop(addresses, self) is None
        self._seen[addresses] = None
        if len(self._seen) > SEEN:
            del self._seen[next(iter(self._seen))]
        return before

    def wants(self, case: Hashable, key: Hashable, seen: bool, nbytes: int, memory: Hashable = None) -> bool:
        """Whether a call of `key` should be recorded, with `nbytes` of what those of the same `memory` share."""
        state = self.case(case)
        if not seen:
            state.strange += 1
            if state.strange >= PATIENCE:
                state.strange, state.skip = 0, PAUSE
            return False
        state.strange = 0
        if self.off or not state.ready or state.wasted >= WASTED or key in self._recordings:
            return False
        return self.nbytes({memory: nbytes}) <= self.most_bytes

    def nbytes(self, more: Mapping[Hashable, int] = MappingProxyType({})) -> int:
        """Of the memory that recordings hold, and `more`, each memory once."""
        held = dict(more)
        for case in self.cases.values():
            held[case.memory] = max(case.nbytes, held.get(case.memory, 0))
        return sum(held.values())

    def keep(self, case: Hashable, key: Hashable, what: T, nbytes: int, memory: Hashable = None) -> None:
        """A new recording; the one that was used longest ago goes where there are too many."""
        state = self.case(case)
        state.nbytes, state.memory = max(state.nbytes, nbytes), memory
        self._turn += 1
        self._recordings[key] = Kept(state, what, self._turn)
        if len(self._recordings) > self.kept:
            oldest = self._recordings.pop(min(self._recordings, key=lambda key: self._recordings[key].turn))
            oldest.case.wasted = oldest.case.wasted + 1 if oldest.used < WORTH else 0
            if not any(other.case is oldest.case for other in self._recordings.values()):
                oldest.case.nbytes = 0

    def drop(self, case: Hashable) -> None:
        """The recordings of a case, which will not come again."""
        state = self.cases.get(case)
        if state is not None:
            self._recordings = {key: kept for key, kept in self._recordings.items() if kept.case is not state}
            state.nbytes = 0

    def stop(self, why: str) -> None:
        """Nothing is recorded or replayed any more."""
        self.off = why
        self._recordings.clear()
        self._seen.clear()
        for case in self.cases.values():
            case.nbytes = 0

    def explain(self) -> str:
        """How much was recorded and replayed; '' where there was nothing."""
        calls = sum(case.calls for case in self.cases.values())
        replayed = sum(case.replayed for case in self.cases.values())
        if self.off:
            return f"replay: off, {self.off}"
        if not calls:
            return ""
        return f"replay: {replayed} of {calls} calls by {len(self)} recordings, {self.nbytes() / 2**20:.0f} MiB"
