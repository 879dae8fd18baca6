"""The host-memory tier of several machines: every save lies in its rank's memory and in that of a rank elsewhere.

A drop-in for `HostTier` where `Checkpointer` is given `partner=…`. A rank has `generations` of its own shard, mapped
and pinned, into which saves are copied in turn, and two of each rank whose partner it is; of both the newest committed
one is never overwritten. Rank 0 chooses for all. Nothing here is shared by machines but words in the `Coordinator`'s
store and the connections of `partner_wire`.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..dist import launch
from ..dist.errors import PeerLost, UserError
from ..dist.host import host_identity
from ..dist.log import get_logger
from ..dist.trace import Trace
from ..dist.units import format_bytes
from . import host_tier
from .coordinate import Coordinator
from .copies import HostCopier
from .generation import Generation
from .partner import Partner, Place, machine_of, pair
from .partner_copy import Errand, PartnerFile, PartnerFolder, PartnerOps
from .partner_holder import Holder
from .partner_memory import Held, PartnerMemory, invalidate
from .partner_wire import Link, Server
from .plan import SavePlan
from .save import Save

log = get_logger(__name__)
HELD = 2  # one committed, one on its way


@dataclass
class _Slot:
    """What rank 0 knows of a generation, its own or held by a partner: the committed step in it, and its users."""

    step: int | None = None
    users: set[str] = field(default_factory=set)


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
        self.coordinator, self.option, self._count = coordinator, option, generations
        self._timeout_s, self._trace = timeout_s, trace
        self.memory = PartnerMemory(Path(option.memory or host_tier.SHARED_MEMORY), root)
        self.holder = Holder(self.memory)
        self.secret = ""
        self.places: tuple[Place, ...] = ()
        self.partners: tuple[int, ...] = ()
        address = option.address or _own_address(coordinator.rank)
        self._server = Server(address, lambda: self.secret, self.holder.handle)
        host = option.host or host_identity()
        self._place = Place(host, str(self.memory.memory.resolve()), address, self._server.port)
        self._ops = PartnerOps()
        self.folder = PartnerFolder(self.memory.root, self._ops, lambda: list(self._committed))
        self._link: Link | None = None
        self._mine: list[Generation] = []
        self._slots: list[_Slot] = []
        self._there: list[_Slot] = []
        self._chosen: dict[int, int] = {}  # own generation → the partner's
        self._committed: list[int] = []  # the newest step that a restart would find here
        self._known = False  # whether what earlier jobs have left is known to be of no use, or to be `_committed`
        self._made: set[str] = set()  # this rank's entries
        self._foreign_left = True  # of earlier jobs
        self._plans = self._last = 0
        self._plan: SavePlan | None = None
        self._proven = False
        self._said: deque[str] = deque()
        self.skipped = 0

    # -- meeting ------------------------------------------------------------------------------------------------------

    def introduce(self) -> None:
        """All ranks: say where this one is."""
        self.coordinator.say("partner/place", self._place)

    def take(self) -> None:
        """Rank 0: choose the partners and tell everyone. `UserError` where there are none."""
        places = self.coordinator.hear_all("partner/place", timeout_s=self._timeout_s)
        partners = pair(places, across_hosts=self.option.across_hosts)
        self.coordinator.say("partner/table", (tuple(places), partners, secrets.token_hex(16)))

    def join(self) -> None:
        """All ranks, when rank 0 has said that all is well."""
        deadline_s = time.monotonic() + self._timeout_s
        self.places, self.partners, self.secret = self.coordinator.hear("partner/table", 0, deadline_s=deadline_s)
        to = self.partners[self.coordinator.rank]
        self._link = self.link(to, purpose="send", timeout_s=self.option.timeout_s)
        if self.leads:
            self.memory.clear()
        log.info("rank %d copies its saves to rank %d on %s", self.coordinator.rank, to, name_of(self.places[to]))

    def link(self, rank: int, *, purpose: str, timeout_s: float) -> Link:
        """A connection to `rank`."""
        place, me = self.places[rank], self.coordinator.rank
        return Link(me, place.address, place.port, self.secret, purpose=purpose, timeout_s=timeout_s)

    @property
    def leads(self) -> bool:
        """Whether this rank looks after its machine's folder."""
        return machine_of(self.places)[self.coordinator.rank] == self.coordinator.rank

    # -- memory -------------------------------------------------------------------------------------------------------

    def prepare(self, name: str, plan: SavePlan, *, pinned: bool) -> None:
        """Make room for `plan` here and at the partner, unless it is there. As `HostTier.prepare`."""
        if plan is self._plan:
            return
        self._plan = None
        try:
            self.coordinator.together(name, partial(self._prepare, name, plan, pinned), timeout_s=host_tier.WAIT_S)
        except BaseException:
            self._drop()
            raise
        self._plan, self._proven = plan, True

    def _prepare(self, name: str, plan: SavePlan, pinned: bool) -> None:
        me = self.coordinator.rank
        sizes = self._table(f"{name}/size", plan.image.size)  # whoever has said it has sent all it had to send
        self._drop()
        self.memory.make()
        free = self._table(f"{name}/free", self.memory.free())
        if problem := self._shortage(sizes, free):
            error = UserError(problem, remedy="pass host_every=0, or fewer host_generations")
            raise PeerLost(str(error)) if self._proven else error
        self._plans += 1
        for slot in range(self._count):
            path = self._entry("own", me, slot)
            self.folder.ops.mkdir(path)
            self._mine.append(Generation(path / plan.shard_name, plan, pinned=pinned))
        for owner in self._owners(me):
            for slot in range(HELD):
                room = (owner, self._plans, slot)
                self.holder.rooms[room] = Held(self._entry("held", owner, slot), f"__{owner}_0.distcp", sizes[owner])
        self._slots, self._there = [[_Slot() for _ in range(count)] for count in (self._count, HELD)]
        self._table(f"{name}/open", True)  # nobody sends before all have room

    def _table(self, name: str, word: object) -> list:
        """Every rank's word, through rank 0."""
        unless, here = f"{name.rsplit('/', 1)[0]}/verdict", self.coordinator
        here.say(name, word)
        if here.rank == 0:
            here.say(f"{name}/all", here.hear_all(name, timeout_s=host_tier.WAIT_S, unless=unless))
        return here.hear(f"{name}/all", 0, deadline_s=time.monotonic() + host_tier.WAIT_S, unless=unless)

    def _owners(self, rank: int) -> list[int]:
        """The ranks whose partner `rank` is."""
        return [owner for owner, partner in enumerate(self.partners) if partner == rank]

    def _need(self, rank: int, sizes: list[int]) -> int:
        return self._count * sizes[rank] + HELD * sum(sizes[owner] for owner in self._owners(rank))

    def _shortage(self, sizes: list[int], free: list[int]) -> str:
        leaders = machine_of(self.places)
        for leader in sorted(set(leaders)):
            need = sum(self._need(rank, sizes) for rank in range(len(sizes)) if leaders[rank] == leader)
            if need > free[leader]:
                place = self.places[leader]
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

    def claim(self, name: str, step: int, *, flush: bool) -> tuple[int, Path] | None:
        """As `HostTier.claim`."""
        if step <= self._last:
            self.forget_after(step)
        self._last, mine = step, None
        if self.coordinator.rank == 0:
            mine = self._choose(flush)
        chosen = self.coordinator.lead(name, mine, otherwise=None, timeout_s=60)
        if mine is not None and mine != chosen:
            self.release(mine[0])
        if self.coordinator.rank == 0:
            self._said.append(name)
            if len(self._said) > 8:  # ranks are never that many steps apart
                self.coordinator.forget(self._said.popleft())
        if isinstance(chosen, str):
            raise PeerLost(chosen)
        if chosen is None:
            self.skipped += 1
            return None
        own, there = chosen
        self._chosen[own] = there
        path = self._entry("own", self.coordinator.rank, own)
        invalidate(path)
        return own, path

    def _choose(self, flush: bool) -> tuple[int, int] | None:
        own, there = _free(self._slots), _free(self._there)
        if own is None or there is None:
            return None
        self._slots[own] = _Slot(None, {"host", "flush"} if flush else {"host"})
        self._there[there] = _Slot(None, {"host"})
        self._chosen[own] = there
        return own, there

    def generation(self, index: int) -> Generation:
        return self._mine[index]

    def file(self, claimed: tuple[int, Path], save: Save, copier: HostCopier) -> PartnerFile:
        """The `TierFile` of a save in the generation that it has claimed."""
        own, path = claimed
        number, token = save.attempt.number, self.coordinator.token
        errand = Errand(f"{token}/{number}", save.step, number, self._plans, self._chosen[own])
        assert self._link is not None
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
            slot = self._slots[index]
            slot.users.discard(user)
            if user == "host":
                there = self._there[self._chosen[index]]
                there.users.clear()
                slot.step = there.step = step if ok else None
        if user == "host" and ok:
            self._committed, self._known = [step], True
            now = f"{self.coordinator.token}-{self._plans:x}-"
            for name in [name for name in self._made if not name.startswith(now)]:
                self.memory.remove(name)
                self._made.discard(name)
            if self.leads:
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
        """All ranks: the job goes on from `step`, found in memory (None: from elsewhere); later ones are forgotten, and
        so is what other jobs have left of other steps."""
        self._known, self._committed = True, [] if step is None else [step]
        if self.leads:
            self._remove_foreign(but=step)

    def forget_after(self, step: int) -> None:
        """All ranks: checkpoints in memory after `step` are of a branch that was rolled back."""
        for slot in (*self._slots, *self._there):
            slot.step = None if slot.step is not None and slot.step > step else slot.step
        self._committed = [found for found in self._committed if found <= step]
        for entry in self.memory.entries():
            if entry.step > step and (entry.name in self._made or self.leads):
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
        self._server.close()
        if remove:
            self._committed = []
        self._drop()
        if remove and self._known and self.places and self.leads:
            self._remove_foreign()
        with suppress(OSError):
            if remove and not [path for path in self.memory.root.iterdir() if path.is_dir()]:
                self.memory.remove_all()

    def explain(self, rhythm: str) -> str:
        """Two lines: who copies to whom, and the memory it takes."""
        me = self.coordinator.rank
        to = self.partners[me]
        lines = [f"  partner {rhythm} → {self.memory.root}, and rank {to} on {name_of(self.places[to])}"]
        own = sum(generation.nbytes for generation in self._mine)
        held = sum(held.nbytes for held in self.holder.rooms.values())
        ranks = ", ".join(map(str, self._owners(me))) or "none"
        sizes = f": {format_bytes(own)} + {format_bytes(held)}" if self._mine else ""
        lines.append(f"          memory here {self._count} × own + {HELD} × that of rank {ranks}{sizes}")
        return "\n".join(lines)


def _free(slots: list[_Slot]) -> int | None:
    """The slot to be overwritten next: never the newest committed one, nor one in use."""
    newest = max((slot.step for slot in slots if slot.step is not None), default=None)
    usable = [
        index for index, slot in enumerate(slots) if not slot.users and (slot.step is None or slot.step != newest)
    ]
    return min(usable, key=lambda index: -1 if (step := slots[index].step) is None else step, default=None)


def name_of(place: Place) -> str:
    """A machine's name for people."""
    return place.host.rsplit("/", 1)[-1]


def _own_address(rank: int) -> str:
    """Where the other ranks reach this one: as rank 0's store is reached, or from where the way to it begins."""
    master = launch.detect().master_addr
    if rank == 0 or master.startswith("127.") or master == "localhost":
        return "127.0.0.1" if master == "localhost" else master
    return launch.address_towards(master) or master
