"""Whose turn it is: which generation of shared memory the next save overwrites, and who still uses the others.

The newest valid generation is never overwritten, and none that a commit or another tier's flush is using. Rank 0 alone
knows and decides; what it has chosen ahead of a save, in the background, all ranks know. How they hear of it, and what
a generation is, is `host_tier`'s affair.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from .attempt import Attempt
from .choices import StateFirst
from .memory_folder import MemoryFolder

Claim = tuple[int, Path]  # a generation, and its folder


@dataclass
class Slot:
    """What rank 0 knows of a generation: the step it holds (None: nothing valid), its users, and the step that is being
    written into it."""

    step: int | None = None
    users: set[str] = field(default_factory=set)
    coming: int | None = None


@dataclass
class FolderSlot(Slot):
    """One that is a folder of its own."""

    folder: Path = Path()


def all_free(slots: Sequence[Slot], step: int | None = None) -> list[int]:
    """What a save of `step` may overwrite: nothing in use, and not the newest valid one, unless it is of that step; and
    nothing else then, because a folder bears its step's name."""
    same = [index for index, slot in enumerate(slots) if step is not None and step in (slot.step, slot.coming)]
    newest = max((slot.step for slot in slots if slot.step is not None), default=None)
    usable = same or [index for index, slot in enumerate(slots) if slot.step is None or slot.step != newest]
    return [index for index in usable if not slots[index].users]


def next_free(slots: Sequence[Slot], step: int | None = None) -> int | None:
    """The oldest of them, one that holds nothing first; None when there is none."""
    free = all_free(slots, step)
    return min(free, key=lambda index: -1 if (held := slots[index].step) is None else held, default=None)


