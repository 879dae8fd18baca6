"""The background half of a save: one thread fills chunks, a few hash and write them, and committers finish tiers.

The training thread hands a `Save` over and never waits here; what it waits for is the fence, in `snapshot`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
        self._pool = ThreadPoolExecutor(writers, thread_name_prefix="undertow-writer")
        self._thread = threading.Thread(target=self._copy_loop, name="undertow-copier", daemon=True)
        self._thread.start()
        self.closed = False

    def submit(self, save: Save, parts: Sequence[tuple[Committer, Part]]) -> None:
        """Hand a save over, with its part for each tier; returns at once."""
        if save.snapshot.issued:  # nothing is left to copy: no other thread need wake for it
            for committer, part in parts:
                committer.submit(part)
            return
        with self._idle:
            self._copying += 1
        self._queue.put((save, parts))

    def flush(
        self, file: ShardFile, memory: Memory, copier: HostCopier, snapshot: Snapshot, chunk: int, slot: int, mark: Any
    ) -> None:
        """Give a filled chunk to a writer."""
        file.issue()
        if isinstance(memory, Arena):
            self.trace.counter("arena_bytes", memory.occupied * memory.chunk_bytes)
        job = partial(flush_chunk, memory=memory, copier=copier, trace=self.trace)
        self._pool.submit(job, file, snapshot, chunk, slot, mark)

    def _copy_loop(self) -> None:
        while (item := self._queue.get()) is not None:
            save, parts = item
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

    def drain(self, *, far: bool = True) -> None:
        """Wait until every submitted save has ended in every tier; not `far`: in those that need the arena or host
        memory, while others may go on reading what these have written."""
        with self._idle:
            self._idle.wait_for(lambda: self._copying == 0)
        for committer in self.committers:
            if far or committer.tier not in FAR:
                committer.drain()

    def reports(self) -> list[SaveReport]:
        """The reports that have come since the last call."""
        return [report for committer in self.committers for report in committer.reports()]

    def close(self) -> None:
        """Stop the threads; whatever is in flight must have been drained."""
        self.closed = True
        self._queue.put(None)
        self._thread.join()
        self._pool.shutdown()
        for committer in self.committers:
            committer.close()
