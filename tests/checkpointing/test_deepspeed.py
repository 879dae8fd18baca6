"""Real DeepSpeed on real ranks: ZeRO 0 to 3 train on alike after a resume, through our engine and its own tools."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("deepspeed") is None:  # not imported here: that takes seconds where nothing of it runs
    pytest.skip("needs deepspeed: pip install 'undertow[deepspeed]'", allow_module_level=True)

from undertow.checkpointing.deepspeed_config import CheckpointSection, checkpoint_section, section  # noqa: E402
from undertow.checkpointing.tag_folder import candidates, problems, read_record  # noqa: E402
from undertow.dist.errors import UserError  # noqa: E402
from undertow.integrations.pytest_plugin import RankFailure  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))

from deepspeed_job import hash_of, prepare, train  # noqa: E402

pytestmark = pytest.mark.slow  # together more than ten seconds


@pytest.fixture(autouse=True, scope="module")
def imported():
    prepare()


def run(ranks, world: int, *arguments, **options) -> list[dict]:
    return ranks(world, lambda rank, size: train(rank, size, *arguments, **options))


@pytest.mark.parametrize(("stage", "lazy"), [(0, True), (1, True), (2, True), (2, False), (3, True)])
def test_resume_is_bit_identical(ranks, tmp_path, stage, lazy):
    """Six steps straight with a save after the third, which step four fences; then three more from it."""
    straight = run(ranks, 2, tmp_path, stage, 6, save_at=3, lazy=lazy)
    assert [end["reports"] for end in straight] == [[("global_step3", "")]] * 2
    assert (tmp_path / "latest").read_text() == "global_step3"
    assert problems(tmp_path / "global_step3") == []
    resumed = run(ranks, 2, tmp_path, stage, 6, load=True)
    for before, after in zip(straight, resumed):
        assert (after["loaded"], after["position"], after["calls"]) == ("global_step3", 3, 3.0)
        assert after["losses"] == before["losses"][3:]
        assert after["hash"] == before["hash"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stock_deepspeed_and_its_converters_read_it(ranks, tmp_path, stage):
    """The same folder through DeepSpeed's own engine and zero_to_fp32, and, for another world size, its converter."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from undertow.__main__ import main

    straight = run(ranks, 2, tmp_path / "a", stage, 6, save_at=3)[0]
    stock = run(ranks, 2, tmp_path / "a", stage, 6, load=True, stock=True)[0]
    assert stock["losses"] == straight["losses"][3:] and stock["hash"] == straight["hash"]
    state = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "a"))
    assert state is not None
    assert hash_of({name: value for name, value in state.items() if name != "1.calls"}) == straight["hash_at_save"]
    assert main(["deepspeed", "convert", str(tmp_path / "a"), str(tmp_path / "u"), "--workers", "1"]) == 0
    alone = run(ranks, 1, tmp_path / "u", stage, 6, load=True, universal=True)[0]
    assert len(alone["losses"]) == 3
    for one, two in zip(alone["losses"], straight["losses"][3:]):
        assert abs(one - two) < 1e-5  # other ranks, other order of sums: fp32 noise of a loss near 1


def test_resume_at_another_world_size(ranks, tmp_path):
    """Stage 0 needs nothing. Partitions of another number of ranks are refused with the command that joins them."""
    straight = run(ranks, 2, tmp_path / "0", 0, 6, save_at=3)[0]
    alone = run(ranks, 1, tmp_path / "0", 0, 6, load=True)[0]
    assert alone["position"] == 3 and len(alone["losses"]) == 3
    for one, two in zip(alone["losses"], straight["losses"][3:]):
        assert abs(one - two) < 1e-5  # other ranks, other order of sums: fp32 noise of a loss near 1
    for stage in (1, 3):
        run(ranks, 2, tmp_path / "z", stage, 1, save_at=1)
        with pytest.raises(RankFailure, match="over 2 data-parallel ranks, and this job has 1.*deepspeed convert"):
            run(ranks, 1, tmp_path / "z", stage, 2, load=True)


def test_we_load_what_stock_deepspeed_wrote(ranks, tmp_path):
    straight = run(ranks, 2, tmp_path, 2, 6, save_at=3, stock=True)[0]
    assert run(ranks, 2, tmp_path, 2, 6, load=True)[0]["losses"] == straight["losses"][3:]


