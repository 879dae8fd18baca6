"""One executor and one set of rates per process group, made when the group is first used and kept with it.

A group's executor owns a communicator of its own, so two groups never wait for each other and calls on one group run
in the order in which all its ranks make them. Rates come from rank 0's machine file, so that all ranks choose alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ...comms.link import LinkModel
from ...comms.mpi_group import MpiGroup
from ...comms.p2p import P2P
from ...dist.log import get_logger
from ...dist.machine import Machine
from ..partition import Group, place

log = get_logger(__name__)


@dataclass
class Home:
    """What is kept for one group and device. `machine` None: rates are assumed."""

    group: Group
    rank: int
    world: int
    executor: P2P | None
    machine: Machine | None
    gates: dict[Any, Any] = field(default_factory=dict)  # of `gate`, by problem and phase


_homes: dict[tuple[str, str], Home] = {}


def home(group: Group, device: torch.device, *, link: LinkModel | None = None) -> Home:
    """The home of `group`; collective at its first call for a group and device."""
    rank, world = place(group)
    if world == 1:
        return Home(group, 0, 1, None, None)
    real = group or dist.group.WORLD
    assert real is not None
    key = f"MPI {id(real)}" if isinstance(real, MpiGroup) else real.group_name, str(device)
    found = _homes.get(key)
    if found is None or found.group is not real:
        executor = P2P(real, device=device, link=link)
        found = _homes[key] = Home(real, rank, world, executor, _machine(real))
    return found


def _machine(group: dist.ProcessGroup | MpiGroup) -> Machine | None:
    """Rank 0's machine file, or None."""
    found: list[Machine | None] = [None]
    if place(group)[0] == 0 and Machine.default_path().exists():
        found[0] = Machine.load(Machine.default_path())
    if isinstance(group, MpiGroup):
        return group.from_first(found[0])
    dist.broadcast_object_list(found, group_src=0, group=group)
    return found[0]


def homes() -> list[Home]:
    """All that are kept."""
    return list(_homes.values())


def forget(group: Group = None) -> None:
    """Close the executors of `group`, or of all; collective. Call it before the process group is destroyed."""
    for key, found in list(_homes.items()):
        if group is None or found.group is group:
            del _homes[key]
            if found.executor is not None:
                found.executor.close()
