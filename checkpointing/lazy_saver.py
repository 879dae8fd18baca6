"""Files that leave late, gathered into saves that all ranks commit together: for frameworks that lay out their own.

A framework's adapter adds `LazyFile`s, seals them with a function that commits them, and calls `fence` before anyone
writes parameters. One background thread copies, writes and commits; a save that fails is reported, and training goes
on. The commit's phases are votes in a key-value store, never collectives, so no rank's training waits for another's.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..dist.log import get_logger
from .attempt import Refused, SaveLost, reason_of
from .coordinate import Coordinator
from .lazy_file import HostBuffers, LazyFile

log = get_logger(__name__)
Phase = Callable[..., list[Any]]  # (name, act, word=None): act on every rank; every rank's word, or RuntimeError


@dataclass(frozen=True)
class _Save:
    name: str
    files: list[LazyFile]
    commit: Callable[[list[LazyFile], Phase], None]


class LazySaver:
    """One per rank; creating it is collective. `reports` tells how each save ended: (name, '' or the reason)."""

    def __init__(self, *, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.reports: list[tuple[str, str]] = []
        self.coordinator = Coordinator.from_default_group(timeout_s=timeout_s)
        self.buffers = HostBuffers()
        self._files: list[LazyFile] = []
        self._unfenced: list[LazyFile] = []
        self._jobs: queue.Queue[_Save | LazyFile | None] = queue.Queue()
        self._pending = 0
        self._idle = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="undertow-lazy-saver", daemon=True)
        self._thread.start()
        atexit.register(_close, weakref.ref(self))

    def add(self, file: LazyFile) -> None:
        """Begin to copy `file` in the background; it belongs to the save that is sealed next."""
        self._files.append(file)
        self._unfenced.append(file)
        self._jobs.put(file)

    def seal(self, name: str, commit: Callable[[list[LazyFile], Phase], None]) -> None:
        """This rank has added all files of a save: `commit(files, phase)` is called in the background."""
        files, self._files = self._files, []
        with self._idle:
            self._pending += 1
        self._jobs.put(_Save(name, files, commit))

    def fence(self) -> None:
        """On the training thread: what it does next cannot change a file."""
        for file in self._unfenced:
            file.fence()
        self._unfenced.clear()

    def drain(self) -> None:
        """Wait until every sealed save has ended."""
        self.fence()
        with self._idle:
            self._idle.wait_for(lambda: not self._pending)

    def close(self) -> None:
        """Drain, and end the thread. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self.drain()
        self._jobs.put(None)
        self._thread.join()
        self.coordinator.part()

    # -- in the background -------------------------------------------------------------------------------------------

    def _work(self) -> None:
        sequence = 0
        while (job := self._jobs.get()) is not None:
            if isinstance(job, LazyFile):
                job.copy()
                continue
            sequence += 1
            reason = self._end(job, f"lazy/{sequence}")
            for file in job.files:
                file.release()
            self.reports.append((job.name, reason))
            with self._idle:
                self._pending -= 1
                self._idle.notify_all()

    def _end(self, save: _Save, prefix: str) -> str:
        def phase(name: str, act: Callable[[], None], word: Any = None) -> list[Any]:
            return self._together(f"{prefix}/{name}", act, word)

        try:
            save.commit(save.files, phase)
        except Exception as error:
            reason = reason_of(error)
            if not isinstance(error, Refused):
                log.warning("the checkpoint %s is not saved: %s", save.name, reason)
            return reason
        return ""

    def _together(self, name: str, act: Callable[[], None], word: Any) -> list[Any]:
        """Act on every rank; every rank's word (taken after the act), or the first reason against."""
        coordinator, problem = self.coordinator, ""
        try:
            act()
        except Exception as error:
            problem = reason_of(error)
        coordinator.say(name, (problem, word))
        if coordinator.rank == 0:
            words = coordinator.hear_all(name, timeout_s=self.timeout_s)
            against = [f"rank {rank}: {reason}" for rank, (reason, _) in enumerate(words) if reason]
            coordinator.say(f"{name}/verdict", ("; ".join(against), [each for _, each in words]))
        deadline_s = time.monotonic() + 2 * self.timeout_s
        verdict, words = coordinator.hear(f"{name}/verdict", 0, deadline_s=deadline_s)
        if verdict:
            raise (Refused if coordinator.rank else SaveLost)(verdict)
        return words


def _close(reference: weakref.ref[LazySaver]) -> None:
    saver = reference()
    if saver is not None:
        saver.close()
