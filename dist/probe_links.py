"""Latency and rate between ranks by gloo and NCCL: in the job this process belongs to, or among ranks started for it.

Three links per transport where the job has them: rank 0 with a rank of its own host ('gloo'), with a rank of another
host ('gloo_network'), and all ranks at once, each sending to the next ('gloo_ring'), which is what a ring collective
gets when everybody talks. Ranks are started as fresh processes, not forked: CUDA may be in use already.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from .launch import Launch, detect, init_process_group, local_device
from .machine import Link
from .pingpong import both_ways, is_duplex, play, sizes, trips
from .topology import gather


class TorchWire:
    """A rank's side of torch.distributed's point-to-point calls with `peer`."""

    def __init__(self, peer: int, device: torch.device) -> None:
        self._peer, self._device = peer, device

    def message(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device=self._device)

    def send(self, message: torch.Tensor) -> None:
        dist.send(message, self._peer)
        self._finish()

    def receive(self, message: torch.Tensor) -> None:
        dist.recv(message, self._peer)
        self._finish()

    def both(self, outgoing: torch.Tensor, incoming: torch.Tensor) -> None:
        self.shift(outgoing, incoming, self._peer, self._peer)

    def shift(self, outgoing: torch.Tensor, incoming: torch.Tensor, to: int, source: int) -> None:
        operations = [dist.P2POp(dist.isend, outgoing, to), dist.P2POp(dist.irecv, incoming, source)]
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        self._finish()

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the host's clock is what latency is measured with


def measure(launch: Launch, device: torch.device, *, quick: bool) -> Iterator[tuple[str, Link]]:
    """Measure in the present job: all ranks iterate; rank 0 gets the links, the others nothing (an empty iterator)."""
    topology = gather(device)
    neighbours = [rank for rank in topology.colocated(0) if rank != 0][:1]
    strangers = [ranks[0] for ranks in topology.hosts()[1:]][:1]
    transports = [("gloo", torch.device("cpu"))]
    if device.type == "cuda" and all(topology.transport(0, rank) != "device" for rank in range(1, launch.world_size)):
        transports.append(("nccl", device))
    for name, kind in transports:
        dist.all_reduce(torch.zeros(1, device=kind))  # NCCL wants all ranks in the first call of a group
        for suffix, peers in (("", neighbours or strangers), ("_network", strangers if neighbours else [])):
            for peer in peers:
                link = _pair(launch.rank, peer, kind, quick)
                dist.barrier()
                if link is not None:
                    yield name + suffix, link
        if launch.world_size > 2:
            link = _ring(launch, kind, quick)
            if launch.rank == 0:
                yield f"{name}_ring", link


def _pair(rank: int, peer: int, device: torch.device, quick: bool) -> Link | None:
    if rank not in (0, peer):
        return None
    wire, fast = TorchWire(peer if rank == 0 else 0, device), device.type == "cuda"
    samples = list(play(wire, rank == 0, quick, fast))
    _, both_s = both_ways(wire, quick, fast)
    return Link.fit(samples, duplex=is_duplex(samples[-1][1], both_s)) if rank == 0 else None


def _ring(launch: Launch, device: torch.device, quick: bool) -> Link:
    """The slowest rank's median when all ranks shift at once; rank r sends to r + 1."""
    to, source = (launch.rank + 1) % launch.world_size, (launch.rank - 1) % launch.world_size
    wire, samples = TorchWire(to, device), []
    for nbytes in sizes(quick, fast=device.type == "cuda"):
        outgoing, incoming = wire.message(nbytes), wire.message(nbytes)
        times = []
        for _ in range(trips(nbytes, quick) + 2):
            start_s = time.perf_counter()
            wire.shift(outgoing, incoming, to, source)
            times.append(time.perf_counter() - start_s)
        slowest = torch.tensor(statistics.median(times[2:]), dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        samples.append((nbytes, slowest.item()))
    return Link.fit(samples)


def to_json(name: str, link: Link) -> str:
    """One line: what a worker prints and `probe_spawn` reads."""
    return json.dumps({"link": name, "duplex": link.duplex, "samples": link.samples})


def worker(quick: bool) -> None:
    """A rank that `probe_spawn` started: join, measure, and as rank 0 print each link as a line of JSON."""
    launch = detect()
    device = local_device(launch)
    init_process_group(launch, device=device, timeout_s=60)
    for name, link in measure(launch, device, quick=quick):
        sys.stdout.write(to_json(name, link) + "\n")
        sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    worker(sys.argv[1:] == ["--quick"])
