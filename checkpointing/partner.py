"""Who keeps a copy of whose memory: the option `partner`, and the rule that pairs ranks over machines.

A rank's partner is the rank of the next machine that has the same place among its machine's ranks: with n ranks on
each, rank r copies to rank r + n. The loss of a machine then takes one copy of every shard and never both. Machines are
told apart by name and follow one another in the order of their first ranks. Pure: it knows no socket and no file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..dist.errors import UserError


@dataclass(frozen=True)
class Partner:
    """Copy every save to host memory into the memory of a rank on another machine, too.

    `across_hosts=False`: on one machine the next rank is the partner, which survives the loss of a rank's memory but
    not of the machine: for trials. `timeout_s`: a copy that is not complete after so long is given up, and with it this
    save. `address`: under which other ranks reach this one (default: where the way to rank 0 begins). `host`: this
    machine's name (default: its own), for containers that share a machine and must not be each other's partners.
    `memory`: a folder in this machine's memory (default: /dev/shm). The last three may differ by rank.
    """

    across_hosts: bool = True
    timeout_s: float = 120.0
    address: str = ""
    host: str = ""
    memory: Path | str = ""

    def __post_init__(self) -> None:
        if self.timeout_s <= 0:
            raise UserError(f"Partner(timeout_s={self.timeout_s})", expected="a positive number of seconds")


@dataclass(frozen=True)
class Place:
    """Where a rank is: its machine's name, the folder in that machine's memory, and where it listens."""

    host: str
    memory: str
    address: str
    port: int


def pair(places: Sequence[Place], *, across_hosts: bool) -> tuple[int, ...]:
    """partner[r], to which rank r copies; none at all when there is none that the loss of r's machine would spare: a
    job that goes on with one machine left must still start."""
    hosts: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        hosts.setdefault(place.host, []).append(rank)
    if len(places) < 2 or (len(hosts) == 1 and across_hosts):
        return ()
    if len(hosts) == 1:
        return tuple((rank + 1) % len(places) for rank in range(len(places)))
    names, found = list(hosts), [0] * len(places)
    for index, name in enumerate(names):
        there = hosts[names[(index + 1) % len(names)]]
        for local, rank in enumerate(hosts[name]):
            found[rank] = there[local % len(there)]
    return tuple(found)


def machine_of(places: Sequence[Place]) -> tuple[int, ...]:
    """leader[r]: the first rank that shares r's memory folder; it looks after that folder for all of them."""
    first: dict[tuple[str, str], int] = {}
    return tuple(first.setdefault((place.host, place.memory), rank) for rank, place in enumerate(places))
