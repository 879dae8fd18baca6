"""Our files in the hands of stock torch, and what the two must agree about: names, shapes, every bit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import CHUNK_BYTES, Job, same

from undertow.checkpointing import Checkpointer
from undertow.checkpointing.folder import read_manifest
from undertow.checkpointing.layout import PAGE


class Zoo(nn.Module):
    """Buffers of every type that a state_dict may hold, large and small, contiguous and not."""

    TYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    TYPES += ["complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64"]

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name in self.TYPES:
            dtype = getattr(torch, name)
            high, count = 2 if name == "bool" else 256, 24 * dtype.itemsize
            raw = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
            self.register_buffer(f"a_{name}", raw.view(dtype).view(4, 6))
        self.register_buffer("scalar", torch.randn((), generator=generator))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("transposed", torch.randn(7, 5, generator=generator).t())
        self.register_buffer("expanded", torch.randn(3, 1, generator=generator).expand(3, 4))
        self.big = nn.Parameter(torch.randn(300, 301, generator=generator))
        self.channels_last = nn.Parameter(
            torch.randn(64, 64, 6, 6, generator=generator).to(memory_format=torch.channels_last)
        )


def bits(state: dict) -> dict:
    return {key: value.detach().clone() for key, value in state.items()}


def test_every_type_and_form_comes_back(tmp_path):
    zoo, other = Zoo(0), Zoo(1)
    with Checkpointer(tmp_path, zoo=zoo, chunk_bytes=CHUNK_BYTES) as ckpt:
        ckpt.save(0)
        assert ckpt.wait()[-1].ok, ckpt.reports
    other.expanded = other.expanded.contiguous()  # an expanded tensor cannot be written into
    with Checkpointer(tmp_path, zoo=other) as ckpt:
        ckpt.restore()
    assert same(bits(other.state_dict()), bits(zoo.state_dict()))
    assert other.channels_last.is_contiguous(memory_format=torch.channels_last)


def saved(tmp_path: Path) -> tuple[Job, Zoo, Path]:
    job, zoo = Job(), Zoo(0)
    job.advance(0)
    root = tmp_path / "ours"
    with Checkpointer(root, model=job.model, optimizer=job.optimizer, zoo=zoo, chunk_bytes=CHUNK_BYTES) as ckpt:
        ckpt.save(1)
        assert ckpt.wait()[-1].ok
        return job, zoo, ckpt.folder.final(1)


def test_stock_dcp_load_reads_them(tmp_path):
    job, zoo, path = saved(tmp_path)
    blank = {
        "model": {key: torch.zeros_like(value) for key, value in get_model_state_dict(job.model).items()},
        "zoo": {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in zoo.state_dict().items()},
        "optimizer": get_optimizer_state_dict(job.model, job.optimizer),
    }
    for values in blank["optimizer"]["state"].values():
        values.update({key: torch.zeros_like(value) for key, value in values.items()})
    blank["optimizer"]["param_groups"][0]["lr"] = -1.0
    dcp.load(blank, checkpoint_id=str(path))
    assert same(bits(blank["model"]), bits(job.model.state_dict()))
    assert same(bits(blank["zoo"]), bits(zoo.state_dict()))
    expected = get_optimizer_state_dict(job.model, job.optimizer)
    for name, values in expected["state"].items():
        assert same(blank["optimizer"]["state"][name], values)
    assert blank["optimizer"]["param_groups"][0]["lr"] == job.optimizer.param_groups[0]["lr"]


def test_stock_dcp_to_torch_save_reads_them(tmp_path):
    job, zoo, path = saved(tmp_path)
    dcp_to_torch_save(str(path), str(tmp_path / "plain.pt"))
    plain = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert same(bits(plain["model"]), bits(job.model.state_dict()))
    assert same(bits(plain["zoo"]), bits(zoo.state_dict()))
    for name, values in get_optimizer_state_dict(job.model, job.optimizer)["state"].items():
        assert same(plain["optimizer"]["state"][name], values)
    assert plain["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
    assert torch.equal(plain["rng"]["rank-00000"]["torch"], torch.get_rng_state())


def test_large_payloads_begin_on_pages(tmp_path):
    _, _, path = saved(tmp_path)
    manifest = read_manifest(path)
    shard = manifest.tensors["zoo.big"].shards[0]
    assert shard.payload % PAGE == 0
    mapped = torch.from_file(str(path / shard.file), size=(shard.payload + 300 * 301 * 4) // 4)
    assert torch.equal(mapped[shard.payload // 4 :].view(300, 301), Zoo(0).big)


@pytest.mark.parametrize("wrapper", ["compile", "ddp prefix"])
def test_wrappers_do_not_show_in_names(tmp_path, wrapper):
    job = Job()
    if wrapper == "compile":
        wrapped = torch.compile(job.model)
    else:
        wrapped = nn.Module()
        wrapped.module = job.model
    with Checkpointer(tmp_path, model=wrapped, optimizer=job.optimizer) as ckpt:
        ckpt.save(0)
        assert ckpt.wait()[-1].ok
        keys = set(read_manifest(ckpt.folder.final(0)).tensors)
    assert {key for key in keys if key.startswith("model.")} == {f"model.{key}" for key in job.model.state_dict()}
    other = Job(seed=3)
    with Checkpointer(tmp_path, model=other.model, optimizer=other.optimizer) as ckpt:
        ckpt.restore()
    assert same(other.state(), job.state())


class Tied(nn.Module):
    def __init__(self, seed: int, *, tie: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.head = nn.Embedding(400, 300), nn.Linear(300, 400, bias=False)
        if tie:
            self.head.weight = self.embedding.weight


def test_tied_weights_are_stored_once_and_every_name_reads_them(tmp_path):
    """Also by stock DCP, and into a model that does not tie them; names that part later are stored apart again."""
    tied, apart = Tied(0, tie=True), Tied(1, tie=False)
    weight = tied.embedding.weight.detach().clone()
    with Checkpointer(tmp_path, model=tied, rng=False) as ckpt:
        ckpt.save(0)
        assert ckpt.wait()[-1].ok, ckpt.reports
        path = ckpt.folder.final(0)
        manifest = read_manifest(path)
        one, two = (manifest.tensors[f"model.{name}.weight"].shards[0] for name in ("embedding", "head"))
        assert one == two
        assert (path / one.file).stat().st_size < 1.1 * weight.nbytes
        tied.head.weight = nn.Parameter(weight + 1)
        ckpt.save(1)
        assert ckpt.wait()[-1].ok, ckpt.reports
    found = {f"model.{name}.weight": torch.empty_like(weight) for name in ("head", "embedding")}
    dcp.load(found, checkpoint_id=path)
    assert all(torch.equal(value, weight) for value in found.values())
    dcp_to_torch_save(path, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)["model"]
    assert torch.equal(whole["head.weight"], weight) and torch.equal(whole["embedding.weight"], weight)
    with Checkpointer(tmp_path, model=apart, rng=False) as ckpt:
        assert ckpt.restore() == 1
        assert torch.equal(apart.head.weight, weight + 1) and torch.equal(apart.embedding.weight, weight)
        assert ckpt.restore(step=0) == 0
        assert torch.equal(apart.head.weight, weight) and torch.equal(apart.embedding.weight, weight)


def _save_tied(rank: int, world: int, root: str, tied_ranks: int) -> int:
    """Distinct places of the two weights in a save by all ranks, of which the first `tied_ranks` tie them."""
    model = Tied(0, tie=rank < tied_ranks)
    if rank >= tied_ranks:
        model.head.load_state_dict({"weight": model.embedding.weight.detach()})
    expected = model.embedding.weight.detach().clone()
    with Checkpointer(root, model=model, rng=False, timeout_s=240) as ckpt:
        ckpt.save(0)
        assert ckpt.wait()[-1].ok, ckpt.reports
        with torch.no_grad():
            model.embedding.weight.zero_()
            model.head.weight.zero_()
        ckpt.restore()
        assert torch.equal(model.head.weight, expected) and torch.equal(model.embedding.weight, expected)
        return len({record.shards for record in read_manifest(ckpt.folder.final(0)).tensors.values()})


@pytest.mark.parametrize(("tied_ranks", "places"), [(2, 1), (1, 2)])
def test_ranks_store_once_only_what_all_of_them_tie(ranks, tmp_path, tied_ranks, places):
    assert ranks(2, _save_tied, str(tmp_path), tied_ranks) == [places] * 2
