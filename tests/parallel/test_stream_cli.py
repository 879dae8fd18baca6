"""`undertow stream plan`, the example and the Trainer callback."""

import json
from pathlib import Path

import pytest
import torch

from undertow.dist.errors import UserError
from undertow.parallel.stream.cli import KNOWN, longest, main, shape_of


def test_plan_prints_the_plan_and_what_would_fit(capsys):
    assert main(["plan", "--model", "llama3-8b", "--seq-len", "262144", "--memory", "80GB"]) == 0
    out = capsys.readouterr().out
    assert "does not fit" not in out
    for word in ("chunks", "layer inputs", "peak", "PFLOP", "gradient checkpointing", "K tokens"):
        assert word in out


@pytest.mark.slow
def test_one_rank_of_several(capsys):
    """As the guide says; and with sharded weights no input is computed again."""
    guide = (Path(__file__).parents[2] / "docs" / "stream-backprop.md").read_text()
    assert main(["plan", "--model", "llama3-8b", "--seq-len", "1048576", "--context", "2"]) == 1
    out = capsys.readouterr().out
    assert "of 74.5 GiB: it does not fit" in out and "because         even the smallest plan exceeds the budget" in out
    assert "each of 2 ranks" in out and "1 x 524288" in out
    assert "614 K" in out and "614K" in guide and "232 K" in out and "232K" in guide
    for shards, kept in (("1", False), ("2", True)):
        assert main(["plan", "--model", "llama3-8b", "--seq-len", "524288", "--host", "60GB", "--shards", shards]) == 0
        assert ("derived" not in capsys.readouterr().out) == kept


def test_time_comes_from_a_machine_file(tmp_path, capsys):
    from undertow.dist.machine import Machine

    rates = {f"{kind}/bfloat16": 1e15 for kind in ("gemm", "attention_forward", "attention_backward")}
    Machine("box", flops=rates).dump(tmp_path / "m.json")
    assert main(["plan", "--model", "qwen3-4b", "--seq-len", "8192", "--machine", str(tmp_path / "m.json")]) == 0
    assert "s a step" in capsys.readouterr().out
    Machine("box").dump(tmp_path / "none.json")
    with pytest.raises(UserError, match="no rate for gemm"):
        main(["plan", "--model", "qwen3-4b", "--seq-len", "8192", "--machine", str(tmp_path / "none.json")])


def test_configs_are_read_and_bad_ones_named(tmp_path):
    config = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=100, intermediate_size=128)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert shape_of(str(tmp_path)) == shape_of(str(tmp_path / "config.json"))
    with pytest.raises(UserError, match="cannot read the model config"):
        shape_of(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="weights, gradients and state take"):
        main(["plan", "--model", "llama3-8b", "--seq-len", "100", "--memory", "16GB"])
    with pytest.raises(UserError, match="no optimizer"):
        main(["plan", "--model", "llama3-8b", "--seq-len", "100", "--optimizer", "magic"])


def test_known_shapes_have_the_parameters_of_their_names():
    for name, billions in {"llama3-8b": 8.03, "qwen3-8b": 8.19, "qwen3-4b": 4.02}.items():
        assert abs(KNOWN[name].parameters / 1e9 - billions) < 0.01


def test_longest_is_the_last_that_fits():
    assert longest(lambda tokens: tokens <= 5000) == 4096
    assert longest(lambda tokens: False) == 0


def test_trainer_callback_gives_the_same_training(family, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    from undertow.parallel.stream.hf_trainer import StreamCallback

    rows = [torch.arange(i, i + 20) % 90 + 3 for i in range(8)]
    data = [{"input_ids": r, "labels": r.masked_fill(torch.arange(20) < i, -100)} for i, r in enumerate(rows)]

    def train(callbacks):
        torch.manual_seed(0)
        model = family("llama")
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3, use_cpu=True,
            report_to=[], save_strategy="no", learning_rate=1e-2, disable_tqdm=True,
            adam_epsilon=1e-3,  # of gradients that are nothing but rounding Adam would make whole steps
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()
        return model

    with pytest.raises(UserError, match="streaming has no option 'chnk'.*write chunk"):
        StreamCallback(chnk=7)
    callback = StreamCallback(chunk=7)
    plain, streamed = train([]), train([callback])
    assert callback.engine is not None and set(callback.engine.report().values()) == {"streamed"}
    assert "forward" not in vars(streamed)
    for (name, a), b in zip(plain.named_parameters(), streamed.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)