class Planted:
    """Runs `os.mkdir` when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_foreign_file_runs_nothing(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    from undertow.checkpointing.deepspeed_engine import UndertowCheckpointEngine

    scaler = DynamicLossScaler.__new__(DynamicLossScaler)
    scaler.cur_scale, scaler.cur_hysteresis = 2.0**16, 2
    torch.save({"loss_scaler": scaler, "step": 3}, tmp_path / "own.pt")
    torch.save({"step": Planted(tmp_path / "ran")}, tmp_path / "hostile.pt")
    engine = UndertowCheckpointEngine(CheckpointSection())
    try:
        found = engine.load(str(tmp_path / "own.pt"))
        assert found["step"] == 3 and vars(found["loss_scaler"]) == vars(scaler)
        with pytest.raises(UserError, match="not written by undertow.*add_safe_globals"):
            engine.load(str(tmp_path / "hostile.pt"))
    finally:
        engine.cleanup()
    assert not (tmp_path / "ran").exists()


def test_faults(ranks, tmp_path):
    """A save whose rank is killed leaves the older tag; a damaged tag is passed over; the last save needs no step."""
    first = run(ranks, 2, tmp_path, 1, 2, save_at=2)[0]  # the save is the last thing before the end
    assert first["reports"] == [("global_step2", "")] and (tmp_path / "latest").read_text() == "global_step2"
    with pytest.raises(RankFailure):
        run(ranks, 2, tmp_path, 1, 4, load=True, save_at=4, killed=1)
    assert (tmp_path / "latest").read_text() == "global_step2"
    assert candidates(tmp_path) == ["global_step2"]
    again = run(ranks, 2, tmp_path, 1, 4, load=True, save_at=4)[0]
    assert again["loaded"] == "global_step2" and candidates(tmp_path) == ["global_step4", "global_step2"]
    record = read_record(tmp_path / "global_step4")
    assert record is not None
    with open(tmp_path / "global_step4" / sorted(record.files)[0], "r+b") as file:
        file.seek(500)
        byte = file.read(1)
        file.seek(500)
        file.write(bytes([byte[0] ^ 1]))
    assert len(problems(tmp_path / "global_step4")) == 1
    passed = run(ranks, 2, tmp_path, 1, 3, load=True)[0]
    assert passed["loaded"] == "global_step2" and passed["losses"] == again["losses"][:1]


def test_a_tag_written_again_replaces_the_old_one_whole(ranks, tmp_path):
    run(ranks, 2, tmp_path, 1, 2, save_at=2)
    before = read_record(tmp_path / "global_step2")
    run(ranks, 2, tmp_path, 2, 2, save_at=2)
    after = read_record(tmp_path / "global_step2")
    assert before is not None and after is not None and before.files != after.files
    assert problems(tmp_path / "global_step2") == [] and not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"undertwo": {}}, "write 'undertow'"),
        ({"Undertow": {}}, "write 'undertow'"),
        ({"undertow": {"chekpoint": {}}}, "write 'checkpoint'"),
        ({"undertow": 3}, "an object with"),
        ({"undertow": {"overlap": True}}, "cannot be switched on here: ZeRO partitions"),
    ],
)
def test_misspelt_sections_are_refused_by_name(config, message):
    with pytest.raises(UserError, match=message):
        section(config)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"lasy": True}, "write 'lazy'"),
        ({"lazy": 1}, "true or false"),
        ({"timeout_s": 0}, "positive"),
        (3, "an object"),
    ],
)
def test_misspelt_keys_are_refused_by_name(raw, message):
    with pytest.raises(UserError, match=message):
        checkpoint_section(raw)


def test_the_section():
    assert section({"zero_optimization": {}, "train_batch_size": 2}) == {}
    assert section({"undertow": {"checkpoint": True}}) == {"checkpoint": True}
    assert checkpoint_section(True) == CheckpointSection()
    assert checkpoint_section({"lazy": False}) == CheckpointSection(lazy=False)
    assert section({"undertow": {"overlap": False, "context_parallel": None}})["overlap"] is False
    assert checkpoint_section(None) is None and checkpoint_section(False) is None
