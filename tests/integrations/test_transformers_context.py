"""transformers' own Trainer with its sequences spread over real ranks: the gradients and the curve of one process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install 'undertow[hf]'")

import transformers  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from undertow.checkpointing.tag_folder import problems  # noqa: E402
from undertow.dist.errors import UserError  # noqa: E402
from undertow.integrations.transformers_plugin import (  # noqa: E402
    ContextParallelCallback,
    LazyCheckpoints,
    StreamCallback,
    newest_whole,
)

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# float32 sums in another order: 2^-24 of the largest gradient per addition, over some hundred additions. A factor of
# the axis counted twice or left out, or a label that is not shifted, shows as 1e-1 and more.
NOISE = 2e-5


def small_model(family: str = "qwen3"):
    torch.manual_seed(5)
    config = AutoConfig.for_model(
        family, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attention_dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def data(count: int = 48, *, ignore: bool = True) -> list[dict]:
    """19 tokens, and in every row another number of labels that count, so that a mean of means would be wrong."""
    tokens = torch.randint(1, 64, (count, 19), generator=torch.Generator().manual_seed(2))
    rows = []
    for number, row in enumerate(tokens):
        labels = row.clone()
        labels[: (5 * number) % 13 * ignore] = -100
        rows.append({"input_ids": row, "labels": labels})
    return rows


class Watch(TrainerCallback):
    """The gradients with which the first step was made."""

    def __init__(self) -> None:
        self.grads: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.grads = {name: p.grad.detach().clone() for name, p in kwargs["model"].named_parameters()}


def make(folder: Path, *, callbacks=(), cls=Trainer, family: str = "qwen3", **options):
    arguments = {
        "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 1, "logging_steps": 1, "learning_rate": 1e-2,
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 11, "save_strategy": "steps",
        "max_grad_norm": 0.5, "per_device_eval_batch_size": 2, "ddp_find_unused_parameters": False, **options,
    }  # fmt: skip
    if torch.distributed.is_initialized():
        arguments["ddp_backend"] = "gloo"
    args = TrainingArguments(str(folder), **arguments)
    return cls(
        small_model(family), args, train_dataset=data(), eval_dataset=data(8, ignore=False), callbacks=list(callbacks)
    )


def outcome(trainer: Trainer, watch: Watch) -> dict:
    history = trainer.state.log_history
    return {
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "norms": [float(entry["grad_norm"]) for entry in history if "grad_norm" in entry],
        "eval": [entry["eval_loss"] for entry in history if "eval_loss" in entry],
        "grads": {name: value.numpy() for name, value in watch.grads.items()},  # arrays go through a pipe as bytes
        "weights": {name: value.detach().clone().numpy() for name, value in trainer.model.state_dict().items()},
        "epoch": trainer.state.epoch,
    }


def run(
    folder: Path, ranks: int, *, stream: dict | None = None, lazy: bool = False, resume: str | None = None, **options
):
    watch = Watch()
    trainer = make(folder, callbacks=[watch, *([] if stream is None else [StreamCallback(**stream)])], **options)
    if ranks > 1:
        trainer.add_callback(ContextParallelCallback(trainer, ranks=ranks))
    if lazy:
        trainer.add_callback(LazyCheckpoints(trainer))
    trainer.train(resume_from_checkpoint=resume)
    return outcome(trainer, watch)


def assert_same(found: dict, expected: dict) -> None:
    for name, value in expected["grads"].items():
        assert abs(found["grads"][name] - value).max() <= NOISE * abs(value).max(), name
    # AdamW makes a whole step of a gradient that is nearly zero, whatever its last bits: later steps are held looser.
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    for name in ("norms", "eval"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3)
    assert found["epoch"] == expected["epoch"]
    squares = [(abs(found["weights"][name] - value) ** 2).sum() for name, value in expected["weights"].items()]
    assert sum(squares) < 1e-4 * sum((value**2).sum() for value in expected["weights"].values())


def on_ranks(rank, world, folder, cases):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    found = []
    for number, options in enumerate(cases):
        found.append(run(Path(folder) / str(number), 2, **options))
    return found


EVAL = {"eval_strategy": "steps", "eval_steps": 2}


@pytest.mark.slow
def test_two_ranks_are_one(ranks, tmp_path):
    """Accumulation of four rows with unequal counts, clipping, evaluation between, lazy checkpoints, streaming."""
    cases = [
        {"gradient_accumulation_steps": 4, **EVAL},
        {"gradient_accumulation_steps": 4, **EVAL, "stream": {"chunk": 5}, "lazy": True},
        {"gradient_accumulation_steps": 4, "family": "llama", "average_tokens_across_devices": False},
    ]
    alone = [
        run(tmp_path / "alone", 1, **cases[0]),
        run(tmp_path / "llama", 1, gradient_accumulation_steps=4, family="llama"),
    ]
    for one in ranks(2, on_ranks, str(tmp_path / "two"), cases):
        for found, expected in zip(one, (alone[0], alone[0], alone[1]), strict=True):
            assert_same(found, expected)
    folder = tmp_path / "two" / "1"
    assert problems(folder / "checkpoint-2") == [] and newest_whole(folder) == str(folder / "checkpoint-4")
    saved = json.loads((folder / "checkpoint-4" / "config.json").read_text())
    assert "undertow" not in json.dumps(saved)
    resumed = run(tmp_path / "again", 1, resume=str(folder / "checkpoint-2"), **cases[0])  # by one process, plainly
    assert resumed["losses"] == pytest.approx(alone[0]["losses"], rel=1e-4)


@pytest.mark.slow
def test_beside_data_parallelism(ranks, tmp_path):
    """Two groups of two ranks: each batch counts once, whichever group has it."""
    alone = run(tmp_path / "alone", 1, gradient_accumulation_steps=4)
    cases = [{"gradient_accumulation_steps": 2, "stream": {}}]
    for (found,) in ranks(4, on_ranks, str(tmp_path / "four"), cases):
        assert_same(found, alone)


def refused(rank, world, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    said = []

    def expect(action):
        with pytest.raises(UserError) as error:
            action()
        said.append(str(error.value))

    class Own(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    class Uneven(Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(data(8 + rank)[rank:], batch_size=1)  # type: ignore[arg-type]

    expect(lambda: ContextParallelCallback(make(folder, label_smoothing_factor=0.1), ranks=2))
    expect(lambda: ContextParallelCallback(make(folder, cls=Own), ranks=2))
    expect(lambda: ContextParallelCallback(make(folder), ranks=3))
    trainer = make(folder)
    trainer.accelerator.state.parallelism_config = type("Config", (), {"cp_size": 2})()
    expect(lambda: ContextParallelCallback(trainer, ranks=2))
    trainer.accelerator.state.parallelism_config = None
    trainer = make(folder, cls=Uneven)
    trainer.add_callback(ContextParallelCallback(trainer, ranks=2))
    expect(trainer.train)
    return said


def test_what_does_not_go_together_is_named(ranks, tmp_path):
    for said in ranks(2, refused, tmp_path):
        words = ["label_smoothing_factor", "Own.compute_loss", "context 3", "cp_size", "different batches"]
        assert len(said) == len(words)
        for line, word in zip(said, words):
            assert word in line
    with pytest.raises(UserError, match="expected the Trainer that it is added to"):
        ContextParallelCallback(small_model(), ranks=1)  # type: ignore[arg-type]
