"""Links as resources: which of them a message occupies, and how messages that share one divide it.

A message is a flow; its rate is the max-min fair share over all resources that it crosses (Bertsekas & Gallager, *Data
Networks*, section 6.5): the usual flow-level model, without packets. Ports, pairs and a shared bus cover a switch
(NVSwitch: only the port limits), a full mesh (xGMI: only the pair limits) and a PCIe root (all share one). Latency is
paid once per message and occupies nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..dist.errors import UserError
from ..dist.machine import Machine

TOPOLOGIES = {"ports": "port", "pairs": "pair", "bus": "bus"}  # name: what the rate is a property of
Resource = tuple[Hashable, ...]


@dataclass(frozen=True)
class Network:
    """Capacities in bytes/s, infinite where nothing limits. `duplex`: both directions at full rate at once.

    `ring`: pairs are the links between neighbours, and a message occupies all links on its way, the shorter one.
    `node`: ranks per node, 0 for one node; messages between nodes leave and enter through a card of each rank
    (`far_bytes_per_s`) after `far_latency_s`, and nothing else limits them.
    """

    latency_s: float
    port_bytes_per_s: float = math.inf
    pair_bytes_per_s: float = math.inf
    bus_bytes_per_s: float = math.inf
    duplex: bool = True
    ring: bool = False
    node: int = 0
    far_bytes_per_s: float = math.inf
    far_latency_s: float = 0.0

    def far(self, source: int, to: int) -> bool:
        return bool(self.node) and source // self.node != to // self.node

    def latency(self, source: int, to: int) -> float:
        return self.far_latency_s if self.far(source, to) else self.latency_s

    def resources(self, source: int, to: int, world: int) -> dict[Resource, float]:
        """What a message from `source` to `to` of `world` ranks occupies, with each capacity."""
        found: dict[Resource, float] = {}
        if self.far(source, to):
            return {("card out", source): self.far_bytes_per_s, ("card in", to): self.far_bytes_per_s}
        if self.port_bytes_per_s < math.inf:
            found["port out" if self.duplex else "port", source] = self.port_bytes_per_s
            found["port in" if self.duplex else "port", to] = self.port_bytes_per_s
        if self.pair_bytes_per_s < math.inf:
            for first, second in self._links(source, to, world):
                ends = (first, second) if self.duplex else sorted((first, second))
                found[("pair", *ends)] = self.pair_bytes_per_s
        if self.bus_bytes_per_s < math.inf:
            found["bus",] = self.bus_bytes_per_s
        return found

    def most_bytes_per_s(self, world: int) -> float:
        """What one rank of `world` can send at most, over all its ways out."""
        pairs = self.pair_bytes_per_s * max(1, min(2, world - 1) if self.ring else world - 1)
        near = min(self.port_bytes_per_s, pairs)
        return near + self.far_bytes_per_s if self.node and world > self.node else near

    def _links(self, source: int, to: int, world: int) -> list[tuple[int, int]]:
        """The pairs that a message crosses."""
        if not self.ring:
            return [(source, to)]
        ahead = (to - source) % world
        step, hops = (1, ahead) if 2 * ahead <= world else (-1, world - ahead)
        return [((source + step * i) % world, (source + step * (i + 1)) % world) for i in range(hops)]


def of_machine(machine: Machine, *, topology: str = "ports", transport: str = "") -> Network:
    """The network of a machine's measured link. `transport` names it; '' takes the fastest.

    `topology` says what the measured bandwidth is a property of: each rank's 'ports', each of the 'pairs', or one
    'bus' that all share. A measurement between two ranks cannot tell these apart.
    """
    if topology not in TOPOLOGIES:
        raise UserError(f"topology '{topology}'", expected=f"one of {', '.join(TOPOLOGIES)}")
    link = machine.links.get(transport or fastest(machine))
    if link is None:
        raise UserError(
            f"machine {machine.name} has no link '{transport or 'of any kind'}'",
            expected=f"one of {', '.join(machine.links) or 'those that `undertow probe` measures'}",
            remedy="measure it with undertow probe",
        )
    limit: dict[str, Any] = {f"{TOPOLOGIES[topology]}_bytes_per_s": link.bytes_per_s}
    return Network(link.latency_s, duplex=link.duplex, **limit)


def fastest(machine: Machine) -> str:
    """The name of the link with the highest bandwidth; '' when the machine has none."""
    return max(machine.links, key=lambda name: machine.links[name].bytes_per_s, default="")


def fair_rates(flows: Mapping[int, Sequence[Resource]], capacity: Mapping[Resource, float]) -> dict[int, float]:
    """The max-min fair rate of each flow: raise all rates together, and fix those that meet a full resource."""
    left = dict(capacity)
    crossing: dict[Resource, set[int]] = {}
    for flow, used in flows.items():
        for resource in used:
            crossing.setdefault(resource, set()).add(flow)
    rates = {flow: math.inf for flow, used in flows.items() if not used}
    place = {resource: at for at, resource in enumerate(crossing)}  # of equally tight resources the first
    shares = [(left[resource] / len(mine), place[resource], resource) for resource, mine in crossing.items()]
    heapq.heapify(shares)
    while len(rates) < len(flows):
        rate, _, tightest = heapq.heappop(shares)
        if not crossing[tightest] or rate != left[tightest] / len(crossing[tightest]):
            continue  # its share is another by now, and stands further on
        changed = dict[Resource, None]()
        for flow in list(crossing[tightest]):
            rates[flow] = rate
            for resource in flows[flow]:
                crossing[resource].discard(flow)
                left[resource] -= rate
                changed[resource] = None
        for resource in changed:
            if crossing[resource]:
                heapq.heappush(shares, (left[resource] / len(crossing[resource]), place[resource], resource))
    return rates
