"""`async_save(state_dict, checkpoint_id=…)`: for programs that call `torch.distributed.checkpoint.async_save` today.

The call returns when the state has been copied, so it may be changed at once; files, checksums, vote and commit follow
in background threads. What is written at `checkpoint_id` is one checkpoint of ours, which `dcp.load` reads too. A
`Checkpointer` copies later and behind a fence, and so blocks less; this one asks for no other change of the program.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from ..dist.errors import PeerLost, UserError
from ..dist.trace import Trace
from .arena import Arena
from .attempt import ANEW, MEETINGS, Attempt, reason_of
from .committer import Committer, Part
from .coordinate import Coordinator
from .copies import HostCopier, copier_for
from .files import FileOps
from .flush import ShardFile
from .folder import Folder
from .layout import CHUNK_BYTES
from .manifest import COMMIT, Manifest
from .pipeline import Pipeline
from .plan import SavePlan, forget_words, make_plan, signature
from .save import Save
from .snapshot import Snapshot
from .staging import Staging
from .state import Leaf, local_tensor, refuse_odd

TIMEOUT_S = 300.0


def async_save(state_dict: Mapping[str, Any], *, checkpoint_id: Path | str) -> Future[Path]:
    """Begin to save `state_dict` (nested; tensors, DTensors, objects with `state_dict`, plain values) as the folder
    `checkpoint_id`, replacing a checkpoint there only when the new one is whole. Call on all ranks alike. The future's
    `result()` is the folder once every rank's bytes are durable and committed; it raises why the save was lost. What an
    object's `state_dict` raises is raised here, on its rank alone."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    return _engine(os.getpid(), world).save(state_dict, Path(checkpoint_id))


class _Folder(Folder):
    """A single checkpoint at a path of the user's choice."""

    def __init__(self, path: Path, ops: FileOps) -> None:
        super().__init__(path.parent, ops)
        self.path = path

    def final(self, step: int) -> Path:
        return self.path

    def scratch(self, step: int, token: str) -> Path:
        return self.root / f".{self.path.name}.tmp-{token}"

    def committed(self) -> list[int]:
        return []  # nothing here is for retention or a rollback to touch

    def _hint(self, final: Path) -> None:
        """No name is newest here."""


class _Folders(_Folder):
    """What the committer sees: each save's number stands for its own folder."""

    def __init__(self, ops: FileOps) -> None:
        super().__init__(Path("."), ops)
        self.by_number: dict[int, _Folder] = {}

    def commit(self, scratch: Path, manifest: Manifest, metadata: bytes) -> Path:
        return self.by_number[manifest.step].commit(scratch, manifest, metadata)