class Turns:
    """The generations of one job in `folder`, by index. `token` names the job; `leads`: this is rank 0."""

    def __init__(self, folder: MemoryFolder, token: str, *, leads: bool) -> None:
        self._folder, self._token, self._leads = folder, token, leads
        self.slots: list[FolderSlot] = []
        self.doubted = False  # rank 0: a commit has failed, perhaps because somebody has removed files
        self.outside: set[int] = set()  # rank 0: steps that may be in memory and are in no slot
        self._changed = threading.Condition()
        self._ahead: dict[int, Claim] = {}  # attempt → what has been chosen for it, on all ranks
        self._numbered = 0  # the last attempt that has asked
        self._names = 0  # scratch folders that have been named

    def begin(self, folders: Sequence[Path]) -> None:
        """New generations, in these folders; nothing is in them."""
        self.slots, self.doubted = [FolderSlot(folder=folder) for folder in folders], False

    def end(self) -> None:
        """Nobody writes to the generations any more; what is valid in them stays."""
        self.outside |= {slot.step for slot in self.slots if slot.step is not None}
        self.slots, self._ahead = [], {}

    def choose(self, step: int, *, flush: bool, again: bool) -> Claim | StateFirst | None:
        """Rank 0: a generation for a save of `step`. `again`: nothing can be done meanwhile, so wait for a commit."""
        self.forget_after(step)
        with self._changed:
            # a commit in memory takes milliseconds and is worth waiting for, but first the state can be read meanwhile;
            # a flush to disk is not
            if not again and next_free(self.slots, step) is None and self._committing():
                return StateFirst()
            self._changed.wait_for(
                lambda: next_free(self.slots, step) is not None or not self._committing(), timeout=1.0
            )
            index = next_free(self.slots, step)
            if index is None:
                return None
            self._take(index, self.scratch(step))
            self._use(index, {"host", "flush"} if flush else {"host"}, step)
            return index, self.slots[index].folder

    def _committing(self) -> bool:
        return any(slot.users == {"host"} for slot in self.slots)

    def scratch(self, step: int) -> Path:
        """Rank 0: a name for a folder that is no checkpoint yet, never given before."""
        self._names += 1
        return self._folder.scratch(step, f"{self._token}-{self._names:x}")

    def _take(self, index: int, scratch: Path) -> None:
        """The generation holds nothing valid any more, and is now in the folder `scratch`."""
        slot = self.slots[index]
        self._folder.reuse(slot.folder, scratch)
        slot.folder, slot.step = scratch, None

    # -- ahead --------------------------------------------------------------------------------------------------------

    def chosen(self, attempt: Attempt, *, flush: bool) -> Claim | None:
        """What has been chosen for `attempt`, if its step is later than all before; a choice in vain is given back."""
        with self._changed:
            self._numbered = attempt.number
            found = self._ahead.pop(attempt.number, None)
            vain = [self._ahead.pop(number)[0] for number in [*self._ahead] if number < attempt.number]
            if found is not None and not attempt.rising:
                vain, found = [*vain, found[0]], None
            for index in vain:
                self._use(index, set())
            if found is not None:
                self._use(found[0], {"host", "flush"} if flush else {"host"}, attempt.step)
        return found

    def _use(self, index: int, users: set[str], coming: int | None = None) -> None:
        if self._leads:
            self.slots[index].users, self.slots[index].coming = users, coming

    def known(self, number: int) -> bool:
        """Whether there is a choice for that attempt."""
        return number in self._ahead

    def choose_ahead(self, index: int, step: int, number: int) -> tuple[int, int, Path] | None:
        """Rank 0, in the background: `step`, the attempt `number`, has been committed in generation `index`. The
        attempt after the next one gets a generation now, if one is free and the next one has its own or another is
        free for it, so that no training thread has to wait for rank 0's: that attempt's number, the generation and its
        folder, which all ranks are told with the verdict."""
        with self._changed, suppress(OSError):
            held = self.slots[index]
            held.step, held.folder = step, self._folder.final(step)
            later = number + 2
            between = number + 1 > self._numbered and number + 1 not in self._ahead
            free = next_free(self.slots)
            if free is None or later <= self._numbered or len(all_free(self.slots)) <= between:
                return None
            self._take(free, self._folder.scratch(0, f"{self._token}-{later:x}-{free:x}"))
            self.slots[free].users = {"ahead"}
            self._ahead[later] = free, self.slots[free].folder
            return later, *self._ahead[later]
        return None

    def forget_choices(self) -> None:
        """What has been chosen ahead is void, on all ranks."""
        with self._changed:
            for index, _ in self._ahead.values():
                self._use(index, set())
            self._ahead = {}

    def told(self, word: tuple[int, int, Path]) -> None:
        """Another rank, in the background: what rank 0 has chosen ahead."""
        later, index, folder = word
        with self._changed:
            self._ahead[later] = index, folder

    # -- afterwards ---------------------------------------------------------------------------------------------------

    def done(self, index: int, step: int, user: str, ok: bool) -> None:
        """Rank 0: the use of a generation by `user` ('host': its own commit, 'flush': another tier) has ended."""
        with self._changed:
            slot = self.slots[index]
            slot.users.discard(user)
            slot.coming = None if user == "host" else slot.coming
            if user == "host" and ok:
                slot.step, slot.folder = step, self._folder.final(step)
                for old in self.outside - {slot.step for slot in self.slots}:
                    self._folder.remove(old)  # older now
                self.outside = set()
            elif user == "host":
                self.doubted = True
                self.outside.add(step)  # perhaps published before it failed
            self._changed.notify_all()

    def release(self, index: int) -> None:
        """A generation that was claimed in vain."""
        with self._changed:
            self.slots[index].users, self.slots[index].coming = set(), None
            self._changed.notify_all()

    def forget_after(self, step: int) -> None:
        """Rank 0: checkpoints in memory after `step` are of a branch that was rolled back."""
        self._forget(lambda found: found > step)

    def forget(self, step: int) -> None:
        """Rank 0: what memory has of `step` is not the last save of it."""
        self._forget(lambda found: found == step)

    def _forget(self, which: Callable[[int], bool]) -> None:
        with self._changed:
            for index, slot in enumerate(self.slots):
                if slot.step is not None and which(slot.step):
                    try:
                        self._take(index, self.scratch(slot.step))
                    except OSError:  # somebody has removed it: the next claim finds that out
                        slot.step, self.doubted = None, True
            for found in filter(which, list(self.outside)):
                self._folder.remove(found)
                self.outside.discard(found)
