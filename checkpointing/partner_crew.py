"""The ranks as partners: who they are to each other, where they listen, and words that all of them hear.

Every rank says where it is, rank 0 pairs them (`partner.pair`) and tells everyone. From then on a rank can be reached
by its `Server`, without any help of the training's process groups.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from ..dist import launch
from ..dist.host import host_identity
from ..dist.log import get_logger
from . import host_tier
from .coordinate import Coordinator
from .partner import Partner, Place, machine_of, pair
from .partner_wire import Handler, Link, Server

log = get_logger(__name__)


class Crew:
    """This rank among the others. `partners[r]` is the rank to which r copies; empty when there is one machine only."""

    def __init__(self, coordinator: Coordinator, option: Partner, handle: Handler, *, timeout_s: float) -> None:
        self.coordinator, self.rank, self._option, self._timeout_s = coordinator, coordinator.rank, option, timeout_s
        self._secret = ""
        self.places: tuple[Place, ...] = ()
        self.partners: tuple[int, ...] = ()
        self.memory = Path(option.memory or host_tier.SHARED_MEMORY)
        address = option.address or _own_address(self.rank)
        self._server = Server(address, lambda: self._secret, handle)
        host = option.host or host_identity()
        self._place = Place(host, str(self.memory.resolve()), address, self._server.port)

    def introduce(self) -> None:
        """All ranks: say where this one is."""
        self.coordinator.say("partner/place", self._place)

    def choose(self) -> None:
        """Rank 0: choose the partners and tell everyone."""
        places = self.coordinator.hear_all("partner/place", timeout_s=self._timeout_s)
        partners = pair(places, across_hosts=self._option.across_hosts)
        self.coordinator.say("partner/table", (tuple(places), partners, secrets.token_hex(16)))
        if partners:
            pairs = ", ".join(f"{rank} → {to} on {name_of(places[to])}" for rank, to in enumerate(partners[:16]))
            log.info("partner copies by rank: %s%s", pairs, ", …" if len(partners) > 16 else "")
        else:
            log.warning("%s", alone(places))

    def join(self) -> None:
        """All ranks, when rank 0 has said that all is well."""
        deadline_s = time.monotonic() + self._timeout_s
        self.places, self.partners, self._secret = self.coordinator.hear("partner/table", 0, deadline_s=deadline_s)

    def link(self, rank: int, *, purpose: str, timeout_s: float) -> Link:
        """A connection to `rank`."""
        place = self.places[rank]
        return Link(self.rank, place.address, place.port, self._secret, purpose=purpose, timeout_s=timeout_s)

    @property
    def leads(self) -> bool:
        """Whether this rank looks after its machine's folder."""
        return self.leaders[self.rank] == self.rank

    @property
    def leaders(self) -> tuple[int, ...]:
        return machine_of(self.places)

    def owners(self, rank: int) -> list[int]:
        """The ranks whose partner `rank` is."""
        return [owner for owner, partner in enumerate(self.partners) if partner == rank]

    def table(self, name: str, word: object, *, timeout_s: float, unless: str = "") -> list:
        """Every rank's word, through rank 0. `PeerLost` as `Coordinator.hear`."""
        here = self.coordinator
        here.say(name, word)
        if here.rank == 0:
            here.say(f"{name}/all", here.hear_all(name, timeout_s=timeout_s, unless=unless))
        return here.hear(f"{name}/all", 0, deadline_s=time.monotonic() + 2 * timeout_s, unless=unless)

    def close(self) -> None:
        self._server.close()


def alone(places: list[Place] | tuple[Place, ...]) -> str:
    """What a job without partners is told."""
    return (
        f"no partner copies: all ranks ({len(places)}) are on {name_of(places[0])}, and copies there would be lost "
        "with it. Saves go to their own memory only; Partner(across_hosts=False) copies them for a trial"
    )


def name_of(place: Place) -> str:
    """A machine's name for people."""
    return place.host.rsplit("/", 1)[-1]


def _own_address(rank: int) -> str:
    """Where the other ranks reach this one: as rank 0's store is reached, or from where the way to it begins."""
    master = launch.detect().master_addr
    if rank == 0 or master.startswith("127.") or master == "localhost":
        return "127.0.0.1" if master == "localhost" else master
    return launch.address_towards(master) or master
