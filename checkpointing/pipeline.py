"""The background half of a save: copy, write, vote, commit, each in threads that the training thread never waits for.

One copier thread fills chunks in the order of the saves, a few writer threads hash and write them, and one committer
thread finishes saves strictly in order: it makes the files durable, votes, and on rank 0 publishes the checkpoint and
prunes old ones. Ranks vote through the `Coordinator`; a vote that is late, missing or against drops that save alone.
"""

from __future__ import annotations

import io
import pickle
import queue
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta, TensorStorageMetadata

from ..dist.trace import Trace
from ..dist.units import format_bytes, format_seconds
from ..dist.version import __version__
from .arena import Arena
from .coordinate import Coordinator
from .copies import HostCopier
from .flush import ShardFile, flush_chunk
from .folder import Folder
from .manifest import FileRecord, Manifest, ObjectRecord, ShardRecord, TensorRecord, checksums
from .plan import SavePlan
from .retention import to_remove
from .snapshot import Snapshot
from .state import Fresh


@dataclass(frozen=True)
class SaveReport:
    """What one save cost and how it ended. Times in seconds: `call_s` and `fence_s` blocked training, `durable_s` and
    `commit_s` are from the call to durable files on this rank and to the commit on all."""

    step: int
    ok: bool
    reason: str
    nbytes: int
    call_s: float
    fence_s: float
    durable_s: float
    commit_s: float

    def __str__(self) -> str:
        times = f"call {format_seconds(self.call_s)}, fence {format_seconds(self.fence_s)}"
        end = f"committed after {format_seconds(self.commit_s)}" if self.ok else f"failed: {self.reason}"
        return f"step {self.step}: {format_bytes(self.nbytes)}, {times}, {end}"


@dataclass
class Save:
    """One save on its way through the pipeline. `objects` are the values to pickle, taken when the save began."""

    step: int
    plan: SavePlan
    objects: Mapping[str, Any]
    began_s: float
    call_s: float = 0.0
    fence_s: float = 0.0
    durable_s: float = 0.0
    pickled: dict[str, bytes] = field(default_factory=dict)
    snapshot: Snapshot = field(init=False)
    file: ShardFile = field(init=False)

    def __post_init__(self) -> None:
        for key, value in self.objects.items():
            if not isinstance(value, LATER):  # the value may change as soon as training goes on
                self.pickled[key] = pickled(value)

    def pickle_rest(self) -> None:
        """Pickle what nobody can change; for the background."""
        for key, value in self.objects.items():
            if key not in self.pickled:
                self.pickled[key] = pickled(value.value if isinstance(value, Fresh) else value)


