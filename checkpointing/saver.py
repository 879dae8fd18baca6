"""How an attempt becomes a save in flight: state, plan, memory, route and snapshot, in step with the other ranks.

Users' code runs in one place here, where the state is read. What it raises belongs to them; whatever else goes wrong
costs the save and not the training. In either case this rank first leaves word for the others (`Tiers.refuse`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Any

from ..dist.errors import PeerLost
from ..dist.log import get_logger
from .arena import Memory
from .attempt import Attempt, kept, one_save
from .budget import Budget
from .choices import StateFirst
from .fences import Fences
from .live import LiveState
from .pipeline import Pipeline
from .readable import Readable
from .reports import Reports, dropped
from .save import Save
from .slowdown import StepClock
from .snapshot import Snapshot
from .tiers import Tiers
from .turns import Claim

log = get_logger(__name__)
MISSED = 100  # saves in a row that find no generation free are no passing matter


class Saver:
    """Begins the saves of one `Checkpointer`, whose parts it is given; on its training thread."""

    def __init__(
        self,
        live: LiveState,
        tiers: Tiers,
        budget: Budget,
        pipeline: Pipeline,
        fences: Fences,
        clock: StepClock,
        reports: Reports,
        timeout_s: float,
        readable: Readable,
    ) -> None:
        self._live, self._tiers, self._budget, self._pipeline = live, tiers, budget, pipeline
        self._fences, self._clock, self._reports = fences, clock, reports
        self._coordinator, self._timeout_s = tiers.coordinator, timeout_s
        self._pickles: dict[str, tuple[Any, str, bytes]] = {}
        self._readable = readable
        self._missed = 0  # saves in a row that found no generation
        self._underway = deque[int](maxlen=256)  # the last steps, whose saves may not have ended

    def begin(self, attempt: Attempt) -> bool:
        """Whether a save has begun. Raises what a user's object raises, and `UserError` where the memory that was asked
        for cannot be had from the start; the attempt has then failed on all ranks, as it has when no error is raised
        and a report says why."""
        claimed = None
        self._let_end(attempt.step)
        try:
            attempt, claimed = self._claim(attempt)
            if not attempt.tiers:  # known before any look at the state, which would be dear for nothing
                return False
            values = self._live.values(attempt.name, self._before_planning)
            if self._in_memory(attempt) and (claimed is None or not self._ready):
                claimed = None  # what it was of has gone with the plan
                attempt, claimed = self._claim_again(attempt)
                if not attempt.tiers:
                    return False
            with one_save(self._coordinator.rank):
                self._start(attempt, values, claimed)
        except Exception as error:
            self._refuse(attempt, claimed, error)
            if isinstance(error, PeerLost):
                return False
            raise
        return True

    def _let_end(self, step: int) -> None:
        """Wait for earlier saves of `step`: host memory has one place for each step, which must not keep the older."""
        if not self._pipeline.busy:
            self._underway.clear()
        elif step in self._underway and self._tiers.host is not None:
            self._pipeline.drain(far=False)
        self._underway.append(step)

    def plan(self) -> None:
        """Have the plan of the state as it is now, without a save. Collective; raises what `begin` would."""
        attempt = self._tiers.attempt(0, disk=False, host=False)
        try:
            self._live.values(attempt.name, self._before_planning)
        except Exception as error:
            self._refuse(attempt, None, error)
            raise

    def _refuse(self, attempt: Attempt, claimed: Claim | None, error: Exception) -> None:
        rank = self._coordinator.rank
        reason = str(error) if isinstance(error, PeerLost) else f"rank {rank}: {type(error).__name__}: {error}"
        self._tiers.refuse(attempt, claimed, reason)
        self._reports.take(dropped(attempt, attempt.tiers, reason))

    def _before_planning(self) -> None:
        self._pipeline.drain(far=False)  # a slow store must not hold up the step in which the state grows
        self._budget.drop()

    def _in_memory(self, attempt: Attempt) -> bool:
        return self._tiers.host is not None and self._tiers.host.tier in attempt.tiers

    @property
    def _ready(self) -> bool:
        """Whether host memory is made for the last plan, as far as this rank knows."""
        host = self._tiers.host
        return host is not None and self._live.planned and host.ready(self._live.plan)

    def _claim(self, attempt: Attempt, *, again: bool = False) -> tuple[Attempt, Claim | None]:
        """A generation of host memory for `attempt`; where none is free, its other tiers go on without. Where only the
        state can tell, `attempt` stays as it is and has none yet. Rank 0's word says which, so that all go one way."""
        host = self._tiers.host
        if host is None or host.tier not in attempt.tiers:
            return attempt, None
        with one_save(self._coordinator.rank):
            found = host.claim(attempt, flush="disk" in attempt.tiers, ready=self._ready, again=again)
        if isinstance(found, StateFirst):
            if found.anew:
                self._pipeline.drain(far=False)  # nobody may use what is given back, nor what was chosen of it
                host.forget_choices()
            return attempt, None
        self._missed = 0 if found is not None else self._missed + 1
        if self._missed == MISSED and self._coordinator.rank == 0:
            log.warning(
                "the last %d saves for host memory found no place there, for all generations are in use: see explain() "
                "for what takes so long, save more rarely, or pass more host_generations",
                MISSED,
            )
        return (attempt.without(host.tier) if found is None else attempt), found

    def _claim_again(self, attempt: Attempt) -> tuple[Attempt, Claim | None]:
        """The same once the state is known, and memory made for its plan."""
        host = self._tiers.host
        assert host is not None
        self._comes_not_to_plan(attempt)
        try:
            host.prepare(attempt.at("host"), self._live.plan, pinned=self._live.pinned)
        except PeerLost as error:  # on all ranks
            self._reports.take(dropped(attempt, [host.tier], str(error)))
            return attempt.without(host.tier), None
        return self._claim(attempt, again=True)

    def _comes_not_to_plan(self, attempt: Attempt) -> None:
        """Said before this rank goes to another meeting: one that waits for it where the plan is made hears it, and
        will not come there. (What needs no meeting says it later, see `Committer`.)"""
        if self._coordinator.world > 1 and not self._live.planned_now:
            self._coordinator.decide(f"{attempt.at('plan')}/verdict", kept(self._coordinator.rank))

    def _arena(self, attempt: Attempt) -> Memory:
        """The arena, made on all ranks or none."""
        make = partial(self._budget.arena, self._live.plan.image, pinned=self._live.pinned)
        if self._budget.made:
            return make()
        self._comes_not_to_plan(attempt)
        try:
            return self._coordinator.together(attempt.at("arena"), make, timeout_s=self._timeout_s)
        except BaseException:
            self._budget.drop()
            raise

    def _start(self, attempt: Attempt, values: Mapping[str, Any], claimed: Claim | None) -> None:
        live, arena = self._live, partial(self._arena, attempt)
        objects = {index.fqn: values[index.fqn] for index in live.plan.objects}
        save = Save(attempt, live.plan, objects, self._pickles, self._readable, live.planned_now)
        live.staging.fill(live.eager)
        sources, seals = live.sources, live.seals()
        memory, parts, on_chunks = self._tiers.route(save, claimed, arena, self._pipeline, live.copier)
        parking = self._budget.park.lend(live.plan.image, live.copier)  # from here on a snapshot must give it back
        live.copier.begin()
        way = (live.staging, live.copier, memory, on_chunks, seals, live.addresses)
        # only memory that nobody reads before all of it is there takes everything in one call
        once = live.plan.image.chunks if live.copier.queues and attempt.tiers == ("host",) and len(seals) < 2 else None
        save.snapshot = Snapshot(attempt.step, live.plan, sources, *way, at_once=once, parking=parking)
        self._fences.begun(save)
        save.call_s = time.monotonic() - attempt.began_s
        self._clock.began(attempt.step, len(parts))
        self._pipeline.submit(save, parts)
