"""How ranks agree about a checkpoint without touching the training job's collectives: a key-value store of their own.

A vote that is late or missing must cost one checkpoint, not the job, so nothing here is a collective: rank 0 hosts a
`TCPStore`, the others write their word into it, and every wait has a time-out that names the ranks that are missing,
and ends at once when the `Lifeline` says that such a rank is dead. Where a rank that has waited in vain must not go
another way than one that comes late, the first word written is everyone's (`decide`). Votes are cast in background
threads; a training thread waits in the store when a plan is made, and for rank 0's choice of a generation or interval.
"""

from __future__ import annotations

import pickle
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

from ..dist import launch
from ..dist.errors import PeerLost
from .lifeline import Lifeline

T = TypeVar("T")
SOON_S, LATE_S = 0.0002, 0.05  # pauses between two looks for a word: an eighth of the time waited, between these
NOTHING = "?"  # no pickle
CALM_S = 0.002  # the first pause of a background thread: each look takes the interpreter from the training thread


def current_rank() -> int:
    """This process's rank in torch.distributed's default group, 0 when there is none."""
    return dist.get_rank() if dist.is_initialized() else 0


class Coordinator:
    """Rank `rank` of `world`. Messages are keyed by a name that all ranks derive alike, such as 'save/12/vote'."""

    def __init__(self, rank: int, world: int, store: dist.Store, token: str, lifeline: Lifeline) -> None:
        self.rank, self.world, self.store, self.token, self.lifeline = rank, world, store, token, lifeline
        self._threads = threading.local()
        self._met: list[str] = []  # meetings whose words are in the store
        self.round = 0  # counts the restores of this run, alike on all ranks

    @classmethod
    def from_default_group(cls, *, timeout_s: float = 300.0) -> Coordinator:
        """One for torch.distributed's default group (or for one process when there is none). Collective."""
        token = secrets.token_hex(4)
        if not dist.is_initialized() or dist.get_world_size() == 1:
            lifeline = Lifeline(0, 1, token)
            lifeline.start()
            return cls(0, 1, dist.HashStore(), token, lifeline)
        rank, world = dist.get_rank(), dist.get_world_size()
        host = launch.detect().master_addr
        store, pulse = None, 0
        lifeline = Lifeline(rank, world, token)
        if rank == 0:
            pulse = lifeline.listen(host)
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
        word = [(host, store.port, pulse, token) if store is not None else None]
        dist.broadcast_object_list(word, src=0)
        assert word[0] is not None
        host, port, pulse, token = word[0]
        if store is None:
            store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))
            lifeline = Lifeline(rank, world, token)
            lifeline.connect(host, pulse, timeout_s=timeout_s)
        lifeline.start()
        return cls(rank, world, store, token, lifeline)

    @property
    def _mine(self) -> dist.Store:
        """The calling thread's own connection. A wait blocks every other call on its connection, and each tier votes in
        a thread of its own: on a shared one the ranks would wait for words that they keep each other from saying."""
        if not hasattr(self._threads, "store"):
            self._threads.store = self.store.clone()  # type: ignore[attr-defined]  # its stub lacks it
        return self._threads.store

    def say(self, name: str, value: Any) -> None:
        """Publish this rank's word for `name`."""
        self._mine.set(f"{name}/{self.rank}", cast(str, pickle.dumps(value)))  # it takes bytes; its stub says str

    def decide(self, name: str, value: Any) -> Any:
        """Every rank's verdict on `name`: the `value` of whoever came first. `hear(name, 0)` reads it too. Raises
        `PeerLost` when the store is gone."""
        mine = pickle.dumps(value)
        try:
            return pickle.loads(self._mine.compare_set(f"{name}/0", "", cast(str, mine)))
        except (RuntimeError, dist.DistError) as error:
            raise PeerLost(f"rank 0 is gone, so '{name}' has no verdict ({str(error).splitlines()[0]})") from error

    def lead(
        self, name: str, value: Any, *, otherwise: Any, timeout_s: float, but: Callable[[], bool] | None = None
    ) -> Any:
        """Rank 0's `value` on all ranks; or `otherwise` on all, where one has waited `timeout_s` for it in vain. Raises
        `PeerLost` when rank 0 is gone. Another rank returns None as soon as `but` is true."""
        if self.rank == 0:
            return self.decide(name, value)
        try:
            return self.hear(name, 0, deadline_s=time.monotonic() + timeout_s, but=but)
        except PeerLost:
            return self.decide(name, otherwise)

    def together(self, name: str, work: Callable[[], T], *, timeout_s: float) -> T:
        """`work()`, in which the ranks exchange words; done on all of them, or `PeerLost` on all, also on one that
        comes too late, and where one runs out of memory or space. Waits inside it name f"{name}/verdict" as `unless`.
        Other errors are for `work` to spread."""
        earlier, self._met = self._met, [*self._met, name]
        try:
            done, verdict = work(), f"{name}/verdict"
            self.say(f"{name}/done", True)
            if self.rank == 0:  # whose verdict must not come before another's failure
                self.hear_all(f"{name}/done", timeout_s=timeout_s, unless=verdict)
        except (PeerLost, MemoryError, OSError, RuntimeError) as error:
            lost = str(error) if isinstance(error, PeerLost) else f"rank {self.rank}: {type(error).__name__}: {error}"
            raise PeerLost(self.decide(f"{name}/verdict", lost) or lost) from error
        late = f"rank {self.rank} waited in vain for '{name}'"
        if problem := self.lead(verdict, "", otherwise=late, timeout_s=timeout_s):
            raise PeerLost(problem)
        for meeting in earlier:  # all ranks have been here, so none comes late to those any more
            self.forget(f"{meeting}/done")
            self.forget(f"{meeting}/verdict")
        self._met = [name]
        return done

    def hear(
        self,
        name: str,
        rank: int,
        *,
        deadline_s: float,
        unless: str = "",
        calm: bool = False,
        but: Callable[[], bool] | None = None,
    ) -> Any:
        """The word of `rank`; waits until the monotonic time `deadline_s`, or until `rank` is known to be dead or to
        have closed its checkpoints, or a verdict on `unless` says why nobody will answer, then raises `PeerLost`.
        `calm`: nobody waits for this thread, so it looks seldom. None when `but` becomes true."""
        key, began_s = f"{name}/{rank}", time.monotonic()
        while True:
            if but is not None and but():
                return None
            dead, left = rank in self.lifeline.gone, rank in self.lifeline.left  # before its last word is looked for
            try:  # `wait` would do, but every time-out of it prints a warning
                if (word := self._look(key)) is not None:
                    return pickle.loads(word)
                if unless and (verdict := self._look(f"{unless}/0")) is not None:
                    if (word := self._look(key)) is not None:  # said between the two looks, before the verdict
                        return pickle.loads(word)
                    raise PeerLost(pickle.loads(verdict))
            except (RuntimeError, dist.DistError) as error:
                raise PeerLost(f"rank 0 is gone, so '{name}' has no answer ({str(error).splitlines()[0]})") from error
            if dead:
                raise PeerLost(f"rank {rank} died before it answered '{name}'")
            if left:
                raise PeerLost(f"rank {rank} has closed its Checkpointer and does not answer '{name}'")
            now_s = time.monotonic()
            if now_s >= deadline_s:
                raise PeerLost(f"rank {rank} did not answer '{name}' in time ({now_s - began_s:.0f} s)")
            time.sleep(_pause_s(now_s - began_s, calm))

    def _look(self, key: str) -> bytes | None:
        """What has been said under `key`, None when nothing has: one exchange with the store, where `check` and `get`
        would take two. A key that is not there keeps being absent, and the word expected of it comes back."""
        word = self._mine.compare_set(key, NOTHING, NOTHING)
        return None if word == NOTHING.encode() else word

    def hear_all(self, name: str, *, timeout_s: float, unless: str = "", calm: bool = False) -> list[Any]:
        """Every rank's word, in rank order."""
        began_s = time.monotonic()
        deadline_s = began_s + timeout_s
        keys = [f"{name}/{rank}" for rank in range(self.world)]
        away = self.lifeline.gone, self.lifeline.left
        while calm and not unless and not any(away) and (now_s := time.monotonic()) < deadline_s:
            try:  # one look at all of them
                if self._mine.check(keys):
                    return [pickle.loads(word) for word in self._mine.multi_get(keys)]
            except (RuntimeError, dist.DistError):  # rank 0 is gone: `hear` says so
                break
            time.sleep(_pause_s(now_s - began_s, calm))
        return [self.hear(name, rank, deadline_s=deadline_s, unless=unless, calm=calm) for rank in range(self.world)]

    def part(self, *, timeout_s: float = 60.0) -> None:
        """Leave. Rank 0, whose process hosts the store, first waits until the others have read its last words; one that
        hangs costs `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        with suppress(RuntimeError, dist.DistError):  # rank 0 is gone: nobody hears it
            self.say("part", True)
            self._look(f"part/{self.rank}")  # the store has it before the lifeline says that this rank has left
        for rank in range(1, self.world if self.rank == 0 else 0):
            with suppress(PeerLost):  # whoever is gone needs no words any more
                self.hear("part", rank, deadline_s=deadline_s)
        self.lifeline.close()

    def forget(self, name: str) -> None:
        """Delete this rank's word, so that a long run does not fill the store."""
        with suppress(RuntimeError, dist.DistError):  # rank 0 is gone, and the store with it
            self._mine.delete_key(f"{name}/{self.rank}")


def _pause_s(waited_s: float, calm: bool) -> float:
    return min(max(CALM_S, waited_s / 2) if calm else max(SOON_S, waited_s / 8), LATE_S)
