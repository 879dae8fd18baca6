"""The host-memory tier of several machines: every save lies in its rank's memory and in that of a rank elsewhere.

A drop-in for `HostTier` where `Checkpointer` is given `partner=…`. A rank has `generations` of its own shard, mapped
and pinned, into which saves are copied in turn, and two of each rank whose partner it is; of both the newest committed
one is never overwritten. Rank 0 chooses for all. Nothing here is shared by machines but words in the `Coordinator`'s
store and the connections of `partner_wire`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from ..dist.errors import PeerLost, UserError
from ..dist.trace import Trace
from ..dist.units import format_bytes
from .attempt import Attempt
from .choices import Choices, StateFirst
from .coordinate import Coordinator
from .copies import HostCopier
from .generation import REMOVED, Generation
from .host_tier import WAIT_S, free_stale
from .partner import Partner
from .partner_copy import Errand, PartnerFile, PartnerFolder, PartnerOps
from .partner_crew import Crew, alone, name_of
from .partner_holder import Holder
from .partner_memory import Held, PartnerMemory, invalidate
from .partner_wire import Link
from .plan import SavePlan
from .save import Save, SaveReport
from .turns import Claim, Slot, next_free

HELD = 2  # one committed, one on its way


class PartnerTier:
    """`generations` checkpoints in each rank's memory and two in its partner's, for the checkpoint folder `root`."""

    tier = "partner"

    def __init__(
        self, root: Path, coordinator: Coordinator, option: Partner, *, generations: int, timeout_s: float, trace: Trace
    ) -> None:
        if generations < 2:
            raise UserError(
                f"host_generations is {generations}", expected="at least 2: one valid while the other is written"
            )
        self.coordinator, self._option, self._count, self._trace = coordinator, option, generations, trace
        self.holder = Holder()
        self.crew = Crew(coordinator, option, self.holder.handle, timeout_s=timeout_s)
        self.memory = self.holder.memory = PartnerMemory(self.crew.memory, root)
        self._ops = PartnerOps()
        self.folder = PartnerFolder(self.memory.root, self._ops, lambda: list(self._committed))
        self._link: Link | None = None
        self._mine: list[Generation] = []
        self._slots: list[Slot] = []
        self._there: list[Slot] = []
        self._chosen: dict[int, int] = {}  # own generation → the partner's
        self._committed: list[int] = []  # the newest step that a restart would find here
        self._known = False  # whether what earlier jobs have left is known to be of no use, or to be `_committed`
        self._made: set[str] = set()  # this rank's entries
        self._foreign_left = True  # of earlier jobs
        self._plans = self._last = 0
        self._plan: SavePlan | None = None
        self._proven = False
        self._lost, self._since = False, -1  # memory that somebody has removed; the step from which it was had anew
        self._choices = Choices(coordinator)
        self.skipped = 0

    def take(self) -> None:
        """Rank 0: choose the partners."""
        self.crew.choose()

    def join(self) -> None:
        """All ranks, when rank 0 has said that all is well."""
        self.crew.join()
        if self.crew.partners:
            to = self.crew.partners[self.crew.rank]
            self._link = self.crew.link(to, purpose="send", timeout_s=self._option.timeout_s)
        if self.crew.leads:
            free_stale(self.memory.memory, self.memory.root)
            self.memory.clear()

    # -- memory -------------------------------------------------------------------------------------------------------

    def prepare(self, name: str, plan: SavePlan, *, pinned: bool) -> None:
        """Make room for `plan` here and at the partner, unless it is there. As `HostTier.prepare`."""
        if plan is self._plan:
            return
        self._plan = None
        try:
            self.coordinator.together(name, partial(self._prepare, name, plan, pinned), timeout_s=WAIT_S)
        except BaseException:
            self._drop()
            raise
        self._plan, self._proven = plan, True

    def _prepare(self, name: str, plan: SavePlan, pinned: bool) -> None:
        me = self.crew.rank
        # whoever has said it has sent all it had to send
        words = self._table(f"{name}/size", (plan.image.size, self._plans))
        sizes = [size for size, _ in words]
        self._drop()
        self.memory.make()
        if self.crew.leads and self._known:
            self._remove_foreign(but=max(self._committed, default=None))
        free = self._table(f"{name}/free", self.memory.free())
        if problem := self._shortage(sizes, free):
            error = UserError(problem, remedy="pass host_every=0, or fewer host_generations")
            raise PeerLost(str(error)) if self._proven else error
        self._plans = 1 + max(plans for _, plans in words)  # a rank may have missed one that failed
        for slot in range(self._count):
            path = self._entry("own", me, slot)
            self.folder.ops.mkdir(path)
            self._mine.append(Generation(path / plan.shard_name, plan, pinned=pinned))
        for owner in self.crew.owners(me):
            for slot in range(HELD):
                room = (owner, self._plans, slot)
                self.holder.rooms[room] = Held(self._entry("held", owner, slot), f"__{owner}_0.distcp", sizes[owner])
        self._slots, self._there = [[Slot() for _ in range(count)] for count in (self._count, HELD)]
        self._table(f"{name}/open", True)  # nobody sends before all have room

    def _table(self, name: str, word: object) -> list:
        return self.crew.table(name, word, timeout_s=WAIT_S, unless=f"{name.rsplit('/', 1)[0]}/verdict")

    def _need(self, rank: int, sizes: list[int]) -> int:
        return self._count * sizes[rank] + HELD * sum(sizes[owner] for owner in self.crew.owners(rank))

    def _shortage(self, sizes: list[int], free: list[int]) -> str:
        leaders = self.crew.leaders
        for leader in sorted(set(leaders)):
            need = sum(self._need(rank, sizes) for rank in range(len(sizes)) if leaders[rank] == leader)
            if need > free[leader]:
                place = self.crew.places[leader]
                return (
                    f"{self._count} generations of each rank's state and {HELD} of its partner's need "
                    f"{format_bytes(need)} on {name_of(place)}, where {place.memory} has {format_bytes(free[leader])}"
                )
        return ""

    def _entry(self, kind: str, rank: int, slot: int) -> Path:
        name = f"{self.coordinator.token}-{self._plans:x}-{kind}-{rank:05d}-{slot}"
        self._made.add(name)
        return self.memory.root / name

    def _drop(self) -> None:
        """Unmap this rank's memory and give back what is not part of the newest committed save."""
        self.close_maps()
        mine = {entry.name: entry.step for entry in self.memory.entries() if entry.name in self._made}
        for name in list(self._made):
            if mine.get(name) not in self._committed:
                self.memory.remove(name)
                self._made.discard(name)

    # -- saves --------------------------------------------------------------------------------------------------------

    def ready(self, plan: SavePlan) -> bool:
        """As `HostTier.ready`."""
        return plan is self._plan

    def claim(self, attempt: Attempt, *, flush: bool, ready: bool, again: bool = False) -> Claim | StateFirst | None:
        """As `HostTier.claim`."""
        step = attempt.step
        if step <= self._last and not again:
            self.forget_after(step)
        self._last, mine = step, None
        if self.coordinator.rank == 0:
            mine = StateFirst(anew=self._lost) if self._lost or not ready else self._choose(flush)
            self._lost, self._since = False, step if self._lost else self._since
        name, patience_s = attempt.at("again" if again else "claim"), None if ready else WAIT_S
        chosen = self._choices.tell(name, mine, undo=lambda one: self.release(one[0]), patience_s=patience_s)
        if chosen is None:
            self.skipped += 1
        if isinstance(chosen, StateFirst) and chosen.anew:
            self._plan = None  # on all ranks, so that `prepare` makes it anew
        if chosen is None or isinstance(chosen, StateFirst):
            return chosen
        own, there = chosen
        self._chosen[own] = there
        path = self._entry("own", self.coordinator.rank, own)
        invalidate(path)
        return own, path

    def forget_choices(self) -> None:
        """Nothing is chosen ahead here."""

    def _choose(self, flush: bool) -> tuple[int, int] | None:
        own, there = next_free(self._slots), next_free(self._there)
        if own is None or there is None:
            return None
        self._slots[own] = Slot(None, {"host", "flush"} if flush else {"host"})
        self._there[there] = Slot(None, {"host"})
        self._chosen[own] = there
        return own, there

    def heard(self, report: SaveReport) -> None:
        """Of a save that has ended: whether a machine's memory was removed meanwhile. All that were on their way then
        say so; `claim` waits for them."""
        if report.tier == self.tier and REMOVED in report.reason and report.step >= self._since:
            self._lost = True

    def generation(self, index: int) -> Generation:
        return self._mine[index]

    def file(self, claimed: Claim, save: Save, copier: HostCopier) -> PartnerFile:
        """The `TierFile` of a save in the generation that it has claimed."""
        own, path = claimed
        number, token = save.attempt.number, self.coordinator.token
        errand = Errand(f"{token}/{number}", save.step, number, self._plans, self._chosen[own])
        return PartnerFile(
            path / save.plan.shard_name,
            self._mine[own],
            save.plan.image,
            errand,
            self._link,
            self._ops,
            copier=copier,
            failed=lambda: save.snapshot.error,
            trace=self._trace,
        )

    def done(self, index: int, step: int, user: str, ok: bool) -> None:
        """As `HostTier.done`. When a save is committed, what older jobs and plans have left is given back."""
        if self.coordinator.rank == 0:
            self._choices.tidy()
            slot = self._slots[index]
            slot.users.discard(user)
            if user == "host":
                there = self._there[self._chosen[index]]
                there.users.clear()
                for older in (*self._slots, *self._there):  # of the same step, which would be the newest, too
                    older.step = None if ok and older.step == step else older.step
                slot.step = there.step = step if ok else None
        if user == "host" and ok:
            self._committed, self._known = [step], True
            now = f"{self.coordinator.token}-{self._plans:x}-"
            for name in [name for name in self._made if not name.startswith(now)]:
                self.memory.remove(name)
                self._made.discard(name)
            if self.crew.leads:
                self._remove_foreign()

    def _remove_foreign(self, *, but: int | None = None) -> None:
        """Entries of earlier jobs, less those of the step `but`."""
        for entry in self.memory.entries() if self._foreign_left else []:
            if not entry.name.startswith(f"{self.coordinator.token}-") and entry.step != but:
                self.memory.remove(entry.name)
        self._foreign_left = but is not None

    def release(self, index: int) -> None:
        """Rank 0: a generation that was claimed in vain."""
        self._slots[index].users.clear()
        self._there[self._chosen[index]].users.clear()

    def restored(self, step: int | None) -> None:
        """All ranks: the job goes on from `step`, found in memory (None: from elsewhere). What earlier jobs have left
        of other steps is of no use then; it goes when its memory is needed."""
        self._known, self._committed = True, [] if step is None else [step]

    def forget_after(self, step: int) -> None:
        """All ranks: checkpoints in memory after `step` are of a branch that was rolled back."""
        self._since = min(self._since, step)
        self._forget(lambda found: found > step)

    def forget(self, step: int) -> None:
        """All ranks: what memory has of `step` is not the last save of it."""
        self._forget(lambda found: found == step)

    def _forget(self, which: Callable[[int], bool]) -> None:
        for slot in (*self._slots, *self._there):
            slot.step = None if slot.step is not None and which(slot.step) else slot.step
        self._committed = [found for found in self._committed if not which(found)]
        for entry in self.memory.entries():
            if which(entry.step) and (entry.name in self._made or self.crew.leads):
                invalidate(self.memory.root / entry.name)

    # -- ending -------------------------------------------------------------------------------------------------------

    def close_maps(self) -> None:
        for generation in self._mine:
            generation.close()
        self._mine = []
        self._slots, self._there, self.holder.rooms = [], [], {}

    def close(self, *, remove: bool) -> None:
        """Unmap, and keep the newest checkpoint only, or with `remove` nothing."""
        self._ops.end()
        self.crew.close()
        if remove:
            self._committed = []
        self._drop()
        if remove and self._known and self.crew.places and self.crew.leads:
            self._remove_foreign()
        with suppress(OSError):
            if remove and not [path for path in self.memory.root.iterdir() if path.is_dir()]:
                self.memory.remove_all()

    def explain(self, rhythm: str) -> str:
        """Two lines: who copies to whom, and the memory it takes."""
        crew, held = self.crew, self.holder.rooms.values()
        lines = [f"  partner {rhythm} → {self.memory.root}"]
        if not crew.partners:
            return f"{lines[0]}\n          {alone(crew.places)}"
        to = crew.partners[crew.rank]
        lines[0] += f", and rank {to} on {name_of(crew.places[to])}"
        ranks = ", ".join(map(str, crew.owners(crew.rank))) or "none"
        sizes = [sum(one.nbytes for one in self._mine), sum(one.nbytes for one in held)]
        text = f": {format_bytes(sizes[0])} + {format_bytes(sizes[1])}" if self._mine else ""
        lines.append(f"          memory here {self._count} × own + {HELD} × that of rank {ranks}{text}")
        return "\n".join(lines)
