"""Checkpoints that somebody forged, checksums and all: no code runs, no file outside is read or written, nothing hangs.

Checksums do not stop an attacker who can write the folder, so every forgery here carries fitting ones.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import Job, same

from undertow.checkpointing.cli import main
from undertow.checkpointing.manifest import COMMIT, MANIFEST, checksum
from undertow.dist.errors import UndertowError, UserError


class RunsCode:
    """Unpickling it touches a file."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.flag}",)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("attacks") / "c"
    job, states = Job(layers=1), {}
    with job.checkpointer(root, keep=None) as ckpt:
        for step in (1, 2):
            job.advance(step)
            states[step] = job.state()
            ckpt.save(step)
        assert all(report.ok for report in ckpt.wait())
    return root, states


@pytest.fixture
def root(pristine, tmp_path):
    shutil.copytree(pristine[0], tmp_path / "c")
    return tmp_path / "c"


def forge(folder: Path, change: Callable[[dict], None] = lambda raw: None, **files: bytes) -> None:
    """Replace `files` (by name without dots), let `change` edit the manifest, and make every checksum fit again."""
    raw = json.loads((folder / MANIFEST).read_bytes())
    for name, data in files.items():
        (folder / name).write_bytes(data)
        size = raw["chunk_bytes"]
        chunks = [checksum(data[begin : begin + size]) for begin in range(0, len(data), size)]
        raw["files"][name] = {"nbytes": len(data), "chunks": chunks}
    change(raw)
    data = json.dumps(raw).encode()
    (folder / MANIFEST).write_bytes(data)
    commit = json.loads((folder / COMMIT).read_bytes())
    (folder / COMMIT).write_text(json.dumps(commit | {"manifest": checksum(data)}))


def test_the_forger_knows_his_trade(root, pristine):
    forge(root / "step-000000002")
    job = Job(seed=9, layers=1)
    with job.checkpointer(root) as ckpt:
        assert ckpt.restore() == 2
    assert same(job.state(), pristine[1][2])


def test_hostile_metadata_is_never_unpickled(root, pristine, tmp_path):
    flag = tmp_path / "pwned"
    forge(root / "step-000000002", **{".metadata": pickle.dumps(RunsCode(flag))})
    job = Job(seed=9, layers=1)
    with job.checkpointer(root) as ckpt:
        assert ckpt.restore() == 2
    assert same(job.state(), pristine[1][2])
    for words in (["verify"], ["inspect"], ["list"], ["export", "--out", str(tmp_path / "out")]):
        assert main([words[0], str(root), *words[1:]]) == 0
    assert main(["diff", str(root), str(root), "--step-a", "1"]) == 1
    assert not flag.exists()


@pytest.mark.parametrize("key", ["optimizer.param_groups.0.lr", "rng.rank-00000"])
def test_a_hostile_object_is_refused_and_changes_nothing(root, tmp_path, key):
    flag = tmp_path / "pwned"
    stored = io.BytesIO()
    torch.save(RunsCode(flag), stored)
    data = stored.getvalue()

    def point(raw: dict) -> None:
        raw["objects"][key] = {"file": "__7_7.distcp", "start": 0, "length": len(data)}

    forge(root / "step-000000002", point, **{"__7_7.distcp": data})
    job = Job(seed=9, layers=1)
    before, drawn = job.state(), torch.get_rng_state()
    with job.checkpointer(root) as ckpt, pytest.raises(UserError, match="cannot be read safely"):
        ckpt.restore()
    assert not flag.exists()
    assert same(job.state(), before)
    assert torch.equal(torch.get_rng_state(), drawn)


def set_file(name: str) -> Callable[[dict], None]:
    def change(raw: dict) -> None:
        raw["files"][name] = raw["files"]["__0_0.distcp"]
        for record in raw["tensors"].values():
            for shard in record["shards"]:
                shard["file"] = name

    return change


def set_shape(raw: dict) -> None:
    record = raw["tensors"]["model.0.weight"]
    record["shape"] = record["shards"][0]["sizes"] = [10**9, 10**9]


def set_dtype(name: Any) -> Callable[[dict], None]:
    def change(raw: dict) -> None:
        raw["tensors"]["model.0.weight"]["dtype"] = name

    return change


def wider_type(raw: dict) -> None:
    """Eight bytes an element reach beyond the archive, into the next tensor."""
    raw["tensors"]["model.0.weight"]["dtype"] = "float64"


def lose_a_part(raw: dict) -> None:
    shard = raw["tensors"]["model.0.weight"]["shards"][0]
    shard["sizes"] = [shard["sizes"][0] - 1, shard["sizes"][1]]


SAFE = {
    "a file above": set_file("../step-000000001/__0_0.distcp"),
    "an absolute file": set_file("/etc/hostname"),
    "a huge tensor": set_shape,
    "no type at all": set_dtype(None),
    "a part of a tensor": lose_a_part,
    "another step": lambda raw: raw.update(step=7),
}


@pytest.mark.parametrize("name", SAFE)
def test_a_forged_manifest_is_set_aside(root, pristine, name):
    forge(root / "step-000000002", SAFE[name])
    job = Job(seed=9, layers=1)
    with job.checkpointer(root) as ckpt:
        assert ckpt.restore() == 1
    assert same(job.state(), pristine[1][1])


@pytest.mark.parametrize(
    "change", [wider_type, set_dtype("load"), set_dtype("float33")], ids=["wide", "code", "unknown"]
)
def test_a_type_that_does_not_fit_is_refused_with_nothing_changed(root, change):
    forge(root / "step-000000002", change)
    job = Job(seed=9, layers=1)
    before = job.state()
    with job.checkpointer(root) as ckpt, pytest.raises(UndertowError):
        ckpt.restore()
    assert same(job.state(), before)


@pytest.mark.parametrize("name", [COMMIT, MANIFEST, "__0_0.distcp", ".metadata"])
def test_a_planted_pipe_does_not_hang_the_reader(root, pristine, name):
    path = root / "step-000000002" / name
    path.unlink()
    os.mkfifo(path)
    job = Job(seed=9, layers=1)
    with job.checkpointer(root) as ckpt:
        assert ckpt.restore() == 1
    assert same(job.state(), pristine[1][1])
    assert main(["list", str(root)]) == 0


def test_a_step_folder_that_is_a_link_is_not_followed(root, pristine, tmp_path):
    shutil.copytree(root / "step-000000002", tmp_path / "elsewhere")
    shutil.rmtree(root / "step-000000002")
    (root / "step-000000002").symlink_to(tmp_path / "elsewhere")
    job = Job(seed=9, layers=1)
    with job.checkpointer(root, keep=1) as ckpt:
        assert ckpt.restore() == 1
        assert same(job.state(), pristine[1][1])
        ckpt.save(3)
        assert ckpt.wait()[-1].ok
    assert main(["prune", str(root), "--keep", "last=1", "--aside", "--no-dry-run"]) == 0
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == sorted(
        path.name for path in (pristine[0] / "step-000000002").iterdir()
    )
