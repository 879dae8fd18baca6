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
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from ..dist import launch
from ..dist.errors import UserError
from ..dist.log import get_logger
from ..dist.trace import Trace
from .arena import Arena, Memory
from .committer import Committer, Part, Save, SaveReport
from .coordinate import Coordinator
from .files import FileOps
from .flush import ShardFile
from .folder import Folder
from .host_tier import HostFile, HostTier
from .layout import CHUNK_BYTES
from .live import LiveState, local
from .pipeline import Pipeline
from .preemption import Preempter, Preemption
from .recover import choose
from .restore import load
from .snapshot import OnChunk, Seal, Snapshot
from .state import AppState

log = get_logger(__name__)


class Checkpointer:
    """Saves and restores the named `objects` (modules, optimizers, anything with state_dict) under `root`.

    `every`: steps between saves to disk (0: only when `save` is called). `keep`: how many newest checkpoints to retain
    (None: all). `host_every`: steps between saves to host memory, which survives a killed process but not the machine;
    `host_generations` of them are held (one always valid, one being written, one being flushed). `per_rank`: objects
    whose state differs by rank. `arena_bytes`: host memory for bytes on their way (default: the rank's part of the
    state, at most half of what is free). `timeout_s`: how long ranks wait for each other. `preemption`: signals upon
    which `step` saves at once and sets `preempted`. `allow_types`: classes that may be unpickled from stored objects.
    Create it on every rank, after init_process_group, and call every method on
    every rank; only `wait` and `close` block.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        every: int = 0,
        keep: int | None = 3,
        host_every: int = 0,
        host_generations: int = 3,
        per_rank: dict[str, Any] | None = None,
        rng: bool = True,
        arena_bytes: int | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        writers: int = 2,
        timeout_s: float = 300.0,
        preemption: Preemption | None = None,
        allow_types: Sequence[type] = (),
        trace: Trace | None = None,
        ops: FileOps | None = None,
        **objects: Any,
    ) -> None:
        if every < 0 or host_every < 0 or (keep is not None and keep < 1):
            raise UserError(
                f"every={every}, host_every={host_every}, keep={keep}",
                expected="every ≥ 0, host_every ≥ 0, and keep ≥ 1 or None",
            )
        if not objects:
            raise UserError("nothing to checkpoint was given", remedy="pass model=…, optimizer=… by name")
        self.every, self.host_every, self.timeout_s = every, host_every, timeout_s
        self.reports: list[SaveReport] = []
        self.preempted = False
        self.failures = 0
        self._arena_bytes, self._allow = arena_bytes, tuple(allow_types)
        self._trace = trace or Trace(None)
        self._off = launch.detect().disabled
        self._coordinator = Coordinator.from_default_group(timeout_s=timeout_s)
        self.state = AppState(objects, per_rank or {}, rank=self._coordinator.rank, rng=rng)
        self.folder = Folder(Path(root), ops or FileOps())
        self.host: HostTier | None = None
        if host_every:
            self.host = HostTier(Path(root), self._coordinator, generations=host_generations)
        self._take_folders()
        self._disk = self._committer("disk", self.folder, keep)
        committers = [self._disk]
        if self.host is not None:
            self._memory = self._committer("host", self.host.folder, None)
            committers.append(self._memory)
        self._pipeline = Pipeline(committers, writers=writers, trace=self._trace)
        self._pickles: dict[str, tuple[str, bytes]] = {}
        self._live = LiveState(self.state, self._coordinator, chunk_bytes=chunk_bytes, timeout_s=timeout_s)
        self._saved_step: int | None = None
        self._current: Snapshot | None = None
        self._arena: Arena | None = None
        self._preempter = Preempter(preemption, self._coordinator.lifeline) if preemption is not None else None
        self._handles = [o.register_step_pre_hook(self._before_update) for o in self.state.optimizers.values()]

    def _committer(self, tier: str, folder: Folder, keep: int | None) -> Committer:
        return Committer(tier, folder, self._coordinator, keep=keep, timeout_s=self.timeout_s, trace=self._trace)

    def _take_folders(self) -> None:
        """Rank 0 takes the folders; its verdict is every rank's."""
        problem = ""
        if self._coordinator.rank == 0:
            try:
                self.folder.take()
                if self.host is not None:
                    self.host.take()
            except UserError as error:
                self.folder.release()
                problem = str(error)
            self._coordinator.say("open", problem)
        else:
            problem = self._coordinator.hear("open", 0, deadline_s=time.monotonic() + self.timeout_s)
        if problem:
            self._coordinator.part()
            raise UserError(problem)

    # -- saving ---------------------------------------------------------------------------------------------------

    def step(self, step: int) -> bool:
        """Save if `step` is due. Call once per step, anywhere before the optimizer's step; whether a save began.

        After a signal of `preemption` all ranks save the same step, wait until it is committed, and find `preempted`
        set: then leave the loop.
        """
        self._report()
        if self._preempter is not None and not self.preempted and self._preempter.at(step):
            return self._save_at_once(step, self._preempter)
        if step == self._saved_step:
            return False
        disk = self.every > 0 and step % self.every == 0
        host = self.host_every > 0 and step % self.host_every == 0
        return (disk or host) and self.save(step, disk=disk, host=host)

    def save(self, step: int, *, disk: bool = True, host: bool = False) -> bool:
        """Begin to save the state as it is now under the number `step`, on disk and, where there is such a tier, in
        host memory; False when nothing was begun: checkpoints are switched off, or all generations are in use."""
        if self._off:
            return False
        began_s = time.monotonic()
        with self._trace.span("snapshot", step=step):
            self.fence()
            begun = self._begin(step, began_s, disk, host and self.host is not None)
        self._saved_step = step
        return begun

    def _save_at_once(self, step: int, preempter: Preempter) -> bool:
        if step != self._saved_step:
            self.save(step)
        reports = [report for report in self.wait() if report.step == step and report.tier == "disk"]
        preempter.end()
        self.preempted = True
        ok = self._off or any(report.ok for report in reports)
        log.info("the signal's save of step %d %s; leave the loop", step, "is committed" if ok else "failed")
        return ok

    def _resize(self) -> None:
        """Fit the memory to a new plan."""
        if self.host is not None:
            self.host.prepare(self._live.plan, pinned=self._live.pinned)
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    def _ring(self) -> Arena:
        """The arena, made when a save first needs it: with a host tier most runs never do."""
        if self._arena is None:
            image = self._live.plan.image
            budget = min(self._arena_bytes or _default_arena(image.size), image.size)
            self._arena = Arena(budget, image.chunk_bytes, pinned=self._live.pinned)
        return self._arena

    def _begin(self, step: int, began_s: float, disk: bool, host: bool) -> bool:
        values = self._live.values(self._pipeline.drain, self._resize)
        claimed = self.host.claim(step, flush=disk) if self.host is not None and host else None
        if claimed is None and not disk:
            return False
        plan, staging, copier = self._live.plan, self._live.staging, self._live.copier
        save = Save(step, plan, {index.fqn: values[index.fqn] for index in plan.objects}, began_s, self._pickles)
        staging.fill([local(values[index.fqn]) for index in plan.eager])
        sources, sampler = self._live.sources(values)
        seals = [Seal(plan.image.chunks - 1, sources, sampler)] if sources else []
        copier.begin()
        memory, parts, on_chunk = self._route(save, claimed, disk)
        save.snapshot = Snapshot(step, plan, sources, staging, copier, memory, on_chunk, seals)
        self._current, self._save = save.snapshot, save
        if copier.device.type == "cuda":  # queueing copies is cheap here, and late ones would be waited for
            while save.snapshot.fill_next(wait=False):
                pass
        save.call_s = time.monotonic() - began_s
        self._pipeline.submit(save, parts)
        return True

    def _route(
        self, save: Save, claimed: tuple[int, Path] | None, disk: bool
    ) -> tuple[Memory, list[tuple[Committer, Part]], OnChunk]:
        """Through which memory a save goes, its part for each tier, and what to do with each filled chunk."""
        name, parts, takers = save.plan.shard_name, [], []
        index, folder = claimed or (-1, None)
        memory: Memory = self._ring() if self.host is None or folder is None else self.host.generation(index)
        if self.host is not None and folder is not None:
            kept = HostFile(folder / name, self.host.generation(index), self._live.copier)
            takers.append(lambda snapshot, chunk, slot, mark: kept.note(mark))
            after = partial(self.host.done, index, save.step, "host")
            parts.append((self._memory, Part(save, kept, disposable=False, after=after)))
        if disk:
            scratch = self.folder.scratch(save.step, self._coordinator.token)
            file = ShardFile(self.folder.ops, scratch / name, save.plan.image)
            takers.append(partial(self._pipeline.flush, file, memory, self._live.copier))
            part = Part(save, file)
            if self.host is not None and folder is not None:
                part.after = partial(self.host.done, index, save.step, "flush")
            parts.append((self._disk, part))

        def on_chunk(snapshot: Snapshot, chunk: int, slot: int, mark: Any) -> None:
            for take in takers:
                take(snapshot, chunk, slot, mark)

        return memory, parts, on_chunk

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

    def _before_update(self, *unused: object) -> None:
        self.fence()

    # -- restoring ------------------------------------------------------------------------------------------------

    def restore(self, step: int | None = None) -> int | None:
        """Load the newest checkpoint that verifies on all ranks (or exactly `step`); its step, or None if none."""
        self.fence()
        self._pipeline.drain()
        with self._trace.span("restore"):
            folders = [self.folder] if self.host is None else [self.host.folder, self.folder]
            found = choose(folders, self._coordinator, step=step, timeout_s=self.timeout_s)
            if found is None:
                return None
            folder, number, manifest = found
            path = folder.final(number)
            load(self.state, path, manifest, self._allow)
            if step is not None:
                self._roll_back(number)
        self._saved_step = number
        log.info("restored step %d from %s", number, path)
        return number

    def _roll_back(self, step: int) -> None:
        """After an explicit restore: newer checkpoints are set aside, or a restart would jump back into them."""
        if self._coordinator.rank == 0:
            for later in [found for found in self.folder.committed() if found > step]:
                log.info("set aside the newer checkpoint %d as %s", later, self.folder.set_aside(later, "left"))
            if self.host is not None:
                self.host.forget_after(step)

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
        """Drain what is in flight, detach from the optimizers, release memory and the folder. Safe to call twice.

        Host memory is freed when a checkpoint on disk is as new; otherwise it stays for a later restore.
        """
        if self._pipeline.closed:
            return
        try:
            self.wait()
        finally:
            if self._preempter is not None:
                self._preempter.end()
            for handle in self._handles:
                handle.remove()
            self._pipeline.close()
            if self._arena is not None:
                self._arena.close()
            if self.host is not None:
                disk, memory = self.folder.committed(), self.host.folder.committed()
                stale = not memory or (bool(disk) and disk[-1] >= memory[-1])
                self.host.close(remove=stale)
            self.folder.release()
            self._coordinator.part()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _default_arena(image_bytes: int) -> int:
    """The whole image, or half of the free host memory where that is less."""
    return min(image_bytes, psutil.virtual_memory().available // 2)
