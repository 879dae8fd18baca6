"""The lasting format: fixtures of every released version are read, by us, by stock torch, and by a reader of a page.

The small reader here follows docs/checkpoint-format.md and uses nothing of the package. If it must change for an old
fixture, a promise has been broken.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash

sys.path.insert(0, str(Path(__file__).parent / "fixtures"))

from made import STEP, Counter, Net, Position, fill_optimizer, values

from undertow.checkpointing import Checkpointer
from undertow.checkpointing.cli import main
from undertow.checkpointing.manifest import FORMAT

HERE = Path(__file__).parent
FORMATS = sorted(path.name for path in (HERE / "fixtures").glob("format-*"))


def test_every_format_has_its_fixture():
    assert [f"format-{number}" for number in range(1, FORMAT + 1)] == FORMATS
    for name in FORMATS:
        assert sum(path.stat().st_size for path in (HERE / "fixtures" / name).rglob("*") if path.is_file()) < 65536


def expected_tensors() -> dict[str, torch.Tensor]:
    net = Net()
    found = {f"model.{key}": value for key, value in net.state_dict().items()}
    found["optimizer.state.weight.momentum_buffer"] = values((40, 13), 10)
    found["optimizer.state.bias.momentum_buffer"] = values((13,), 11, torch.bfloat16)
    return found | {"counter.ema.average": values((6,), 4)}


def read_by_the_page(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """docs/checkpoint-format.md, section 'Reading', line by line."""
    commit = json.loads((folder / "COMMIT.json").read_bytes())
    data = (folder / "manifest.json").read_bytes()
    assert commit["format"] == 1
    assert xxhash.xxh3_128(data).hexdigest() == commit["manifest"]
    manifest = json.loads(data)
    keys = "format step world_size chunk_bytes files tensors objects paths facts"
    assert set(manifest) >= set(keys.split())
    content = {}
    for name, record in manifest["files"].items():
        content[name] = (folder / name).read_bytes()
        size = manifest["chunk_bytes"]
        chunks = [content[name][begin : begin + size] for begin in range(0, record["nbytes"], size)]
        assert len(content[name]) == record["nbytes"]
        assert [xxhash.xxh3_128(chunk).hexdigest() for chunk in chunks] == record["chunks"]
    tensors = {}
    for key, record in manifest["tensors"].items():
        dtype = getattr(torch, record["dtype"])
        whole = torch.zeros(record["shape"], dtype=dtype)
        for shard in record["shards"]:
            count = int(np.prod(shard["sizes"]))
            if count:
                data = bytearray(content[shard["file"]])
                part = torch.frombuffer(data, dtype=dtype, count=count, offset=shard["payload"])
                box = tuple(slice(o, o + s) for o, s in zip(shard["offsets"], shard["sizes"]))
                whole[box] = part.view(shard["sizes"])
            archive = content[shard["file"]][shard["start"] : shard["start"] + shard["length"]]
            assert list(torch.load(io.BytesIO(archive), weights_only=True).shape) == shard["sizes"]
        tensors[key] = whole
    objects = {}
    for key, place in manifest["objects"].items():
        raw = content[place["file"]][place["start"] : place["start"] + place["length"]]
        objects[key] = torch.load(io.BytesIO(raw), weights_only=True)
    assert set(manifest["paths"]) == {*tensors, *objects}
    assert all(".".join(map(str, path)) == key for key, path in manifest["paths"].items())
    return tensors, objects


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    one, two = (value.detach().contiguous().reshape(-1).view(torch.uint8) for value in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(one, two)


@pytest.mark.parametrize("name", FORMATS)
def test_a_reader_of_the_page_finds_everything(name):
    tensors, objects = read_by_the_page(HERE / "fixtures" / name / f"step-{STEP:09d}")
    expected = expected_tensors()
    assert tensors.keys() == expected.keys()
    assert all(equal(tensors[key], expected[key]) for key in expected)
    assert objects["counter.best"] == 0.25
    assert objects["loader.rank-00001"] == {"position": 101, "epoch": 2, "order": [3, 1, 2]}
    assert objects["optimizer.param_groups.0.lr"] == 0.125
    assert objects["optimizer.param_groups.0.params"] == ["weight", "bias"]


@pytest.mark.parametrize("name", FORMATS)
def test_we_restore_it(tmp_path, name):
    shutil.copytree(HERE / "fixtures" / name, tmp_path / "c")
    net = Net()
    with torch.no_grad():
        for value in net.state_dict().values():
            value.zero_()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.0)
    counter, loader = Counter(9.0, torch.zeros(6)), Position(-1)
    given = {"model": net, "optimizer": optimizer, "counter": counter}
    with Checkpointer(tmp_path / "c", per_rank={"loader": loader}, rng=False, **given) as ckpt:
        assert ckpt.restore() == STEP
    expected = Net()
    wanted = torch.optim.SGD(expected.parameters(), lr=0.125, momentum=0.5)
    fill_optimizer(expected, wanted)
    assert all(equal(value, expected.state_dict()[key]) for key, value in net.state_dict().items())
    for mine, theirs in zip(net.parameters(), expected.parameters()):
        assert equal(optimizer.state[mine]["momentum_buffer"], wanted.state[theirs]["momentum_buffer"])
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert (counter.best, loader.position) == (0.25, 100)
    assert equal(counter.average, values((6,), 4))


@pytest.mark.parametrize("name", FORMATS)
def test_stock_torch_reads_it(name):
    blank = {"model": {key: torch.zeros_like(value) for key, value in Net().state_dict().items()}}
    dcp.load(blank, checkpoint_id=str(HERE / "fixtures" / name / f"step-{STEP:09d}"))
    assert all(equal(blank["model"][key], value) for key, value in Net().state_dict().items())


@pytest.mark.parametrize("name", FORMATS)
def test_the_command_line_finds_it_whole(name, capsys):
    assert main(["verify", str(HERE / "fixtures" / name)]) == 0
    assert main(["inspect", str(HERE / "fixtures" / name), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["world_size"] == 2


def test_what_is_written_now_follows_the_page(tmp_path):
    net = Net()
    with Checkpointer(tmp_path, model=net, counter=Counter(0.5, values((6,), 4)), chunk_bytes=4096) as ckpt:
        ckpt.save(1)
        assert ckpt.wait()[-1].ok
    tensors, objects = read_by_the_page(tmp_path / "step-000000001")
    assert all(equal(tensors[f"model.{key}"], value) for key, value in net.state_dict().items())
    assert objects["counter.best"] == 0.5
    assert (tmp_path / "LATEST").read_text() == "step-000000001\n"
