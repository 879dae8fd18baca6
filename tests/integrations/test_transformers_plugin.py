"""transformers' own Trainer with lazy checkpoints: same numbers, same folders, whole or absent, resumed bit by bit."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'undertow[hf]'")

import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, Qwen3Config, Trainer, TrainingArguments  # noqa: E402

from undertow.checkpointing.lazy_file import HostBuffers, LazyFile  # noqa: E402
from undertow.checkpointing.lazy_safetensors import LazySafetensors  # noqa: E402
from undertow.checkpointing.tag_folder import problems, read_record  # noqa: E402
from undertow.dist.errors import UserError  # noqa: E402
from undertow.integrations.pytest_plugin import RankFailure  # noqa: E402
from undertow.integrations.transformers_plugin import LazyCheckpoints, StreamCallback, newest_whole  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def small_model(dropout: float = 0.1):
    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, attention_dropout=dropout,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager" if dropout else "sdpa")


def data(count: int = 32) -> list[dict]:
    tokens = torch.randint(0, 64, (count, 12), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer_for(
    folder: Path, *, lazy: bool, callbacks=(), dropout: float = 0.1, **options
) -> tuple[Trainer, LazyCheckpoints | None]:
    arguments = {
        "max_steps": 8, "save_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 11, "save_strategy": "steps", **options,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **arguments)
    trainer = Trainer(small_model(dropout), args, train_dataset=data(), eval_dataset=data(4), callbacks=list(callbacks))  # type: ignore[arg-type]
    saver = LazyCheckpoints(trainer) if lazy else None
    if saver is not None:
        trainer.add_callback(saver)
    return trainer, saver


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(model) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.slow
def test_the_folder_holds_what_the_trainer_would_have_written(tmp_path):
    plain, _ = trainer_for(tmp_path / "plain", lazy=False)
    plain.train()
    lazy, saver = trainer_for(tmp_path / "lazy", lazy=True)
    lazy.train()
    assert saver is not None and saver.reports == [(f"checkpoint-{step}", "") for step in (3, 6, 8)]
    assert losses(lazy) == losses(plain) and weights(lazy.model) == weights(plain.model)
    assert "_save_checkpoint" not in vars(lazy)
    for step in (3, 6, 8):
        one, two = tmp_path / "plain" / f"checkpoint-{step}", tmp_path / "lazy" / f"checkpoint-{step}"
        names = {path.name for path in two.iterdir()}
        assert names - {path.name for path in one.iterdir()} == {"undertow.json"}
        assert {path.name for path in one.iterdir()} <= names and problems(two) == []
        a, b = (torch.load(path / "optimizer.pt", weights_only=True) for path in (one, two))
        assert a["param_groups"] == b["param_groups"]
        for index, state in a["state"].items():
            assert all(torch.equal(value, b["state"][index][name]) for name, value in state.items())
        a, b = (AutoModelForCausalLM.from_pretrained(path) for path in (one, two))
        assert weights(a) == weights(b)
    assert [path.name for path in (tmp_path / "lazy").iterdir() if path.name[0] == "."] == []


@pytest.mark.parametrize("reader", ["lazy", "plain"])
def test_resume_is_bit_identical_and_passes_over_damage(tmp_path, reader):
    straight, _ = trainer_for(tmp_path, lazy=True)
    straight.train()
    with open(tmp_path / "checkpoint-8" / "model.safetensors", "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"\x55")
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / ".undertow-stale-1" / "checkpoint-9")
    found = newest_whole(tmp_path)
    assert found == str(tmp_path / "checkpoint-6")
    resumed, saver = trainer_for(tmp_path, lazy=reader == "lazy")
    resumed.train(resume_from_checkpoint=found)
    assert losses(resumed) == losses(straight) and weights(resumed.model) == weights(straight.model)
    if saver is not None:
        assert saver.reports == [("checkpoint-8", "")] and problems(tmp_path / "checkpoint-8") == []
        assert not (tmp_path / ".undertow-stale-1").exists()


def test_the_best_model_and_the_limit_are_kept(tmp_path):
    options = {
        "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_total_limit": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
    }  # fmt: skip
    plain, _ = trainer_for(tmp_path / "plain", lazy=False, **options)
    plain.train()
    lazy, _ = trainer_for(tmp_path / "lazy", lazy=True, **options)
    lazy.train()
    best = Path(lazy.state.best_model_checkpoint or "")
    assert best.parent == tmp_path / "lazy" and best.name == Path(plain.state.best_model_checkpoint or "").name
    assert weights(lazy.model) == weights(plain.model)
    kept = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("plain", "lazy")]
    assert kept[0] == kept[1]


def test_a_save_that_fails_costs_nothing_else(tmp_path, monkeypatch):
    straight, _ = trainer_for(tmp_path / "a", lazy=False)
    straight.train()
    write = LazyFile.write

    def full(self):
        if "checkpoint-6" in str(self.path):
            raise OSError(28, "No space left on device")
        return write(self)

    monkeypatch.setattr(LazyFile, "write", full)
    lazy, saver = trainer_for(tmp_path / "b", lazy=True)
    lazy.train()
    assert saver is not None and dict(saver.reports)["checkpoint-8"] == ""
    assert "No space left" in dict(saver.reports)["checkpoint-6"]
    assert losses(lazy) == losses(straight)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["checkpoint-3", "checkpoint-8"]


def test_someone_else_who_writes_the_weights_makes_the_save_fail(tmp_path, monkeypatch):
    from transformers import TrainerCallback

    class Careless(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                for parameter in kwargs["model"].parameters():
                    parameter.data.mul_(1.5)
                gate.set()

    gate, copy, training = threading.Event(), LazyFile.copy, threading.current_thread()

    def late(self):  # the background comes after the careless write
        if threading.current_thread() is not training:
            assert gate.wait(240)
        copy(self)

    monkeypatch.setattr(LazyFile, "copy", late)
    lazy, saver = trainer_for(tmp_path, lazy=True, callbacks=[Careless()])
    lazy.train()
    assert saver is not None and "written while it was being copied" in dict(saver.reports)["checkpoint-3"]
    assert not (tmp_path / "checkpoint-3").exists() and problems(tmp_path / "checkpoint-6") == []


def run_rank(rank, world, folder, resume, killed):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    trainer, saver = trainer_for(
        Path(folder), lazy=True, max_steps=6, ddp_backend="gloo", ddp_find_unused_parameters=False
    )
    assert saver is not None
    if killed == rank:
        rename = saver._ops.rename

        def dying(source, target):
            if "checkpoint-6" in str(target):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        saver._ops.rename = dying
    trainer.train(resume_from_checkpoint=newest_whole(folder) if resume else None)
    return losses(trainer), weights(trainer.model), saver.reports


@pytest.mark.slow
def test_two_ranks_and_a_killed_one(ranks, tmp_path):
    straight = ranks(2, run_rank, str(tmp_path / "a"), False, -1)
    assert straight[0][1] == straight[1][1] and straight[0][2] == [("checkpoint-3", ""), ("checkpoint-6", "")]
    record = read_record(tmp_path / "a" / "checkpoint-3")
    assert record is not None and {"rng_state_0.pth", "rng_state_1.pth"} <= set(record.files)
    with pytest.raises(RankFailure):
        ranks(2, run_rank, str(tmp_path / "b"), False, 0)
    assert newest_whole(tmp_path / "b") == str(tmp_path / "b" / "checkpoint-3")
    again = ranks(2, run_rank, str(tmp_path / "b"), True, -1)
    assert [end[:2] for end in again] == [end[:2] for end in straight]


def test_streaming_and_lazy_checkpoints_together(tmp_path):
    stream = StreamCallback(chunk=4)
    plain, _ = trainer_for(tmp_path / "a", lazy=False, dropout=0.0, max_steps=4)
    plain.train()
    both, _ = trainer_for(tmp_path / "b", lazy=True, callbacks=[stream], dropout=0.0, max_steps=4)
    both.train()
    assert stream.engine is not None and stream.engine.last_plan is not None and stream.engine.last_plan.chunk == 4
    for one, two in zip(losses(both), losses(plain)):
        assert abs(one - two) < 1e-5 * two  # float32 sums in another order, through four steps of AdamW
    assert newest_whole(tmp_path / "b") == str(tmp_path / "b" / "checkpoint-4")


def test_where_lazy_is_impossible_the_trainer_saves_as_ever(tmp_path, caplog):
    lazy, saver = trainer_for(tmp_path, lazy=True, max_steps=1, save_steps=1, save_on_each_node=True)
    lazy.train()
    assert saver is not None and saver.reports == [] and "save_on_each_node" in caplog.text
    assert newest_whole(tmp_path) == str(tmp_path / "checkpoint-1")


def test_wrong_use():
    with pytest.raises(UserError, match="expected the Trainer that it is added to"):
        LazyCheckpoints(small_model())  # type: ignore[arg-type]


def test_a_lazy_safetensors_file_is_one(tmp_path, seed):
    from safetensors.torch import load_file, save_file

    tensors = {
        "a": torch.randn(3, 5), "b": torch.arange(7, dtype=torch.uint8), "c": torch.randn(4, 1).bfloat16(),
        "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5, dtype=torch.float64), "d": torch.tensor([True, False]),
    }  # fmt: skip
    file = LazySafetensors(tmp_path / "x", tensors, {"format": "pt"}, lambda keys: keys[0] != "a", HostBuffers())
    file.fence()
    file.write()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = load_file(file.part), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(UserError, match="cannot hold"):
        odd = {"z": torch.zeros(1, dtype=torch.complex128)}
        LazySafetensors(tmp_path / "y", odd, {}, lambda keys: True, HostBuffers())
