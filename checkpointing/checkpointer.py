"""The facade: three lines in a training loop.

    ckpt = Checkpointer("runs/a", model=model, optimizer=optimizer, every=10)
    start = ckpt.restore() or 0
    for i in range(start, steps): ckpt.step(i); …; optimizer.step()

`step` returns at once; the bytes leave during forward and backward; a hook on the optimizer fences what has not left
yet; files, vote and commit happen in background threads. A save that fails is reported and counted, and training goes
on; the next interval tries again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from ..dist import launch
from ..dist.errors import UserError
from ..dist.log import get_logger
from ..dist.trace import Trace
from .arena import Arena
from .coordinate import Coordinator
from .copies import copier_for
from .files import FileOps
from .folder import Folder
from .layout import CHUNK_BYTES
from .manifest import BadCheckpoint
from .pipeline import Pipeline, Save, SaveReport
from .plan import make_plan, signature
from .recover import choose
from .restore import Reader, apply_objects, compare, load_tensors, materialise_optimizers, targets_of
from .sample import Sampler
from .snapshot import Seal, Snapshot
from .staging import Staging
from .state import AppState, Leaf, local_tensor
from .watch import Watch

log = get_logger(__name__)


class Checkpointer:
    """Saves and restores the named `objects` (modules, optimizers, anything with state_dict) under `root`.

    `every`: steps between saves (0: only when `save` is called). `keep`: how many newest checkpoints to retain (None:
    all). `per_rank`: objects whose state differs by rank. `arena_bytes`: host memory for bytes on their way (default:
    the rank's part of the state, at most half of what is free). `timeout_s`: how long ranks wait for each other.
    `allow_types`: classes that may be unpickled from stored objects. Create it on every rank, after
    init_process_group, and call every method on every rank; only `wait` and `close` block.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        every: int = 0,
        keep: int | None = 3,
        per_rank: dict[str, Any] | None = None,
        rng: bool = True,
        arena_bytes: int | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        writers: int = 2,
        timeout_s: float = 300.0,
        allow_types: Sequence[type] = (),
        trace: Trace | None = None,
        ops: FileOps | None = None,
        **objects: Any,
    ) -> None:
        if every < 0 or (keep is not None and keep < 1):
            raise UserError(f"every={every}, keep={keep}", expected="every ≥ 0 and keep ≥ 1 or None")
        if not objects:
            raise UserError("nothing to checkpoint was given", remedy="pass model=…, optimizer=… by name")
        self.every, self.timeout_s = every, timeout_s
        self.reports: list[SaveReport] = []
        self.failures = 0
        self._chunk_bytes, self._arena_bytes, self._allow = chunk_bytes, arena_bytes, tuple(allow_types)
        self._trace = trace or Trace(None)
        self._off = launch.detect().disabled
        self._coordinator = Coordinator.from_default_group(timeout_s=timeout_s)
        self.state = AppState(objects, per_rank or {}, rank=self._coordinator.rank, rng=rng)
        self.folder = Folder(Path(root), ops or FileOps())
        self._take_folder()
        self._pipeline = Pipeline(
            self.folder, self._coordinator, keep=keep, writers=writers, timeout_s=timeout_s, trace=self._trace
        )
        self._plan_key: tuple | None = None
        self._fresh_key: tuple = ()
        self._watch: Watch | None = None
        self._plans = 0
        self._saved_step: int | None = None
        self._current: Snapshot | None = None
        self._arena: Arena | None = None
        self._handles = [o.register_step_pre_hook(self._before_update) for o in self.state.optimizers.values()]

    def _take_folder(self) -> None:
        """Rank 0 takes the folder; its verdict is every rank's."""
        problem = ""
        if self._coordinator.rank == 0:
            try:
                self.folder.take()
            except UserError as error:
                problem = str(error)
            self._coordinator.say("open", problem)
        else:
            problem = self._coordinator.hear("open", 0, deadline_s=time.monotonic() + self.timeout_s)
        if problem:
            raise UserError(problem)

    # -- saving ---------------------------------------------------------------------------------------------------

    def step(self, step: int) -> bool:
        """Save if `step` is due. Call once per step, anywhere before the optimizer's step; whether a save began."""
        self._report()
        if self.every == 0 or step % self.every or step == self._saved_step:
            return False
        return self.save(step)

    def save(self, step: int) -> bool:
        """Begin to save the state as it is now under the number `step`; False when checkpoints are switched off."""
        if self._off:
            return False
        began_s = time.monotonic()
        with self._trace.span("snapshot", step=step):
            self.fence()
            self._begin(step, self._values(), began_s)
        self._saved_step = step
        return True

    def _values(self) -> Mapping[str, Any]:
        """Every value to save by key, tensors as this rank's part; plans anew when the state's shape has changed."""
        if self._watch is not None and self._watch.unchanged():
            fresh = self.state.fresh_leaves(self._names)
            if signature(fresh) == self._fresh_key:
                return {**self._watch.fixed, **{leaf.key: leaf.value for leaf in fresh}}
        leaves = self.state.leaves()
        key = signature(leaves)
        if key != self._plan_key:
            self._replan(leaves, key)
        self._names = self.state.parameter_names()
        self._watch = Watch(self.state, leaves)
        self._fresh_key = signature(self.state.fresh_leaves(self._names))
        return {leaf.key: _local(leaf.value) for leaf in leaves}

    def _replan(self, leaves: Sequence[Leaf], key: tuple) -> None:
        self._pipeline.drain()
        self._plans += 1
        name = f"plan/{self._plans}"
        self._plan = make_plan(leaves, self._coordinator, name, timeout_s=self.timeout_s, chunk_bytes=self._chunk_bytes)
        self._pipeline.new_plan(self._plan, name)
        tensors = [local_tensor(leaf.value) for leaf in leaves if isinstance(leaf.value, torch.Tensor)]
        self._copier = copier_for(tensors)
        self._staging = Staging(self._plan, self._copier.device)
        self._sources: list[torch.Tensor] = []
        budget = self._arena_bytes or _default_arena(self._plan.image.size)
        if self._arena is None or self._arena.nbytes < min(budget, self._plan.image.size):
            if self._arena is not None:
                self._arena.close()
            pinned = self._copier.device.type == "cuda"
            self._arena = Arena(min(budget, self._plan.image.size), self._chunk_bytes, pinned=pinned)
        self._pipeline.use(self._arena, self._copier)
        self._plan_key = key

    def _begin(self, step: int, values: Mapping[str, Any], began_s: float) -> None:
        plan = self._plan
        sources = [values[index.fqn] for index in plan.lazy]
        if [t.data_ptr() for t in sources] != [t.data_ptr() for t in self._sources]:
            self._sources, self._sampler = sources, Sampler(sources)
        assert self._arena is not None
        save = Save(step, plan, {index.fqn: values[index.fqn] for index in plan.objects}, began_s)
        self._staging.fill([_local(values[index.fqn]) for index in plan.eager])
        seals = [Seal(plan.image.chunks - 1, sources, self._sampler)] if sources else []
        self._copier.begin()
        save.file = self._pipeline.file_for(save)
        on_chunk = partial(self._pipeline.flush, save.file)
        save.snapshot = Snapshot(step, plan, sources, self._staging, self._copier, self._arena, on_chunk, seals)
        self._current = save.snapshot
        save.call_s = time.monotonic() - began_s
        self._save = save
        self._pipeline.submit(save)

    def fence(self) -> None:
        """Wait until nothing that the caller does next can change the save in flight. For writers of parameters other
        than the registered optimizers: call it just before they write."""
        snapshot, self._current = self._current, None
        if snapshot is None:
            return
        began_s = time.monotonic()
        with self._trace.span("fence", step=snapshot.step):
            snapshot.fence()
        snapshot.release_sources()
        self._save.fence_s += time.monotonic() - began_s

    def _before_update(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self.fence()

    # -- restoring ------------------------------------------------------------------------------------------------

    def restore(self, step: int | None = None) -> int | None:
        """Load the newest checkpoint that verifies on all ranks (or exactly `step`); its step, or None if none."""
        self.fence()
        self._pipeline.drain()
        with self._trace.span("restore"):
            found = choose(self.folder, self._coordinator, step=step, timeout_s=self.timeout_s)
            if found is None:
                return None
            number, manifest = found
            path = self.folder.final(number)
            reader = Reader(path, manifest)
            compare(self.state, self.state.leaves(), manifest, path)
            materialise_optimizers(self.state, manifest)
            leaves = self.state.leaves()
            targets = targets_of(self.state, leaves, manifest)
            load_tensors(targets, reader)
            try:
                apply_objects(self.state, leaves, targets, reader, self._allow)
            except BadCheckpoint as error:
                raise UserError(str(error)) from error
        self._saved_step = number
        log.info("restored step %d from %s", number, path)
        return number

    # -- ending ---------------------------------------------------------------------------------------------------

    def wait(self) -> list[SaveReport]:
        """Block until every save begun so far is committed or has failed; all reports so far."""
        self.fence()
        self._pipeline.drain()
        self._report()
        return self.reports

    def status(self) -> str:
        """One or two words for a progress bar."""
        if self._pipeline.busy:
            return f"saving {self._saved_step}"
        done = [report.step for report in self.reports if report.ok]
        return f"saved {done[-1]}" if done else "none yet"

    def _report(self) -> None:
        for report in self._pipeline.reports():
            self.reports.append(report)
            if report.ok:
                log.debug("%s", report)
            else:
                self.failures += 1
                log.warning("checkpoint of step %d failed and was dropped: %s", report.step, report.reason)

    def close(self) -> None:
        """Drain what is in flight, detach from the optimizers, release memory and the folder. Safe to call twice."""
        if self._pipeline.closed:
            return
        try:
            self.wait()
        finally:
            for handle in self._handles:
                handle.remove()
            self._pipeline.close()
            if self._arena is not None:
                self._arena.close()
            self.folder.release()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _local(value: Any) -> Any:
    return local_tensor(value) if isinstance(value, torch.Tensor) else value


def _default_arena(image_bytes: int) -> int:
    """The whole image, or half of the free host memory where that is less."""
    return min(image_bytes, psutil.virtual_memory().available // 2)
