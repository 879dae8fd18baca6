"""What of dist/ only a GPU can show: run with `pytest tests/dist/test_gpu.py` on a machine that has one."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from undertow.dist import memory, probe
from undertow.dist.host import read_host
from undertow.dist.launch import Launch, init_process_group, local_device
from undertow.dist.machine import Machine
from undertow.dist.mesh import MeshShape
from undertow.dist.topology import local_place

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
MIB = 1 << 20
ALONE = Launch("plain", 0, 1, 0, 1)


@pytest.fixture
def joined(monkeypatch):
    """A process group of one, that knows gloo and NCCL."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
    init_process_group(ALONE, device=torch.device("cuda"), timeout_s=60)
    yield
    dist.destroy_process_group()


def test_one_group_carries_host_and_device_tensors(joined):
    assert torch.cuda.current_device() == 0
    for device in ("cpu", "cuda"):
        value = torch.full((3,), 2.0, device=device)
        dist.all_reduce(value)
        assert value.tolist() == [2.0] * 3
    mesh = MeshShape.of(data=1, tensor=1).fit(1).build(ALONE, "cuda")
    value = torch.ones(1, device="cuda")
    dist.all_reduce(value, group=mesh.group("tensor"))
    assert value.item() == 1.0
    assert mesh.device_mesh().mesh_dim_names == ("data", "tensor")


def test_device_memory_and_its_peak():
    device = local_device(ALONE)
    before, free = memory.read(device), memory.free_bytes(device)
    block = torch.empty(64 * MIB, dtype=torch.uint8, device=device)
    during = memory.read(device)
    assert during.device_allocated - before.device_allocated == 64 * MIB
    assert free - memory.free_bytes(device) >= 60 * MIB  # other processes may free some meanwhile
    del block
    assert memory.read(device).device_peak_allocated >= during.device_allocated
    memory.reset_peak(device)
    after = memory.read(device)
    assert after.device_peak_allocated == after.device_allocated
    pinned = torch.empty(32 * MIB, dtype=torch.uint8, pin_memory=True)
    assert memory.read(device).pinned >= pinned.nbytes


def test_the_place_is_one_of_the_hosts_gpus():
    place = local_place(local_device(ALONE))
    assert place.gpu in {gpu.uuid for gpu in read_host().gpus}


def test_the_probe_measures_the_device(tmp_path, capsys):
    output = tmp_path / "m.json"
    assert probe.main(["--quick", "--only", "copies,compute", "--output", str(output)]) == 0
    machine = Machine.load(output)
    routes = {"host", "host_one_thread", "d2h_pinned", "d2h_pageable", "h2d_pinned", "h2d_pageable", "d2d", "pin"}
    assert set(machine.copies) == routes, capsys.readouterr().out
    assert {"gemm/bfloat16", "attention_backward/bfloat16"} <= set(machine.flops)
    assert machine.flops["gemm/bfloat16"] > machine.flops["gemm/float32"] > 1e11
    assert machine.copies["d2d"] > machine.copies["d2h_pinned"] > 1e8