LATER = (Fresh, int, float, bool, str, type(None))


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Pipeline:
    """Threads and queues of one `Checkpointer`."""

    def __init__(
        self,
        folder: Folder,
        coordinator: Coordinator,
        *,
        keep: int | None,
        writers: int,
        timeout_s: float,
        trace: Trace,
    ) -> None:
        self.folder, self.coordinator, self.trace = folder, coordinator, trace
        self._keep, self._timeout_s = keep, timeout_s
        self._copy_queue: queue.Queue[Save | None] = queue.Queue()
        self._commit_queue: queue.Queue[Save | None] = queue.Queue()
        self._reports: queue.Queue[SaveReport] = queue.Queue()
        self._open = 0
        self._idle = threading.Condition()
        self._pool = ThreadPoolExecutor(writers, thread_name_prefix="undertow-writer")
        self._threads = [
            threading.Thread(target=self._copy_loop, name="undertow-copier", daemon=True),
            threading.Thread(target=self._commit_loop, name="undertow-committer", daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        self.closed = False
        self._arena: Arena
        self._copier: HostCopier
        self._tensors: dict[str, TensorRecord] = {}

    def use(self, arena: Arena, copier: HostCopier) -> None:
        """Set where bytes pass through; only while nothing is in flight."""
        self._arena, self._copier = arena, copier

    def new_plan(self, plan: SavePlan, name: str) -> None:
        """Tell rank 0 where this rank's tensors will lie. Called on every rank after `make_plan`."""
        shards = []
        for index, placed in zip((*plan.eager, *plan.lazy), (*plan.image.eager, *plan.image.lazy)):
            shards.append((index, placed.start, placed.frame.size, placed.payload))
        self.coordinator.say(f"{name}/placed", (plan.shard_name, shards))
        if plan.metadata is not None:
            words = self.coordinator.hear_all(f"{name}/placed", timeout_s=self._timeout_s)
            self._tensors = _tensor_records(plan, words)

    def file_for(self, save: Save) -> ShardFile:
        """The shard file that `save` will be written to."""
        scratch = self.folder.scratch(save.step, self.coordinator.token)
        return ShardFile(self.folder.ops, scratch / save.plan.shard_name, save.plan.image)

    def submit(self, save: Save) -> None:
        """Hand a save over; returns at once."""
        with self._idle:
            self._open += 1
        self._copy_queue.put(save)

    @property
    def busy(self) -> bool:
        return self._open > 0

    def reports(self) -> list[SaveReport]:
        """The reports that have come since the last call."""
        found = []
        while True:
            try:
                found.append(self._reports.get_nowait())
            except queue.Empty:
                return found

    def drain(self) -> None:
        """Wait until every submitted save has ended."""
        with self._idle:
            self._idle.wait_for(lambda: self._open == 0)

    def close(self) -> None:
        """Stop the threads; whatever is in flight must have been drained."""
        self.closed = True
        self._copy_queue.put(None)
        self._commit_queue.put(None)
        for thread in self._threads:
            thread.join()
        self._pool.shutdown()

    # -- copying and writing --------------------------------------------------------------------------------------

    def flush(self, file: ShardFile, snapshot: Snapshot, chunk: int, slot: int, mark: Any) -> None:
        """Give a filled chunk to a writer."""
        file.issue()
        job = partial(flush_chunk, arena=self._arena, copier=self._copier, trace=self.trace)
        self._pool.submit(job, file, snapshot, chunk, slot, mark)

    def _copy_loop(self) -> None:
        while (save := self._copy_queue.get()) is not None:
            with self.trace.span("copy", step=save.step):
                while save.snapshot.fill_next():
                    pass
            self._commit_queue.put(save)

    # -- committing -----------------------------------------------------------------------------------------------

    def _commit_loop(self) -> None:
        sequence = 0
        while (save := self._commit_queue.get()) is not None:
            sequence += 1
            reason = ""
            try:
                with self.trace.span("commit", step=save.step):
                    self._finish(save, f"save/{sequence}")
            except BaseException as error:
                reason = f"{type(error).__name__}: {error}"
                save.file.wait()
                save.file.abandon()
            self.coordinator.forget(f"save/{sequence - 2}/vote")
            commit_s = time.monotonic() - save.began_s
            self._reports.put(
                SaveReport(
                    save.step,
                    not reason,
                    reason,
                    save.plan.image.size + sum(map(len, save.pickled.values())),
                    save.call_s,
                    save.fence_s,
                    save.durable_s,
                    commit_s,
                )
            )
            with self._idle:
                self._open -= 1
                self._idle.notify_all()

    def _finish(self, save: Save, name: str) -> None:
        word: dict[str, Any] = {"reason": ""}
        try:
            word |= self._make_durable(save)
        except BaseException as error:
            save.snapshot.fail(error)
            word["reason"] = f"{type(error).__name__}: {error}"
        save.durable_s = time.monotonic() - save.began_s
        self.coordinator.say(f"{name}/vote", word)
        if self.coordinator.rank == 0:
            verdict = self._publish(save, name)
            self.coordinator.say(f"{name}/verdict", verdict)
        else:
            deadline_s = time.monotonic() + 2 * self._timeout_s
            verdict = self.coordinator.hear(f"{name}/verdict", 0, deadline_s=deadline_s)
        if verdict:
            raise RuntimeError(verdict)

    def _make_durable(self, save: Save) -> dict[str, Any]:
        snapshot, ops = save.snapshot, self.folder.ops
        snapshot.wait_filled()
        save.file.wait()
        if snapshot.error is None:
            snapshot.finish()
        if snapshot.error is not None:
            raise snapshot.error
        if snapshot.torn():
            raise RuntimeError(
                "the state was written while it was being copied: somebody other than a registered optimizer changed a "
                "parameter or optimizer state without calling fence() first"
            )
        files: dict[str, FileRecord] = {}
        with self.trace.span("fsync", step=save.step):
            files[save.plan.shard_name] = save.file.finish()
            save.pickle_rest()
            objects, data, position = {}, [], 0
            for key, part in save.pickled.items():
                objects[key] = ObjectRecord(save.plan.objects_name, position, len(part))
                data.append(part)
                position += len(part)
            joined = b"".join(data)
            if joined:
                ops.write_file(save.file.path.with_name(save.plan.objects_name), joined)
                files[save.plan.objects_name] = checksums(joined, save.plan.image.chunk_bytes)
            ops.fsync_dir(save.file.path.parent)
        return {"files": files, "objects": objects}

    def _publish(self, save: Save, name: str) -> str:
        """Rank 0: hear the votes and commit; the reason against, or ''."""
        scratch = save.file.path.parent
        try:
            with self.trace.span("vote", step=save.step):
                words = self.coordinator.hear_all(f"{name}/vote", timeout_s=self._timeout_s)
            against = [f"rank {rank}: {word['reason']}" for rank, word in enumerate(words) if word["reason"]]
            if against:
                raise RuntimeError("; ".join(against))
            files = {file: record for word in words for file, record in word["files"].items()}
            objects = {key: record for word in words for key, record in word["objects"].items()}
            metadata = self._dcp_metadata(save, objects)
            files[".metadata"] = checksums(metadata, save.plan.image.chunk_bytes)
            assert save.plan.metadata is not None
            manifest = Manifest(
                save.step,
                save.plan.world,
                save.plan.image.chunk_bytes,
                files,
                self._tensors,
                objects,
                dict(save.plan.metadata.planner_data),
                {"undertow": __version__, "torch": torch.__version__},
            )
            self.folder.commit(scratch, manifest, metadata)
            for step in to_remove(self.folder.committed(), self._keep):
                self.folder.remove(step)
        except BaseException as error:
            self.folder.ops.rmtree(scratch)
            return f"{type(error).__name__}: {error}"
        return ""

    def _dcp_metadata(self, save: Save, objects: Mapping[str, ObjectRecord]) -> bytes:
        metadata = save.plan.metadata
        assert metadata is not None
        storage = {
            MetadataIndex(key, shard.offsets, position): _StorageInfo(shard.file, shard.start, shard.length)
            for key, record in self._tensors.items()
            for position, shard in enumerate(record.shards)
        }
        storage |= {MetadataIndex(key): _StorageInfo(r.file, r.start, r.length) for key, r in objects.items()}
        metadata.storage_data = storage
        metadata.storage_meta = StorageMeta(save_id=f"undertow-{self.coordinator.token}-{save.step}")
        return pickle.dumps(metadata)


def _tensor_records(plan: SavePlan, words: list) -> dict[str, TensorRecord]:
    """The manifest's tensors from every rank's placed items."""
    assert plan.metadata is not None
    where = {index: (file, start, length, payload) for file, items in words for index, start, length, payload in items}
    records = {}
    for key, stored in plan.metadata.state_dict_metadata.items():
        if isinstance(stored, TensorStorageMetadata):
            shards = tuple(
                ShardRecord(tuple(c.offsets), tuple(c.sizes), *where[MetadataIndex(key, c.offsets)])
                for c in stored.chunks
            )
            dtype = str(stored.properties.dtype).removeprefix("torch.")
            records[key] = TensorRecord(dtype, tuple(stored.size), shards)
    return records
