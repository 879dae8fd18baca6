"""Networks by name: how the accelerators of a machine are wired, with round figures from what their makers state.

A preset says what limits what (each port, each pair, the links of a ring, one bus, the cards between nodes); its rates
are nominal, per direction, and a measured link replaces them (`network.of_machine`). Modelled times with them compare
schedules, not machines.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..dist.errors import UserError
from .network import Network

GB = 1e9


@dataclass(frozen=True)
class Preset:
    """`about` says where the figures come from."""

    network: Network
    about: str


PRESETS = {
    "nvswitch": Preset(
        Network(5e-6, port_bytes_per_s=450 * GB),
        "every rank behind a switch: 18 NVLink 4 links of 25 GB/s each way (H100 SXM)",
    ),
    "xgmi_mesh": Preset(
        Network(5e-6, pair_bytes_per_s=64 * GB),
        "a link for every pair: 64 GB/s each way (MI300X, 8 in a node)",
    ),
    "hccs_mesh": Preset(
        Network(5e-6, pair_bytes_per_s=28 * GB),
        "a link for every pair: 28 GB/s each way (Ascend 910B, 8 in a node)",
    ),
    "ring": Preset(
        Network(5e-6, pair_bytes_per_s=100 * GB, ring=True),
        "links to two neighbours only, 100 GB/s each way; others are reached through them, the shorter way",
    ),
    "pcie_root": Preset(
        Network(10e-6, port_bytes_per_s=25 * GB, bus_bytes_per_s=50 * GB),
        "PCIe 4.0 ×16 to each, 25 GB/s, and all through one root complex of 50 GB/s",
    ),
    "two_level": Preset(
        Network(5e-6, port_bytes_per_s=450 * GB, node=8, far_bytes_per_s=50 * GB, far_latency_s=15e-6),
        "nodes of 8 behind NVSwitch, and a 400 Gbit/s card for each rank between nodes",
    ),
}


def preset(name: str) -> Network:
    """The network called `name`; `UserError` for a name that does not exist."""
    if name not in PRESETS:
        raise UserError(f"no topology is called '{name}'", expected=f"one of {', '.join(PRESETS)}")
    return PRESETS[name].network