class _Engine:
    """Threads, plan and arena, kept from call to call."""

    plan: SavePlan
    copier: HostCopier

    def __init__(self) -> None:
        self.coordinator = Coordinator.from_default_group(timeout_s=TIMEOUT_S)
        self.folders, trace = _Folders(FileOps()), Trace(None)
        self.committer = Committer("async", self.folders, self.coordinator, keep=None, timeout_s=TIMEOUT_S, trace=trace)
        self.pipeline = Pipeline([self.committer], writers=2, trace=trace)
        self._key: tuple | None = None
        self._anew = False  # another rank waits for a plan of all
        self._tried: list[str] = []  # the plans whose words are in the store
        self._count = 0
        self._arena: Arena | None = None
        self._process = os.getpid()
        atexit.register(self.close)

    def save(self, state_dict: Mapping[str, Any], path: Path) -> Future[Path]:
        self._count += 1
        attempt = Attempt(self._count, self._count, ("async",), time.monotonic())
        folder = _Folder(path.absolute(), self.folders.ops)
        try:
            return self._save(attempt, state_dict, folder)
        except Exception as error:  # the other ranks hear of it, and the next save works
            lost, reason = isinstance(error, PeerLost), reason_of(error)
            reason = reason if lost else f"rank {self.coordinator.rank}: {reason}"
            with suppress(PeerLost, RuntimeError, dist.DistError):  # rank 0 is gone: nobody is left to tell
                for name in map(attempt.at, MEETINGS):
                    self.coordinator.decide(f"{name}/verdict", reason)
                self.committer.refuse(attempt.number, attempt.step, reason, folder.scratch(0, self._token))
            if not lost:  # the caller's own error is raised here
                raise
            future: Future[Path] = Future()
            _fail(future, folder, reason)
            return future

    @property
    def _token(self) -> str:
        return f"{self.coordinator.token}-{self._count:x}"

    def _save(self, attempt: Attempt, state_dict: Mapping[str, Any], folder: _Folder) -> Future[Path]:
        self.committer.reports()  # each future has its own; nobody else asks for them
        _refuse(folder.path)
        leaves = _leaves(state_dict)
        refuse_odd(leaves)
        planned = self._fit(attempt, leaves)
        assert self._arena is not None
        plan, arena = self.plan, self._arena
        values = {leaf.key: leaf.value for leaf in leaves}
        folder._make_root()
        self.folders.by_number[self._count] = folder
        save = Save(attempt, plan, {i.fqn: values[i.fqn] for i in plan.objects}, {}, planned=planned)
        self._staging.fill([local_tensor(values[index.fqn]) for index in plan.eager])
        sources = [local_tensor(values[index.fqn]) for index in plan.lazy]
        file = ShardFile(folder.ops, folder.scratch(0, self._token) / plan.shard_name, plan.image)
        self.copier.begin()
        flush = partial(self.pipeline.flush, file, arena, self.copier)
        save.snapshot = Snapshot(self._count, plan, sources, self._staging, self.copier, arena, flush)
        future: Future[Path] = Future()
        future.set_running_or_notify_cancel()
        after = partial(self._ended, save, folder, future)
        self.pipeline.submit(save, [(self.committer, Part(save, file, after=after))])
        save.snapshot.fence()
        save.snapshot.release_sources()
        return future

    def _ended(self, save: Save, folder: _Folder, future: Future[Path], ok: bool) -> None:
        del self.folders.by_number[save.step]
        if ok:
            future.set_result(folder.path)
        else:
            self._anew = self._anew or ANEW in str(save.snapshot.error)
            _fail(future, folder, save.snapshot.error)

    def _fit(self, attempt: Attempt, leaves: list[Leaf]) -> bool:
        """Whether all ranks have made a plan for `leaves` now; else it is the last one."""
        key = signature(leaves)
        if key == self._key and not self._anew:
            return False
        self.pipeline.drain()
        self._key, self._anew = None, False  # until all ranks have the new plan and its memory
        talk = self.coordinator
        self._tried.append(attempt.at("plan"))
        self.copier = copier_for([local_tensor(leaf.value) for leaf in leaves if isinstance(leaf.value, torch.Tensor)])
        self.plan = make_plan(leaves, talk, attempt.at("plan"), timeout_s=TIMEOUT_S, chunk_bytes=CHUNK_BYTES)
        talk.together(attempt.at("arena"), self._make_memory, timeout_s=TIMEOUT_S)
        while len(self._tried) > 1:
            forget_words(self._tried.pop(0), talk)
        self._key = key
        return True

    def _make_memory(self) -> None:
        self._staging = Staging(self.plan, self.copier.device)
        if self._arena is not None:
            self._arena.close()
        budget = min(self.plan.image.size, psutil.virtual_memory().available // 2)
        self._arena = Arena(budget, self.plan.image.chunk_bytes, pinned=self.copier.device.type == "cuda")

    def close(self) -> None:
        """At the end of the process: what was begun is finished."""
        if os.getpid() != self._process:
            return
        self.pipeline.drain()
        self.pipeline.close()
        if self._arena is not None:
            self._arena.close()
        self.coordinator.part()


def _fail(future: Future[Path], folder: _Folder, reason: object) -> None:
    future.set_exception(RuntimeError(f"{folder.path} was not saved: {reason}"))


@cache
def _engine(process: int, world: int) -> _Engine:
    """The engine of this process for the process group of that size; a forked child makes its own."""
    return _Engine()


def _leaves(state_dict: Mapping[str, Any]) -> list[Leaf]:
    if not isinstance(state_dict, Mapping):
        raise UserError(f"state_dict is a {type(state_dict).__name__}", expected="a dict, such as {'model': model}")
    plain = {
        key: value.state_dict() if callable(getattr(value, "state_dict", None)) else value
        for key, value in state_dict.items()
    }
    flat, paths = flatten_state_dict(plain)
    if not flat:
        raise UserError("the state_dict is empty", expected="at least one tensor or value")
    return [
        Leaf(tuple(paths[key]), value.detach(), place)
        if isinstance(value, torch.Tensor)
        else Leaf(tuple(paths[key]), value)
        for place, (key, value) in enumerate(flat.items())
    ]


def _refuse(path: Path) -> None:
    """Only what is a checkpoint already is ever replaced."""
    if path.is_dir() and any(path.iterdir()) and not (path / COMMIT).is_file():
        raise UserError(f"{path} holds other files", expected="a new folder, or a checkpoint of undertow to replace")
