"""Links as resources: which of them a message occupies, and how messages that share one divide it.

A message is a flow; its rate is the max-min fair share over all resources that it crosses (Bertsekas & Gallager, *Data
Networks*, section 6.5): the usual flow-level model, without packets. Ports, pairs and a shared bus cover a switch
(NVSwitch: only the port limits), a full mesh (xGMI: only the pair limits) and a PCIe root (all share one). Latency is
paid once per message and occupies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from ..dist.errors import UserError
from ..dist.machine import Machine

TOPOLOGIES = {"ports": "port", "pairs": "pair", "bus": "bus"}  # name: what the rate is a property of
Resource = tuple[Hashable, ...]


@dataclass(frozen=True)
class Network:
    """Capacities in bytes/s, infinite where nothing limits. `duplex`: both directions at full rate at once."""

    latency_s: float
    port_bytes_per_s: float = math.inf
    pair_bytes_per_s: float = math.inf
    bus_bytes_per_s: float = math.inf
    duplex: bool = True

    def resources(self, source: int, to: int) -> dict[Resource, float]:
        """What a message from `source` to `to` occupies, with each capacity."""
        found: dict[Resource, float] = {}
        if self.port_bytes_per_s < math.inf:
            found["port out" if self.duplex else "port", source] = self.port_bytes_per_s
            found["port in" if self.duplex else "port", to] = self.port_bytes_per_s
        if self.pair_bytes_per_s < math.inf:
            first, second = (source, to) if self.duplex else sorted((source, to))
            found["pair", first, second] = self.pair_bytes_per_s
        if self.bus_bytes_per_s < math.inf:
            found["bus",] = self.bus_bytes_per_s
        return found


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
    return Network(link.latency_s, duplex=link.duplex, **{f"{TOPOLOGIES[topology]}_bytes_per_s": link.bytes_per_s})


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
    while len(rates) < len(flows):
        tightest = min((r for r in crossing if crossing[r]), key=lambda r: left[r] / len(crossing[r]))
        rate = left[tightest] / len(crossing[tightest])
        for flow in list(crossing[tightest]):
            rates[flow] = rate
            for resource in flows[flow]:
                crossing[resource].discard(flow)
                left[resource] -= rate
    return rates
