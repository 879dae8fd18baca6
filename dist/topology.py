"""Which ranks share a host or a GPU, and what lies between two ranks.

Each rank describes its `Place`, all ranks gather the places once (`gather`), and everything asked afterwards is pure
arithmetic on the frozen `Topology`, so that planners can be tested with machines that nobody has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from .host import host_identity, read_host


@dataclass(frozen=True)
class Place:
    """Where one rank runs. `gpu` is the UUID of its GPU ('' on CPU); `gpu_links` what nvidia-smi says to its peers."""

    host: str
    gpu: str = ""
    gpu_links: tuple[tuple[str, str], ...] = ()  # (the other GPU's UUID, 'NV18' | 'PIX' | 'SYS' | …)
    slowest_nic_bits_per_s: int | None = None


@dataclass(frozen=True)
class Topology:
    """The places of all ranks, by rank."""

    places: tuple[Place, ...]

    def hosts(self) -> list[list[int]]:
        """The ranks of each host; hosts in the order of their first rank."""
        by_host: dict[str, list[int]] = {}
        for rank, place in enumerate(self.places):
            by_host.setdefault(place.host, []).append(rank)
        return list(by_host.values())

    def colocated(self, rank: int) -> list[int]:
        """All ranks on the host of `rank`, itself among them."""
        return [other for other, place in enumerate(self.places) if place.host == self.places[rank].host]

    def transport(self, a: int, b: int) -> str:
        """What lies between two ranks: 'self', 'device' (one GPU), 'nvlink', 'pcie', 'host' (shared memory), 'network'.

        'pcie' is a path by bridges that stays below the processor (PIX, PXB); PHB, NODE and SYS cross it: 'host'.
        """
        here, there = self.places[a], self.places[b]
        if a == b:
            return "self"
        if here.host != there.host:
            return "network"
        if here.gpu and here.gpu == there.gpu:
            return "device"
        word = dict(here.gpu_links).get(there.gpu, "")
        if word.startswith("NV"):
            return "nvlink"
        return "pcie" if word in ("PIX", "PXB") else "host"

    def slowest(self, ranks: list[int]) -> str:
        """The slowest transport between any two of `ranks`: what a collective over them is bound by."""
        order = ("self", "device", "nvlink", "pcie", "host", "network")
        return max((self.transport(a, b) for a in ranks for b in ranks), key=order.index, default="self")

    def explain(self) -> str:
        """One line per host: its ranks, and the slowest transport among them."""
        return "\n".join(
            f"host {index}: ranks {', '.join(map(str, ranks))}; between them {self.slowest(ranks)}"
            for index, ranks in enumerate(self.hosts())
        )


def local_place(device: torch.device) -> Place:
    """This process's place, when it computes on `device`."""
    host = read_host()
    speeds = [nic.bits_per_s for nic in host.nics if nic.up and nic.bits_per_s]
    place = Place(host_identity(), slowest_nic_bits_per_s=min(speeds, default=None))
    if device.type != "cuda":
        return place
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    uuid = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
    index = {gpu.uuid: gpu.index for gpu in host.gpus}
    by_index = {gpu.index: gpu.uuid for gpu in host.gpus}
    mine = index.get(uuid)
    links = [(by_index[b if a == mine else a], word) for a, b, word in host.gpu_links if mine in (a, b)]
    return Place(place.host, uuid, tuple(links), place.slowest_nic_bits_per_s)


def gather(device: torch.device, group: dist.ProcessGroup | None = None) -> Topology:
    """The topology of `group`'s ranks; collective."""
    places: list[Place] = [Place("")] * dist.get_world_size(group)
    dist.all_gather_object(places, local_place(device), group=group)
    return Topology(tuple(places))
