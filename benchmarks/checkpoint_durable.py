"""When a save became durable, seen by the same rule for every way to checkpoint, while training goes on.

A thread asks the way's own sign that it has written everything (its future, or its commit), every 5 ms.
Then it fsyncs each file of the save and each folder itself, and takes the time: a way that had synced before finds
nothing left to do, and one that had not is made as durable as the others, beside the steps that follow.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from undertow.benchmarks.checkpoint_job import Method

ASK_S = 5e-3


class Watch:
    """Watches one save of `method`, begun at `began_s` of time.perf_counter(); `written_s` and `durable_s` count from
    there."""

    def __init__(self, method: Method, began_s: float) -> None:
        self.began_s, self.written_s, self.durable_s = began_s, 0.0, 0.0
        self._written, self._path = method.written_sign(), method.path
        self._problem: Exception | None = None
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="bench-watch", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        try:
            while not self._written():
                if self._given_up.wait(ASK_S):
                    return
            self.written_s = time.perf_counter() - self.began_s
            sync(self._path)
            self.durable_s = time.perf_counter() - self.began_s
        except Exception as error:
            self._problem = error

    def result(self, timeout_s: float = 120.0) -> None:
        """Wait for the end; raises what stood in the way."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._given_up.set()
            self._thread.join()
            self._problem = self._problem or TimeoutError(f"no sign of a complete save within {timeout_s:.0f} s")
        if self._problem is not None:
            raise self._problem


def sync(path: Path) -> None:
    """Make a save's file, or its folder with all files and folders in it, durable, its own name included."""
    found = [path]
    for folder, names, files in os.walk(path):
        found += [Path(folder, name) for name in (*names, *files)]
    for each in (*found, path.parent):
        try:
            handle = os.open(each, os.O_RDONLY)
        except FileNotFoundError:  # ours: retention has removed it, because a later save is committed
            continue
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
