"""Restoring what stock DCP wrote: found by what it holds, verified by its archives' own CRC-32s, refused whole."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import Job, same
from test_ranks import build, full_state, tensors, update

from undertow.checkpointing import Checkpointer
from undertow.checkpointing.manifest import BadCheckpoint
from undertow.dist.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.distributed is disabled.*")


def trained() -> Job:
    job = Job()
    for step in range(2):
        job.advance(step)
    return job


def forms(job: Job) -> dict[str, dict]:
    """The ways in which users nest what they give to DCP."""
    model, optimizer = get_state_dict(job.model, job.optimizer)
    flat = get_state_dict(job.model, job.optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))[1]
    wrapped = {f"module.{name}": value for name, value in model.items()}
    return {
        "tutorial": {"app": {"model": model, "optim": optimizer}, "step": 7},
        "plain": {"model": model, "optimizer": optimizer},
        "flattened": {"model": model, "optim": flat},
        "by number": {"net": job.model.state_dict(), "opt": job.optimizer.state_dict()},
        "DDP": {"model": wrapped, "optim": optimizer},
    }


@pytest.mark.parametrize("form", ["tutorial", "plain", "flattened", "by number", "DDP"])
def test_every_form_comes_back_and_training_goes_on_alike(tmp_path, form):
    job = trained()
    dcp.save(forms(job)[form], checkpoint_id=tmp_path / "dcp")
    other = Job(seed=9)
    with other.checkpointer(tmp_path / "ours") as ckpt:
        ckpt.restore_from(tmp_path / "dcp")
        assert same(other.state(), job.state())
        job.advance(2)
        other.advance(2)
        assert same(other.state(), job.state())
        ckpt.save(3)
        assert ckpt.wait()[-1].ok


def test_what_async_save_wrote_with_objects(tmp_path):
    job = trained()
    scheduler = torch.optim.lr_scheduler.StepLR(job.optimizer, 1)
    scheduler.step()
    model, optimizer = get_state_dict(job.model, job.optimizer)
    state = {"model": model, "optim": optimizer, "sched": scheduler.state_dict()}
    dcp.async_save(state, checkpoint_id=tmp_path / "dcp").result()
    other = Job(seed=9)
    fresh = torch.optim.lr_scheduler.StepLR(other.optimizer, 1)
    with Checkpointer(tmp_path / "a", model=other.model, optimizer=other.optimizer, scheduler=fresh) as ckpt:
        before = other.state()
        with pytest.raises(UserError, match="'scheduler' stand nowhere.*names="):
            ckpt.restore_from(tmp_path / "dcp")
        assert same(other.state(), before)
        ckpt.restore_from(tmp_path / "dcp", names={"scheduler": "sched"})
        assert same(other.state(), job.state()) and fresh.state_dict() == scheduler.state_dict()
        other.optimizer.param_groups[0]["lr"] = 5.0
        ckpt.restore_from(tmp_path / "dcp", names={"scheduler": None, "optimizer": None})
        assert other.optimizer.param_groups[0]["lr"] == 5.0


def test_what_does_not_fit_changes_nothing(tmp_path):
    dcp.save({"model": trained().model.state_dict()}, checkpoint_id=tmp_path / "dcp")
    dcp.save(forms(trained())["tutorial"] | {"twin": trained().model.state_dict()}, checkpoint_id=tmp_path / "two")
    narrow = Job(width=280)
    before = narrow.state()
    with narrow.checkpointer(tmp_path / "ours") as ckpt:
        for folder, message in (
            ("dcp", "parameters of 'optimizer' stand nowhere"),
            ("two", "under 'app.model', 'twin'"),
        ):
            with pytest.raises(UserError, match=message):
                ckpt.restore_from(tmp_path / folder)
        with pytest.raises(UserError, match="has shape .280, 280. here and .272, 272. in the checkpoint"):
            ckpt.restore_from(tmp_path / "dcp", names={"optimizer": None})
        with pytest.raises(UserError, match="is not a folder that dcp.save wrote"):
            ckpt.restore_from(tmp_path / "ours")
    assert same(narrow.state(), before)


def test_every_flipped_byte_of_a_payload_is_found(tmp_path):
    job = trained()
    dcp.save(forms(job)["plain"], checkpoint_id=tmp_path / "dcp")
    file = tmp_path / "dcp" / "__0_0.distcp"
    whole = file.read_bytes()
    weight = job.model[0].weight.detach().numpy().tobytes()
    begin = whole.index(weight)
    other = Job(seed=9)
    other.advance(5)
    before, draw = other.state(), random.Random(0)
    with other.checkpointer(tmp_path / "ours") as ckpt:
        for _ in range(4):
            place = begin + draw.randrange(len(weight))
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
            with pytest.raises(BadCheckpoint, match=r"0\.weight' is damaged"):
                ckpt.restore_from(tmp_path / "dcp")
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(BadCheckpoint, match="reaches beyond"):
            ckpt.restore_from(tmp_path / "dcp", verify=False)
        assert same(other.state(), before)
        file.write_bytes(whole)
        ckpt.restore_from(tmp_path / "dcp")
    assert same(other.state(), job.state())


def _dcp_save(rank: int, world: int, folder: str, layout: str) -> None:
    net, optimizer = build(layout, world, seed=0)
    update(net, optimizer, 0)
    model, state = get_state_dict(net, optimizer)
    dcp.save({"app": {"model": model, "optim": state}}, checkpoint_id=folder)


def _restore_from(rank: int, world: int, folder: str, ours: str, layout: str) -> dict:
    net, optimizer = build(layout, world, seed=7)
    with Checkpointer(ours, model=net, optimizer=optimizer, timeout_s=240) as ckpt:
        ckpt.restore_from(folder)
        update(net, optimizer, 1)
        found = {key: value.numpy() for key, value in full_state(net, optimizer).items()}
        ckpt.save(2)
        assert ckpt.wait()[-1].ok
    return found


@pytest.mark.parametrize(
    ("wrote", "reads"),
    [
        (("fsdp", 2), [("fsdp", 3), ("plain", 1)]),
        pytest.param(("fsdp+tp", 4), [("tp", 2), ("fsdp", 4)], marks=pytest.mark.slow),
        (("plain", 2), [("fsdp", 2), ("tp", 2)]),
    ],
)
def test_other_ranks_and_layouts_read_it(ranks, tmp_path, wrote, reads):
    """A plain run on one rank is the answer."""
    ranks(wrote[1], _dcp_save, str(tmp_path / "dcp"), wrote[0])
    net, optimizer = build("plain", 1, seed=0)
    update(net, optimizer, 0)
    update(net, optimizer, 1)
    expected = full_state(net, optimizer)
    for index, (layout, world) in enumerate(reads):
        for found in ranks(world, _restore_from, str(tmp_path / "dcp"), str(tmp_path / f"ours{index}"), layout):
            assert same(tensors(found), expected), layout


def _refused(rank: int, world: int, folders: list[str], ours: str) -> tuple[str, bool]:
    net, optimizer = build("fsdp", world, seed=7)
    update(net, optimizer, 3)
    before = full_state(net, optimizer)
    with Checkpointer(ours, model=net, optimizer=optimizer, timeout_s=240) as ckpt:
        try:
            ckpt.restore_from(folders[rank])
            error = "none"
        except (BadCheckpoint, UserError) as refusal:
            error = f"{type(refusal).__name__}: {refusal}"
    return error, same(full_state(net, optimizer), before)


def test_what_one_rank_finds_wrong_is_refused_on_all(ranks, tmp_path):
    ranks(2, _dcp_save, str(tmp_path / "dcp"), "fsdp")
    file, folder, ours = tmp_path / "dcp" / "__1_0.distcp", str(tmp_path / "dcp"), str(tmp_path / "ours")
    for error, untouched in ranks(2, _refused, [folder, folder + "-elsewhere"], ours):  # mounted on one host only
        assert error.startswith("UserError") and "not a folder that dcp.save wrote" in error and untouched, error
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 4  # in the payload of a tensor: names and records are short
    file.write_bytes(bytes(whole))
    for error, untouched in ranks(2, _refused, [folder, folder], ours):  # only one of them reads the bad archive
        assert error.startswith("BadCheckpoint") and "damaged" in error and untouched, error
