"""Making one tier's copy of a save valid: durable files, a vote of all ranks, publication, retention.

Each tier has a committer with a thread of its own, so that a slow disk never delays the host-memory tier. Saves are
finished strictly in order. Ranks vote through the `Coordinator`; a vote that is late, missing or against drops that
save alone, and training goes on.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from ..dist.log import get_logger
from ..dist.trace import Trace
from ..dist.version import __version__
from .attempt import Refused, SaveLost, kept, reason_of
from .coordinate import Coordinator
from .dcp_metadata import DcpMetadata
from .files import together
from .manifest import METADATA, FileRecord, Manifest, ObjectRecord, checksums
from .pruning import Home, Pruner
from .retention import Retention
from .save import Save, SaveReport

log = get_logger(__name__)
WORDS = 16  # of a rank that are kept in the store: each has been heard long before so many others are said


class TierFile(Protocol):
    """A rank's shard file in one tier."""

    path: Path

    def begin(self) -> None:
        """Called first, while chunks are still on their way: a tier that fetches its bytes itself does so here."""
        ...

    def wait(self) -> None:
        """Return when all bytes handed over have been dealt with."""
        ...

    def finish(self) -> FileRecord:
        """Make it durable, as far as the tier can."""
        ...

    def abandon(self) -> None: ...


@dataclass
class Part:
    """A save's way into one tier; `after` is called when it has ended, well or not. `disposable`: remove what was
    written when it failed. `follows`: when this one fails, the save's other tiers go on; its bytes are theirs.
    `ahead` is called on rank 0 when it is committed, and the others are `told` what it returns, with the verdict."""

    save: Save
    file: TierFile
    disposable: bool = True
    after: Callable[[bool], None] = lambda ok: None
    follows: bool = False
    ahead: Callable[[], Any] = lambda: None
    told: Callable[[Any], None] = lambda word: None


