"""`async_save` in place of DCP's, and `open_checkpoint` on what either of the two wrote."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from undertow.checkpointing import Checkpointer, async_save, drop_in, open_checkpoint
from undertow.checkpointing.manifest import BadCheckpoint
from undertow.dist.errors import UserError

BIG = 200_000  # elements: above the size that is copied at once


def state(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {"w": torch.randn(BIG, generator=generator), "b": torch.randn(7, generator=generator)},
        "half": torch.randn(400, 500, generator=generator).bfloat16(),
        "turned": torch.randn(300, 400, generator=generator).t(),
        "step": 12,
        "opt": torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.25),
    }


def flat(nested: dict) -> dict[str, torch.Tensor]:
    return {
        "model.w": nested["model"]["w"],
        "model.b": nested["model"]["b"],
        **{k: nested[k] for k in ("half", "turned")},
    }


def test_the_state_may_change_as_soon_as_the_call_returns_and_dcp_reads_it(tmp_path):
    one = state(0)
    expected = {key: value.clone() for key, value in flat(one).items()}
    future = async_save(one, checkpoint_id=tmp_path / "a" / "b")
    for value in flat(one).values():
        value.zero_()
    assert future.result(timeout=240) == tmp_path / "a" / "b"
    target = {key: torch.zeros_like(value) for key, value in expected.items()}
    nested = {"model": {"w": target["model.w"], "b": target["model.b"]}, **{k: target[k] for k in ("half", "turned")}}
    dcp.load(nested, checkpoint_id=tmp_path / "a" / "b")
    assert all(torch.equal(flat(nested)[key], value) for key, value in expected.items())
    found = open_checkpoint(tmp_path / "a" / "b")
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert found["step"] == 12
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_what_is_no_dictionary_is_refused_by_its_type(tmp_path):
    with pytest.raises(UserError, match=r"state_dict is a Linear; expected a dict, such as"):
        async_save(nn.Linear(2, 2), checkpoint_id=tmp_path / "x")
    assert async_save({"model": nn.Linear(2, 2)}, checkpoint_id=tmp_path / "x").result().is_dir()


def test_saves_that_overlap_keep_their_own_values(tmp_path):
    wanted, futures = [], []
    for seed in range(4):
        one = state(seed)
        wanted.append(one["model"]["w"].clone())
        futures.append(async_save(one, checkpoint_id=tmp_path / f"s{seed}"))
        one["model"]["w"].fill_(-1)
    for future, value in zip(futures, wanted):
        assert torch.equal(open_checkpoint(future.result(timeout=240))["model.w"], value)


def test_a_checkpoint_is_replaced_and_foreign_files_are_not(tmp_path):
    for seed in (1, 2):
        async_save(state(seed), checkpoint_id=tmp_path / "x").result(timeout=240)
    assert torch.equal(open_checkpoint(tmp_path / "x")["half"], state(2)["half"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    with pytest.raises(UserError, match="holds other files"):
        async_save(state(3), checkpoint_id=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "…"


def test_a_lost_save_is_told_by_its_future(tmp_path):
    with pytest.raises(RuntimeError, match="cannot be pickled"):
        async_save({"w": torch.ones(3), "f": lambda: 0}, checkpoint_id=tmp_path / "x").result(timeout=240)
    assert not (tmp_path / "x").exists()
    async_save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "x").result(timeout=240)


def _save_ranks(rank: int, world: int, folder: str) -> bool:
    shared = torch.arange(BIG, dtype=torch.float32)
    async_save({"shared": shared, "count": world}, checkpoint_id=Path(folder) / "x").result(timeout=240)
    return torch.equal(open_checkpoint(Path(folder) / "x")["shared"], shared)


def test_ranks_save_together(ranks, tmp_path):
    assert ranks(2, _save_ranks, str(tmp_path)) == [True, True]


def test_what_dcp_writes_is_read(tmp_path):
    one = state(5)
    del one["opt"]
    dcp.save(one, checkpoint_id=tmp_path / "dcp")
    found = open_checkpoint(tmp_path / "dcp")
    assert set(found) == {"model.w", "model.b", "half", "turned", "step"}
    assert "half" in found and "w" not in found and found.get("w") is None
    with pytest.raises(KeyError, match=r"'w' is not in .*/dcp; it holds 5 names such as model.w"):
        found["w"]
    assert all(torch.equal(found[key], value) for key, value in flat(one).items())


class Bomb:
    def __reduce__(self):
        return open, ("bomb-went-off", "w")


def test_hostile_dcp_metadata_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(BadCheckpoint, match="open"):
        open_checkpoint(tmp_path / "dcp")
    assert not (tmp_path / "bomb-went-off").exists()


def test_a_dcp_value_of_an_unknown_type_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dcp.save({"w": torch.ones(2), "bomb": Bomb()}, checkpoint_id=tmp_path / "dcp")
    found = open_checkpoint(tmp_path / "dcp")
    with pytest.raises(BadCheckpoint, match="cannot be read safely"):
        found["bomb"]
    assert not (tmp_path / "bomb-went-off").exists()
    assert torch.equal(found["w"], torch.ones(2))


def test_opening_ours_reads_views_and_finds_damage(tmp_path):
    model = nn.Linear(512, 512)
    with Checkpointer(tmp_path, model=model) as ckpt:
        ckpt.save(3)
        assert ckpt.wait()[-1].ok
        path = ckpt.folder.final(3)
    found = open_checkpoint(tmp_path)
    assert torch.equal(found["model.weight"], model.weight)
    assert "weight" not in found and "model.bias" in found
    with pytest.raises(KeyError, match=r"'weight' is not in .*names such as model.weight"):
        found["weight"]
    found["model.weight"].zero_()  # a private page: the file stays
    assert torch.equal(open_checkpoint(tmp_path, step=3)["model.weight"], model.weight)
    shard = path / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[-100_000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(BadCheckpoint, match="damaged"):
        open_checkpoint(tmp_path)


def test_states_of_many_shapes_do_not_fill_the_store(tmp_path):
    engine, found = drop_in._engine(os.getpid(), 1), []
    for number in range(40):
        async_save({"w": torch.ones(3 + number)}, checkpoint_id=tmp_path / "c").result()
        found.append(engine.coordinator.store.num_keys())
    assert found[39] - found[19] <= 20, found
