"""The background half of a save: one thread fills chunks, a few hash and write them, and committers finish tiers.

The training thread hands a `Save` over and never waits here; what it waits for is the fence, in `snapshot`.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from ..dist.trace import Trace
from .arena import Arena, Memory
from .committer import Committer, Part
from .copies import HostCopier
from .flush import ShardFile, flush_chunk
from .save import Save, SaveReport
from .snapshot import Snapshot

FAR = ("mirror", "bucket")  # tiers that read files of the disk and no memory that training waits for


class Pipeline:
    """Threads and queues of one `Checkpointer`, over the committers of its tiers."""

    def __init__(self, committers: Sequence[Committer], *, writers: int, trace: Trace) -> None:
        self.committers, self.trace = tuple(committers), trace
        self._queue: queue.SimpleQueue[tuple[Save, Sequence[tuple[Committer, Part]]] | None] = queue.SimpleQueue()
        self._copying = 0
        self._idle = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._calls: queue.SimpleQueue[bool] = queue.SimpleQueue()  # True: look for jobs; False: end
        self._writers = [
            threading.Thread(target=self._write_loop, name=f"undertow-writer_{index}", daemon=True)
            for index in range(writers)
        ]
        for writer in self._writers:
            writer.start()
        self._thread = threading.Thread(target=self._copy_loop, name="undertow-copier", daemon=True)
        self._thread.start()
        self.closed = False

    def submit(self, save: Save, parts: Sequence[tuple[Committer, Part]]) -> None:
        """Hand a save over, with its part for each tier; returns at once."""
        with self._idle:
            self._copying += 1
        self._queue.put((save, parts))

    def flush(
        self,
        file: ShardFile,
        memory: Memory,
        copier: HostCopier,
        snapshot: Snapshot,
        first: int,
        slots: Sequence[int],
        mark: Any,
    ) -> None:
        """Give the filled chunks `first`, `first` + 1, … to the writers."""
        file.issue(len(slots))
        if isinstance(memory, Arena):
            self.trace.counter("arena_bytes", memory.occupied * memory.chunk_bytes)
        write = partial(flush_chunk, file, snapshot, mark, memory=memory, copier=copier, trace=self.trace)
        self._jobs.extend(partial(write, chunk, slot) for chunk, slot in enumerate(slots, first))
        for _ in self._writers[: len(slots)]:  # one call for each chunk would be dear
            self._calls.put(True)

    def _write_loop(self) -> None:
        while self._calls.get():
            while (job := self._next_job()) is not None:
                job()

    def _next_job(self) -> Callable[[], None] | None:
        with suppress(IndexError):
            return self._jobs.popleft()
        return None

    def _copy_loop(self) -> None:
        while (item := self._queue.get()) is not None:
            save, parts = item
            save.snapshot.issue()
            for committer, part in parts:  # a mirror starts while chunks are still copied
                committer.submit(part)
            with self.trace.span("copy", step=save.step):
                while save.snapshot.fill_next():
                    pass
            with self._idle:
                self._copying -= 1
                self._idle.notify_all()

    @property
    def busy(self) -> bool:
        return self._copying > 0 or any(committer.busy for committer in self.committers)

    def drain(self, *, far: bool = True, only: str = "") -> None:
        """Wait until every submitted save has ended in every tier, or `only` in one; not `far`: in those that need the
        arena or host memory, while others may go on reading what these have written."""
        with self._idle:
            self._idle.wait_for(lambda: self._copying == 0)
        for committer in self.committers:
            if committer.tier == only if only else far or committer.tier not in FAR:
                committer.drain()

    def reports(self) -> list[SaveReport]:
        """The reports that have come since the last call."""
        return [report for committer in self.committers for report in committer.reports()]

    def close(self) -> None:
        """Stop the threads; whatever is in flight must have been drained."""
        self.closed = True
        self._queue.put(None)
        self._thread.join()
        for _ in self._writers:
            self._calls.put(False)
        for writer in self._writers:
            writer.join()
        for committer in self.committers:
            committer.close()