class Committer:
    """The committing thread of one tier. `keep`: which checkpoints to retain, or how many newest (None: all)."""

    def __init__(
        self,
        tier: str,
        folder: Home,
        coordinator: Coordinator,
        *,
        keep: int | Retention | None,
        timeout_s: float,
        trace: Trace,
    ) -> None:
        self.tier, self.folder, self.coordinator = tier, folder, coordinator
        self._timeout_s, self._trace = timeout_s, trace
        self._pruner = Pruner(tier, folder, keep)
        self._queue: queue.SimpleQueue[Part | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[tuple[Save, str, bool, float, float]] = queue.SimpleQueue()
        self._open = 0
        self._idle = threading.Condition()
        self._dcp: DcpMetadata | None = None  # of the last plan
        self._said: deque[str] = deque()
        self._left: deque[tuple[int, Path]] = deque()  # of refused saves, to which other ranks may still write
        self._thread = threading.Thread(target=self._loop, name=f"undertow-commit-{tier}", daemon=True)
        self._thread.start()

    def submit(self, part: Part) -> None:
        with self._idle:
            self._open += 1
        self._queue.put(part)

    @property
    def busy(self) -> bool:
        return self._open > 0

    @property
    def waiting(self) -> int:
        """Saves that have not ended, the one under way among them."""
        return self._open

    def drain(self) -> None:
        """Wait until every part handed over has ended, and what retention removes is gone."""
        with self._idle:
            self._idle.wait_for(lambda: self._open == 0)
        self._pruner.drain()

    def reports(self) -> list[SaveReport]:
        """Of the parts that have ended since the last call; for the training thread, which alone knows the fences."""
        found = []
        while not self._ended.empty():
            save, reason, heard, durable_s, ended_s = self._ended.get()
            nbytes = save.plan.image.size + sum(map(len, save.pickled().values()))
            times = (save.call_s, save.fence_s, durable_s, ended_s)
            found.append(SaveReport(save.step, self.tier, not reason, reason, nbytes, *times, heard=heard))
        return found

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()
        self._pruner.close()

    def refuse(self, number: int, step: int, reason: str, scratch: Path) -> None:
        """On the training thread of a rank that gives the save `number` up before it has a part: its vote against, and
        on rank 0 the verdict. What others write to `scratch` is removed when they are known to have ended."""
        name = f"{self.tier}/{number}"
        if self.coordinator.rank == 0:
            self._left.append((number, scratch))
            self._say(f"{name}/verdict", (reason, None))
        else:
            self._say(f"{name}/vote", {"reason": reason, "step": step})

    def _say(self, name: str, word: Any) -> None:
        self.coordinator.say(name, word)
        self._said.append(name)

    def _loop(self) -> None:
        while (part := self._queue.get()) is not None:
            save, reason, heard, durable_s = part.save, "", False, 0.0
            try:
                with self._trace.span("commit", step=save.step):
                    durable_s = self._commit(part, f"{self.tier}/{save.attempt.number}")
            except BaseException as error:
                reason, heard = reason_of(error), isinstance(error, Refused)
                if not part.follows:
                    save.snapshot.fail(error)
                self._tidy(part.file.wait)
                self._tidy(part.file.abandon)
            while len(self._said) > WORDS:
                self.coordinator.forget(self._said.popleft())
            self._tidy(partial(part.after, not reason))
            ended_s = time.monotonic() - save.began_s
            self._ended.put((save, reason, heard, durable_s, ended_s))
            with self._idle:
                self._open -= 1
                self._idle.notify_all()

    def _tidy(self, act: Callable[[], None]) -> None:
        """What follows a save must not end the thread: every later save would wait for it for ever."""
        try:
            act()
        except Exception as error:
            log.warning("after a save to %s: %s", self.tier, reason_of(error))

    def _commit(self, part: Part, name: str) -> float:
        """Durable, vote, publish; the seconds from the call to durable files. Raises when the save is lost."""
        save, planning = part.save, f"{part.save.attempt.at('plan')}/verdict"
        keeps = not save.planned and self.coordinator.world > 1 and self.tier == save.attempt.tiers[0]
        word: dict[str, Any] = {"reason": "", "step": save.step}
        try:
            if keeps:
                self.coordinator.decide(planning, kept(self.coordinator.rank))
            word |= self._make_durable(part)
        except BaseException as error:
            word["reason"] = f"rank {self.coordinator.rank}: {reason_of(error)}"
        durable_s = time.monotonic() - save.began_s
        self._say(f"{name}/vote", word)
        if self.coordinator.rank == 0:
            verdict = self._publish(part, name)
            if keeps:  # all have voted, or given up
                self.coordinator.forget(planning)
            self._say(f"{name}/verdict", (verdict, None if verdict else part.ahead()))
        else:
            deadline_s = time.monotonic() + 2 * self._timeout_s
            verdict, word = self.coordinator.hear(f"{name}/verdict", 0, deadline_s=deadline_s, calm=True)
            if word is not None:
                part.told(word)
        if verdict:
            raise (Refused if self.coordinator.rank else SaveLost)(verdict)
        return durable_s

    def _make_durable(self, part: Part) -> dict[str, Any]:
        save, ops = part.save, self.folder.ops
        try:
            part.file.begin()
        except BaseException as error:
            if not part.follows:  # no writer makes the file once more where it is about to be cleared away
                save.snapshot.fail(error)
                part.file.wait()
            raise
        save.snapshot.wait_filled()
        part.file.wait()
        pickled = save.pickled()
        if save.problem:
            raise SaveLost(save.problem)
        if save.snapshot.error is None:
            save.snapshot.finish()
        if save.snapshot.error is not None:
            raise save.snapshot.error
        if save.snapshot.torn():
            raise SaveLost(
                "the state was written while it was being copied: somebody other than a registered optimizer changed a "
                "parameter or optimizer state without calling fence() first"
            )
        objects, data, position = {}, [], 0
        for key, value in pickled.items():
            objects[key] = ObjectRecord(save.plan.objects_name, position, len(value))
            data.append(value)
            position += len(value)
        joined, files = b"".join(data), dict[str, FileRecord]()

        def finish() -> None:
            files[save.plan.shard_name] = part.file.finish()

        acts, scratch = [finish], part.file.path.parent
        if joined:
            acts.append(partial(ops.write_file, scratch / save.plan.objects_name, joined))
        with self._trace.span("fsync", step=save.step):
            together(ops.syncs, *acts)
            if self.coordinator.rank or not ops.syncs:  # on rank 0 `Folder.commit` does it
                ops.fsync_dir(scratch)
        if joined:
            files[save.plan.objects_name] = checksums(joined, save.plan.image.chunk_bytes)
        return {"files": files, "objects": objects}

    def _publish(self, part: Part, name: str) -> str:
        """Rank 0: hear the votes and commit; the reason against, or ''."""
        save, plan = part.save, part.save.plan
        scratch = part.file.path.parent
        try:
            with self._trace.span("vote", step=save.step):
                words = self.coordinator.hear_all(f"{name}/vote", timeout_s=self._timeout_s, calm=True)
            against = [word["reason"] for word in words if word["reason"]]
            against += [f"rank {rank} saves step {w['step']}" for rank, w in enumerate(words) if w["step"] != save.step]
            if against:
                raise SaveLost("; ".join(against))
            self._clear_away(save.attempt.number, scratch)
            files = {file: record for word in words for file, record in word["files"].items()}
            objects = {key: record for word in words for key, record in word["objects"].items()}
            assert plan.metadata is not None
            if self._dcp is None or self._dcp.metadata is not plan.metadata:
                save_id = f"undertow-{self.coordinator.token}"
                self._dcp = DcpMetadata(plan.metadata, plan.tensors, save_id, plan.image.chunk_bytes)
            metadata, files[METADATA] = self._dcp.file(objects)
            manifest = Manifest(
                save.step,
                plan.world,
                plan.image.chunk_bytes,
                files,
                plan.tensors,
                objects,
                plan.metadata.planner_data,
                {"undertow": __version__, "torch": torch.__version__}
                | ({"metrics": dict(metrics)} if (metrics := save.attempt.metrics) else {}),
                plan.rendered,
            )
            self._pruner.clear(save.step)  # its folder gets this name again
            self.folder.commit(scratch, manifest, metadata)
            try:
                self._pruner.prune()
            except OSError as error:  # it is committed all the same
                log.warning("cannot remove old checkpoints in %s (%s)", self.folder.root, error)
        except BaseException as error:
            with suppress(OSError):  # a late rank may still write there; the next job clears it away
                if part.disposable:
                    self.folder.ops.rmtree(scratch)
            return reason_of(error)
        return ""

    def _clear_away(self, number: int, scratch: Path) -> None:
        """Remove what refused saves have left: every rank has written the later `number` to `scratch`."""
        while self._left and self._left[0][0] < number:
            if (old := self._left.popleft()[1]) != scratch:
                with suppress(OSError):  # a full disk has other worries; the next job clears it away
                    self.folder.ops.rmtree(old)
