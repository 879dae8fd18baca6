"""What one rank's threads know of each other while a schedule runs: which actions have finished, and the first error.

A lane is a thread that waits here for the writers of what it reads. An error anywhere poisons the board, so that no
other lane waits for ever, and the caller gets the original exception.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any


class Stopped(Exception):
    """Another lane failed; the board holds its error."""


class Board:
    """One run of one rank. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._finished: set[int] = set()
        self.error: BaseException | None = None

    def finish(self, node: int) -> None:
        with self._changed:
            self._finished.add(node)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Stop all lanes; the first error is kept."""
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()

    def wait(self, nodes: Iterable[int]) -> None:
        """Block until all `nodes` have finished. Raises `Stopped` when a lane has failed and they have not: what is
        complete is still sent, so that other ranks miss no more than they must."""
        needed = set(nodes)
        with self._changed:
            self._changed.wait_for(lambda: self.error is not None or needed <= self._finished)
            if not needed <= self._finished:
                raise Stopped


class Worker:
    """A daemon thread that does what it is given, in order. Its thread is kept from one run to the next.

    A daemon, because a lane may hang in a transport's wait when a peer is gone, and that must not hold the process.
    """

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], _Result] | None] = queue.SimpleQueue()
        threading.Thread(target=self._loop, name=name, daemon=True).start()

    def submit(self, work: Callable[[], Any]) -> _Result:
        result = _Result()
        self._work.put((work, result))
        return result

    def stop(self) -> None:
        """End the thread once it has done what it was given before."""
        self._work.put(None)

    def _loop(self) -> None:
        while (item := self._work.get()) is not None:
            work, result = item
            try:
                result.set(work(), None)
            except BaseException as error:  # handed to whoever asks for the result
                result.set(None, error)
            del item, work, result  # keep no tensors alive while idle


class _Result:
    """What a worker's task returned or raised."""

    def __init__(self) -> None:
        self._done = threading.Event()

    def set(self, value: Any, error: BaseException | None) -> None:
        self._value, self._error = value, error
        self._done.set()

    def get(self) -> Any:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._value
