"""Hosts and topology: parsers on recorded text, transports on machines that nobody has."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from undertow.dist import host as host_module
from undertow.dist.host import parse_gpus, parse_topology, read_host, read_nics
from undertow.dist.topology import Place, Topology, gather

GPUS = """0, NVIDIA H100 80GB HBM3, GPU-aaaa, 81559, 00000000:1B:00.0, 5, 16
1, NVIDIA H100 80GB HBM3, GPU-bbbb, 81559, 00000000:43:00.0, [N/A], [N/A]
No devices were found
"""
TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-47\t0\t\tN/A
GPU1\tNV18\t X \tPXB\tNODE\t0-47\t0\t\tN/A
GPU2\tSYS\tPXB\t X \tSYS\t48-95\t1\t\tN/A
NIC0\tPIX\tNODE\tSYS\t X \t\t\t\t

Legend:

  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks
"""


def test_gpus_are_read():
    gpus = parse_gpus(GPUS)
    assert [(g.index, g.uuid, g.pcie) for g in gpus] == [(0, "GPU-aaaa", "gen5 x16"), (1, "GPU-bbbb", "")]
    assert gpus[0].memory_bytes == 81559 << 20
    assert parse_gpus("") == ()


def test_the_topology_matrix_is_read():
    assert parse_topology(TOPOLOGY) == ((0, 1, "NV18"), (0, 2, "SYS"), (1, 2, "PXB"))
    assert parse_topology("\tGPU0\tCPU Affinity\nGPU0\t X \t0-15\n") == ()
    assert parse_topology("") == parse_topology("NVIDIA-SMI has failed") == ()


def test_nics_are_read_from_sys(tmp_path):
    for name, speed, state in (("eth0", "100000", "up"), ("eth1", "-1", "down"), ("lo", "", "unknown")):
        folder = tmp_path / "net" / name
        folder.mkdir(parents=True)
        (folder / "speed").write_text(speed + "\n")
        (folder / "operstate").write_text(state + "\n")
        if name != "lo":
            (folder / "device").mkdir()
    port = tmp_path / "infiniband" / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    (port / "state").write_text("4: ACTIVE\n")
    nics = read_nics(tmp_path)
    assert [(n.name, n.kind, n.bits_per_s, n.up) for n in nics] == [
        ("eth0", "ethernet", 10**11, True),
        ("eth1", "ethernet", None, False),
        ("mlx5_0:1", "infiniband", 4 * 10**11, True),
    ]
    assert read_nics(tmp_path / "nothing") == ()


def test_this_host_is_described(monkeypatch):
    here = read_host()
    assert here.cores == len(os.sched_getaffinity(0)) and here.memory_bytes > 0 and here.cpu
    monkeypatch.setattr(host_module, "_text", lambda path: "")
    monkeypatch.setattr(host_module.shutil, "which", lambda name: None)
    bare = read_host()
    assert bare.gpus == () and bare.cpu


def test_a_broken_nvidia_smi_is_no_gpu(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not communicate'\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert read_host().gpus == () and read_host().gpu_links == ()


def machine() -> Topology:
    """Two hosts: three GPUs and one CPU rank on the first (two ranks share a GPU), one GPU on the second."""
    links = {"a": (("b", "NV18"), ("c", "SYS")), "b": (("a", "NV18"), ("c", "PXB")), "c": (("a", "SYS"), ("b", "PXB"))}
    first = [Place("h0", gpu, links[gpu]) for gpu in ("a", "b", "c", "a")]
    return Topology((*first, Place("h0"), Place("h1", "d")))


def test_transports():
    topology = machine()
    assert [topology.transport(0, other) for other in range(6)] == [
        "self",
        "nvlink",
        "host",
        "device",
        "host",
        "network",
    ]
    assert topology.transport(1, 2) == "pcie"
    for a in range(6):
        for b in range(6):
            assert topology.transport(a, b) == topology.transport(b, a)
    assert topology.hosts() == [[0, 1, 2, 3, 4], [5]]
    assert topology.colocated(2) == [0, 1, 2, 3, 4] and topology.colocated(5) == [5]
    assert topology.slowest([0, 1, 3]) == "nvlink" and topology.slowest([0, 5]) == "network"
    assert topology.slowest([3]) == "self"
    assert "host 1: ranks 5" in topology.explain()


def test_cpu_ranks_without_gpus_do_not_share_a_device():
    assert Topology((Place("h"), Place("h"))).transport(0, 1) == "host"


def gathered(rank: int, world: int) -> tuple[list[list[int]], bool]:
    topology = gather(torch.device("cpu"))
    same = [None] * world
    dist.all_gather_object(same, topology)
    return topology.hosts(), all(other == topology for other in same)


def test_ranks_of_one_host_gather_one_topology(ranks):
    assert ranks(3, gathered) == [([[0, 1, 2]], True)] * 3
