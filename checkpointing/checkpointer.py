"""The facade: three lines in a training loop.

    ckpt = Checkpointer("runs/a", model=model, optimizer=optimizer, every=10)
    start = ckpt.restore() or 0
    for i in range(start, steps): ckpt.step(i); …; optimizer.step()

`step` returns at once; the bytes leave during forward and backward; a hook on the optimizer fences what has not left
yet; files, vote and commit happen in background threads. A save that fails is reported and counted, and training goes
on; the next interval tries again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..dist import launch
from ..dist.errors import UserError
from ..dist.machine import Machine
from ..dist.trace import Trace
from .bucket import Bucket
from .budget import Budget
from .coordinate import Coordinator, current_rank
from .explain import explain
from .fences import Fences
from .files import FileOps
from .foreign import Names
from .frequency import Frequency
from .hooks import attach
from .layout import CHUNK_BYTES
from .live import LiveState
from .mirror import Mirror
from .observe import Observer
from .options import check_options, metrics_of, step_of
from .partner import Partner
from .pipeline import Pipeline
from .preemption import Preempter, Preemption
from .readable import Readable
from .reports import Reports
from .restorer import Restorer
from .retention import Retention
from .rhythm import Rhythm
from .save import SaveReport
from .saver import Saver
from .slowdown import StepClock
from .state import AppState
from .tiers import Tiers


class Checkpointer:
    """Saves and restores the named `objects` (modules, optimizers, anything with state_dict) under `root`.

    `every`: steps between saves to disk (0: only when `save` is called; a `Frequency` chooses). `keep`: how many newest
    checkpoints to retain (None: all; a `Retention` has more rules). `recycle`: whether later saves write over the files
    of those that go (None: on a local disk where removing slows down writing). `mirror`: a second folder for some,
    `bucket`: a place in an object store (S3, GCS, Azure).
    `host_every`: the same for saves to host memory, which survives a killed process but not the machine;
    `host_generations` of them are held (one always valid, one being written, one being flushed). `partner`: each is
    copied to another machine's memory too, which the loss of a machine then leaves. `per_rank`: objects
    whose state differs by rank. `arena_bytes`: host memory for bytes on their way (default: the rank's part of the
    state, at most half of what is free). `device_bytes`: memory of the GPU where the end of the state waits for its way
    out, so that the optimizer need not. `timeout_s`: how long ranks wait for each other. `preemption`: signals upon
    which `step` saves at once and sets `preempted`. `allow_types`: classes that may be unpickled from stored objects.
    `observers`: functions that see every `SaveReport` (`observe`). Create it on every rank, after init_process_group,
    and call every method on every rank; only `wait` and `close` block.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        every: int | Frequency = 0,
        keep: int | Retention | None = 3,
        recycle: bool | None = None,
        mirror: Mirror | None = None,
        bucket: Bucket | None = None,
        host_every: int | Frequency = 0,
        host_generations: int = 3,
        partner: Partner | None = None,
        per_rank: dict[str, Any] | None = None,
        rng: bool = True,
        arena_bytes: int | None = None,
        device_bytes: int = 0,
        chunk_bytes: int = CHUNK_BYTES,
        writers: int = 2,
        timeout_s: float = 300.0,
        preemption: Preemption | None = None,
        allow_types: Sequence[type] = (),
        observers: Sequence[Observer] = (),
        trace: Trace | None = None,
        ops: FileOps | None = None,
        **objects: Any,
    ) -> None:
        check_options(
            objects,
            every=every,
            keep=keep,
            recycle=recycle,
            mirror=mirror,
            bucket=bucket,
            host_every=host_every,
            host_generations=host_generations,
            partner=partner,
            per_rank=per_rank,
            arena_bytes=arena_bytes,
            device_bytes=device_bytes,
            chunk_bytes=chunk_bytes,
            writers=writers,
            timeout_s=timeout_s,
            preemption=preemption,
            allow_types=allow_types,
            observers=observers,
        )
        self.preempted = False
        self._budget = Budget(arena_bytes, device_bytes)
        self._trace = trace or Trace(None)
        self._off = launch.detect().disabled
        # before the ranks meet: one that refuses its objects would leave the others waiting for it
        self.state = AppState(objects, per_rank or {}, rank=current_rank(), rng=rng)
        self._coordinator = Coordinator.from_default_group(timeout_s=timeout_s)
        self._tiers = Tiers(
            Path(root),
            self._coordinator,
            keep=keep,
            mirror=mirror,
            bucket=bucket,
            partner=partner,
            host_generations=host_generations if host_every else 0,
            ops=ops or FileOps(),
            timeout_s=timeout_s,
            trace=self._trace,
            recycle=recycle,
        )
        self.folder, self.host = self._tiers.folder, self._tiers.host
        self._restorer = Restorer(
            self.state, self._tiers, self._coordinator, allow_types, timeout_s=timeout_s, trace=self._trace
        )
        tier = self.host.tier if self.host else ""
        self._rhythm = Rhythm(every, host_every, tier, self._coordinator, timeout_s=timeout_s)
        self._pipeline = Pipeline(self._tiers.committers, writers=writers, trace=self._trace)
        self._live = LiveState(self.state, self._coordinator, chunk_bytes=chunk_bytes, timeout_s=timeout_s)
        self._clock = StepClock()
        observers = (*observers, self._live.heard, self._tiers.heard)
        self._reports = Reports(observers, self._clock, lambda: self._budget.peak_bytes)
        self._fences = Fences(self._live, self._trace)
        parts = (self._live, self._tiers, self._budget, self._pipeline, self._fences, self._clock, self._reports)
        self._saver = Saver(*parts, timeout_s, Readable(allow_types))
        self._preempter = Preempter(preemption, self._coordinator.lifeline) if preemption is not None else None
        modules, optimizers = self.state.modules.values(), self.state.optimizers.values()
        self._handles = attach(self._fences, modules, optimizers)

    # -- saving ---------------------------------------------------------------------------------------------------

    def step(self, step: int, metrics: Mapping[str, float] | None = None) -> bool:
        """Save if `step` is due. Call once per step, anywhere before the optimizer's step; whether a save began.
        `metrics` are stored with the checkpoint, for `Retention` and `undertow ckpt list`.

        After a signal of `preemption` all ranks save the same step, wait until it is committed on disk, and find
        `preempted` set: then leave the loop.
        """
        step = self._number(step)
        self._clock.tick(step)
        self._reports.take(self._pipeline.reports())
        if self._preempter is not None and not self.preempted and self._preempter.at(step):
            if step != self._rhythm.last_on_disk:  # what is in memory only may be lost with the machine
                self.save(step)
            self.preempted = True
            self.fence()
            self._pipeline.drain(only="disk")  # a slow partner or store has until the scheduler kills, in `close`
            self._reports.take(self._pipeline.reports())
            return self._preempter.conclude(step, self.reports, off=self._off)
        disk, host = self._rhythm.due(step)
        return (disk or host) and self.save(step, disk=disk, host=host, metrics=metrics)

    def save(
        self, step: int, *, disk: bool = True, host: bool = False, metrics: Mapping[str, float] | None = None
    ) -> bool:
        """Begin to save the state as it is now under the number `step`, on disk and, where there is such a tier, in
        host memory; False when nothing was begun: checkpoints are switched off, all generations are in use, or a rank
        did not come to plan it, has no memory for it or alone has a state of another shape, which is reported as a
        failure. With host memory it first waits for a save of the same step that is under way. What a user's
        `state_dict()` raises is raised here, on its rank alone; the save has then failed on all, and the next one
        works."""
        step, numbers = self._number(step), metrics_of(metrics)
        if self._off:
            return False
        self._reports.take(self._pipeline.reports())
        attempt, raised = self._tiers.attempt(step, disk=disk, host=host, metrics=numbers), None
        with self._trace.span("snapshot", step=step):
            self.fence()
            try:
                begun = self._saver.begin(attempt)
            except Exception as error:
                begun, raised = False, error
        self._rhythm.saved(step, self.reports, disk=disk, host=host)
        if raised is not None:
            raise raised
        return begun

    def _number(self, step: int) -> int:
        if self._pipeline.closed:
            raise UserError(f"step {step} after close()", remedy="close it, or leave its `with`, when training is over")
        return step_of(step)

    def fence(self) -> None:
        """Wait until nothing that the caller does next can change the save in flight. For writers of parameters other
        than the registered optimizers: call it just before they write."""
        self._fences.all()

    # -- restoring ------------------------------------------------------------------------------------------------

    def restore(self, step: int | None = None) -> int | None:
        """Load the newest checkpoint that verifies on all ranks (or exactly `step`); its step, or None if none."""
        self.fence()
        self._pipeline.drain()
        number = self._restorer.newest(step)
        if number is not None:
            self._rhythm.restored(number)
        return number

    def restore_from(self, path: Path | str, *, names: Names | None = None, verify: bool = True) -> None:
        """Load what stock DCP (`dcp.save`, `dcp.async_save`) wrote to the folder `path`, into any number of ranks. Its
        parts are found by the names they hold; `names` tells their prefixes where that is not enough ({"optimizer":
        "app.optim"}), None for an object to leave as it is. DCP stores neither step nor random numbers of ours: read
        them with `open_checkpoint(path)`. `verify` computes every archive's CRC-32 again, the only checksum there is.
        Collective. `UserError` where it does not fit, `BadCheckpoint` where it is damaged; with `verify` nothing has
        been changed then.
        """
        self.fence()
        self._pipeline.drain()
        self._restorer.foreign(Path(path), names or {}, verify=verify)
        self._rhythm.restored(None)

    # -- ending ---------------------------------------------------------------------------------------------------

    def wait(self) -> list[SaveReport]:
        """Block until every save begun so far is committed or has failed; all reports so far."""
        self.fence()
        self._pipeline.drain()
        self._reports.take(self._pipeline.reports())
        return self.reports

    def explain(self, machine: Machine | None = None, *, window_s: float = 0.0) -> str:
        """What a save of the state as it is now does, tier by tier, and, from the rates of `machine` (default: what
        `undertow probe` wrote here), what it will cost beside what the last ones did cost. `window_s`: from the call to
        the optimizer's first write. Several ranks plan together when they save, and one of them may ask alone: it hears
        of the last save's plan, or that there is none yet."""
        self.fence()
        if self._coordinator.world == 1:
            self._saver.plan()
        elif not self._live.planned:
            return "no save has been planned yet: the ranks do that together at the first one"
        last = self.reports[-len(self._tiers.committers) :]
        return explain(self._live, self._tiers, self._budget, self._rhythm, last, machine, window_s=window_s)

    @property
    def reports(self) -> list[SaveReport]:
        """What became of the saves that have ended, tier by tier, oldest first; in a long run of the last 10,000."""
        return self._reports.ended

    @property
    def origins(self) -> list[dict[str, int]]:
        """Where the last `restore` found the state of each rank: bytes of every source, or of the folder's checkpoint.
        Empty when nothing was restored."""
        return self._restorer.origins

    @property
    def failures(self) -> int:
        """How many of them were dropped."""
        return self._reports.failures

    def status(self) -> str:
        """One or two words for a progress bar."""
        if self._pipeline.busy:
            return f"saving {self._rhythm.last}"
        done = next((report.step for report in reversed(self.reports) if report.ok), None)
        return "none yet" if done is None else f"saved {done}"

    def close(self) -> None:
        """Drain what is in flight, detach from the optimizers, release memory and the folder. Safe to call twice.

        Host memory is freed when a checkpoint on disk is as new; otherwise it stays for a later restore.
        """
        if self._pipeline.closed:
            return
        with ExitStack() as after:  # the last one first, each whatever the others raise
            ends = (self._tiers.close, self._coordinator.part, self._budget.drop, self._pipeline.close)
            for end in (*ends, *(handle.remove for handle in self._handles)):
                after.callback(end)
            if self._preempter is not None:
                after.callback(self._preempter.end)
            self.wait()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
