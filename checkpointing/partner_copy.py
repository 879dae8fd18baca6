"""The way out: a rank's shard goes to its partner many chunks at a time, while later ones are still copied.

The `TierFile` sends from the generation in which the chunks land, so nothing else is held. Each call gives the
interpreter away, and a training thread that is busy with Python waits to have it back: hence many chunks in one. What
its `Committer` writes beside the shard (objects; on rank 0 the metadata, the manifest and COMMIT.json) passes through
the folder's `FileOps` and takes the same way; and to make the folder durable is to hear from the partner that it has
everything.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..dist.trace import Trace
from .copies import HostCopier
from .files import FileOps
from .folder import Folder
from .generation import Generation, still_there
from .layout import Image
from .manifest import COMMIT, MANIFEST, METADATA, FileRecord, Manifest, checksum, commit_bytes
from .partner_memory import seal
from .partner_wire import Link

RUN = 16  # chunks in one message: 256 MiB


@dataclass(frozen=True)
class Errand:
    """Which save goes where: `save` is its name over all jobs, `number` counts a job's tries; `plan` and `slot` name
    the room at the partner."""

    save: str
    step: int
    number: int
    plan: int
    slot: int


class PartnerOps(FileOps):
    """Files in memory. Those of the save that is on its way are written at the partner as well. One thread."""

    def __init__(self) -> None:
        super().__init__(direct=False, syncs=False)
        self._link: Link | None = None
        self._path, self._errand = Path(), Errand("", 0, 0, 0, 0)
        self._sealed = False

    def begin(self, link: Link | None, path: Path, errand: Errand, nbytes: int) -> None:
        """From now on what is written into the folder `path` belongs to this errand, and `nbytes` of shard follow.
        Without a `link` all of it stays here."""
        self._link, self._path, self._errand, self._sealed = link, path, errand, False
        if link is not None:
            link.start()
            link.tell({"do": "begin", "nbytes": nbytes, **asdict(errand)})

    def chunk(self, begin: int, view: memoryview, total: str) -> None:
        if self._link is not None:
            self._link.tell({"do": "chunk", "begin": begin, "nbytes": len(view), "sum": total}, view)

    def write_file(self, path: Path, data: bytes) -> None:
        super().write_file(path, data)
        if self._link is not None and path.parent == self._path:
            if self._sealed:  # the votes took their own time
                self._link.start()
            self._link.tell({"do": "file", "name": path.name, "nbytes": len(data), "sum": checksum(data)}, data)

    def fsync_dir(self, path: Path) -> None:
        if path != self._path:
            return
        if self._link is not None:
            self._link.ask({"do": "sync" if self._sealed else "seal"})
        if not self._sealed:
            seal(path, self._errand.save, self._errand.step, self._errand.number)
        self._sealed = True

    def end(self) -> None:
        """Nothing is on its way any more; a half-sent copy is cut off."""
        link, self._link, self._path = self._link, None, Path()
        if link is not None:
            link.close()


class PartnerFolder(Folder):
    """The entry of rank 0 becomes the checkpoint, at its partner first, when the votes of all are in. `known`: the
    steps that a restart would find."""

    def __init__(self, root: Path, ops: FileOps, known: Callable[[], list[int]]) -> None:
        super().__init__(root, ops)
        self._known = known

    def committed(self) -> list[int]:
        return self._known()

    def commit(self, scratch: Path, manifest: Manifest, metadata: bytes) -> Path:
        data = manifest.dumps()
        self.ops.write_file(scratch / METADATA, metadata)
        self.ops.write_file(scratch / MANIFEST, data)
        self.ops.fsync_dir(scratch)
        self.ops.write_file(scratch / COMMIT, commit_bytes(data, manifest.step, time.time()))
        self.ops.fsync_dir(scratch)
        return scratch


class PartnerFile:
    """The `TierFile` of one save: `path` is the shard file of a generation. `failed` tells why the save is lost, once
    it is."""

    def __init__(
        self,
        path: Path,
        generation: Generation,
        image: Image,
        errand: Errand,
        link: Link | None,
        ops: PartnerOps,
        *,
        copier: HostCopier,
        failed: Callable[[], BaseException | None],
        trace: Trace,
    ) -> None:
        self.path, self._generation, self._image, self._errand = path, generation, image, errand
        self._link, self._ops, self._copier, self._failed, self._trace = link, ops, copier, failed, trace
        self._marks: dict[int, Any] = {}
        self._changed = threading.Condition()
        self._sums: list[str] = []

    def take(self, snapshot: Any, first: int, slots: Sequence[int], mark: Any) -> None:
        """The copies of some chunks have been issued: what a snapshot does with them."""
        with self._changed:
            self._marks.update(dict.fromkeys(range(first, first + len(slots)), mark))
            self._changed.notify_all()

    def begin(self) -> None:
        """Send run after run of chunks, as they come."""
        self._ops.begin(self._link, self.path.parent, self._errand, self._image.size)
        first, waited = 0, object()
        while first < self._image.chunks:
            count, mark = self._await(first)
            if mark is not waited:
                self._copier.wait(mark)
                waited = mark
            with self._trace.span("send", step=self._errand.step, chunk=first, chunks=count):
                self._send(first, count)
            first += count

    def _send(self, first: int, count: int) -> None:
        """Each chunk's checksum is for the manifest, that of the run for the partner."""
        begins = [self._image.chunk_range(chunk)[0] for chunk in range(first, first + count)]
        end = self._image.chunk_range(first + count - 1)[1]
        with self._generation.view(first, end - begins[0]) as view:
            for begin, after in zip(begins, (*begins[1:], end)):
                with view[begin - begins[0] : after - begins[0]] as part:
                    self._sums.append(checksum(part))
            if self._link is not None:
                self._ops.chunk(begins[0], view, self._sums[-1] if count == 1 else checksum(view))

    def _await(self, first: int) -> tuple[int, Any]:
        """How many chunks from `first` have been issued together, at most `RUN`, and their mark."""
        with self._changed:
            while first not in self._marks:
                if (error := self._failed()) is not None:
                    raise error
                self._changed.wait(timeout=0.2)
            mark, count = self._marks[first], 1
            while count < RUN and first + count in self._marks and self._marks[first + count] is mark:
                count += 1
            return count, mark

    def wait(self) -> None:
        """Nothing to wait for: `begin` sends."""

    def finish(self) -> FileRecord:
        still_there(self.path)
        return FileRecord(self._image.size, tuple(self._sums))

    def abandon(self) -> None:
        self._ops.end()
