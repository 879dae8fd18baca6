"""Export to safetensors: the library reads back equal bits, sharded or not, in bounded memory."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import CHUNK_BYTES

from undertow.checkpointing import Checkpointer, safetensors_export
from undertow.checkpointing.catalogue import locate
from undertow.checkpointing.cli import main
from undertow.checkpointing.safetensors_export import INDEX, plan_export

safetensors_torch = pytest.importorskip("safetensors.torch")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(300, 64)
        self.inner = nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scale", torch.tensor(0.5, dtype=torch.bfloat16))
        self.register_buffer("none", torch.empty(0, 4))
        self.register_buffer("tiny", torch.randn(2, 3).to(torch.float8_e4m3fn))


@pytest.fixture
def saved(tmp_path):
    net = Net()
    other = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    with Checkpointer(tmp_path / "c", net=net, other=other, optimizer=optimizer, chunk_bytes=CHUNK_BYTES) as ckpt:
        ckpt.save(5)
        assert ckpt.wait()[-1].ok
    return net, tmp_path / "c"


def load(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(out.glob("*.safetensors")):
        found |= safetensors_torch.load_file(path)
    return found


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    one, two = (value.reshape(-1).view(torch.uint8) for value in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(one, two)


def test_one_file(saved, tmp_path):
    net, root = saved
    assert main(["export", str(root), "--module", "net", "--out", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.safetensors"]
    found = load(tmp_path / "out")
    assert found.keys() == net.state_dict().keys()
    assert all(equal(found[key], value) for key, value in net.state_dict().items())


def test_shards_and_their_index(saved, tmp_path):
    net, root = saved
    out = tmp_path / "out"
    assert main(["export", str(root), "--module", "net", "--out", str(out), "--max-shard-size", "30KiB"]) == 0
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"].keys() == net.state_dict().keys()
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in net.state_dict().values())
    for name, file in index["weight_map"].items():
        with safetensors_torch.safe_open(str(out / file), framework="pt") as opened:
            assert equal(opened.get_tensor(name), net.state_dict()[name])


def test_conversion_rounds_as_torch_does_and_leaves_integers(saved, tmp_path):
    net, root = saved
    out = tmp_path / "out"
    assert main(["export", str(root), "--module", "net", "--out", str(out), "--dtype", "bfloat16"]) == 0
    for key, value in load(out).items():
        source = net.state_dict()[key]
        assert equal(value, source.to(torch.bfloat16) if source.is_floating_point() else source), key


def test_several_modules_need_a_name(saved, tmp_path, capsys):
    from undertow.dist.errors import UserError

    with pytest.raises(UserError, match="no module 'model'.*net, other"):
        main(["export", str(saved[1]), "--out", str(tmp_path / "out")])
    assert main(["export", str(saved[1]), "--module", "other", "--out", str(tmp_path / "out")]) == 0
    assert load(tmp_path / "out").keys() == {"weight", "bias"}


def test_a_damaged_checkpoint_is_not_exported(saved, tmp_path):
    from undertow.dist.errors import UserError

    path = saved[1] / "step-000000005" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="the checkpoint is damaged"):
        main(["export", str(saved[1]), "--module", "net", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def sharded(rank: int, world: int, root: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))

    class Sharded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            for dim, name in enumerate("abc"):
                value = torch.randn(5, 70, 9)
                setattr(self, name, nn.Parameter(distribute_tensor(value, mesh, [Shard(dim)])))

    with Checkpointer(root, model=Sharded(), chunk_bytes=CHUNK_BYTES) as ckpt:
        ckpt.save(1)
        assert ckpt.wait()[-1].ok


@pytest.mark.parametrize("budget", [1, 5000, 10**9])
def test_shards_on_any_dim_are_put_together(ranks, tmp_path, monkeypatch, budget):
    ranks(3, sharded, str(tmp_path / "c"))
    real = safetensors_export.pieces
    monkeypatch.setattr(safetensors_export, "pieces", lambda *a: real(*a, budget_bytes=budget))
    assert main(["export", str(tmp_path / "c"), "--out", str(tmp_path / "out")]) == 0
    torch.manual_seed(0)
    for name in "abc":
        assert equal(load(tmp_path / "out")[name], torch.randn(5, 70, 9))


def anonymous_mebibytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) // 1024


def test_memory_stays_the_budget_not_the_tensor(tmp_path, monkeypatch):
    """A tensor of 192 MiB in pieces of 32 MiB: what a process holds at once is far below the tensor."""
    net = nn.Module()
    net.w = nn.Parameter(torch.zeros(48, 2**20))
    with Checkpointer(tmp_path / "c", net=net, rng=False) as ckpt:
        ckpt.save(1)
        assert ckpt.wait()[-1].ok
    real, seen = safetensors_export.pieces, []

    def watched(*arguments):
        for piece in real(*arguments):
            seen.append(anonymous_mebibytes())
            yield piece

    monkeypatch.setattr(safetensors_export, "pieces", watched)
    pid = os.fork()  # a process of its own, or memory that other tests have freed would be used again unseen
    if not pid:
        before = anonymous_mebibytes()
        code = main(["export", str(tmp_path / "c"), "--out", str(tmp_path / "out"), "--no-verify"])
        os._exit(0 if code == 0 and len(seen) == 6 and max(seen) - before < 150 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_the_plan_is_pure_and_ordered(saved):
    _, manifest = locate(saved[1])
    files = plan_export(manifest, "net", max_shard_bytes=1)
    assert all(sum(manifest.tensors[key].shape != (0, 4) for key, _, _ in file.tensors) == 1 for file in files)
    order = [name for file in files for _, name, _ in file.tensors]
    assert order == sorted(order)
    assert len(order) == len(set(order)) == len(Net().state_dict())
