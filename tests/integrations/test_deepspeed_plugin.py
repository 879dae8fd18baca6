"""The "undertow" section read and explained from the shell, and streaming switched on by it under real DeepSpeed."""

from __future__ import annotations

import json
import os

import pytest
import torch

from undertow.__main__ import main
from undertow.dist.errors import UserError

pytestmark = pytest.mark.slow  # together more than ten seconds


def config(tmp_path, **section) -> str:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": section.pop("stage", 0)}, "undertow": section}))
    return str(path)


def test_check_says_what_will_happen(tmp_path, capsys):
    assert main(["deepspeed", "check", config(tmp_path, stage=2, checkpoint={"lazy": False}, stream=True)]) == 0
    out = capsys.readouterr().out
    for text in (
        "ZeRO stage 2",
        "copied before save_checkpoint returns",
        "streamed backpropagation: within what is free",
    ):
        assert text in out
    assert main(["deepspeed", "check", config(tmp_path, stage=3, context_parallel=2, stream=True)]) == 0
    out = capsys.readouterr().out
    assert "2 neighbouring ranks share each sequence" in out and "chunks planned" in out
    assert main(["deepspeed", "check", config(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "DeepSpeed's own" in out and "off: stream" in out


WRONG = {
    "misspelt": ({"strean": True}, "write 'stream'"),
    "key": ({"stream": {"bugdet": "1GB"}}, "write 'budget'"),
    "size": ({"stream": {"budget": "much"}}, "much"),
    "type": ({"stream": 3}, "true, false or an object"),
    "overlap": ({"overlap": True}, "ZeRO partitions and gathers weights by itself"),
    "ranks": ({"context_parallel": True}, "the number of ranks that share a sequence"),
    "a layout": (
        {"context_parallel": {"ranks": 2, "layout": "zig"}},
        "layout' is 'zig'; expected one of contiguous, zigzag",
    ),
    "a schedule": (
        {"context_parallel": {"ranks": 2, "backward_schedule": "x"}},
        "expected one of auto, predicted, ring_kv",
    ),
    "context": ({"context_parallel": {"rank": 2}}, "write 'ranks'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_sections_are_one_line_and_exit_code_2(tmp_path, capsys, name):
    section, message = WRONG[name]
    assert main(["deepspeed", "check", config(tmp_path, **section)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_wrong_files(tmp_path, capsys):
    (tmp_path / "broken.json").write_text("{")
    for path in (tmp_path / "broken.json", tmp_path / "none.json"):
        assert main(["deepspeed", "check", str(path)]) == 2
        assert "cannot read" in capsys.readouterr().err
    assert main(["deepspeed", "verify", str(tmp_path)]) == 2
    assert "holds no DeepSpeed checkpoint" in capsys.readouterr().err
    assert main(["deepspeed", "convert", str(tmp_path), str(tmp_path)]) == 2
    assert "holds files" in capsys.readouterr().err


def job(rank, world, stage, section, steps=2):
    import deepspeed

    import undertow.integrations.deepspeed_plugin  # noqa: F401
    from undertow.examples.lm import ByteLM, LMConfig

    deepspeed.init_distributed("gloo")
    torch.manual_seed(3)
    model = ByteLM(LMConfig(layers=2, width=32, heads=2, kv_heads=1, hidden=64))
    options = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "undertow": section,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=options)
    losses = []
    for step in range(steps):
        tokens = torch.randint(0, 256, (1, 41), generator=torch.Generator().manual_seed(10 * step + rank))
        loss = engine(tokens[:, :-1], tokens[:, 1:])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    stream = model.__dict__.get("_undertow_stream_engine")
    chunks = None if stream is None else -(-stream.last_plan.tokens // stream.last_plan.chunk)
    engine.destroy()
    return losses, chunks


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_streaming_is_switched_on_and_changes_nothing(ranks, stage):
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  # slow to import in each rank
    import deepspeed.runtime.zero.stage3  # noqa: F401

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a build of a minute
    plain = ranks(2, lambda rank, world: job(rank, world, stage, {}))
    streamed = ranks(2, lambda rank, world: job(rank, world, stage, {"stream": {"chunk": 16}}))
    for (one, none), (two, chunks) in zip(plain, streamed):
        assert none is None and chunks == 3
        assert all(abs(a - b) < 2e-5 for a, b in zip(one, two))  # fp32 sums in another order


def spread(rank, world, cases, shared):
    """Losses and trained weights of one accumulated update; `shared` neighbouring ranks have the same rows."""
    import deepspeed
    from transformers import AutoModelForCausalLM, Qwen3Config

    import undertow.integrations.deepspeed_plugin  # noqa: F401

    deepspeed.init_distributed("gloo")
    found = []
    if shared > 1:
        with pytest.raises(UserError, match="leave training_data out"):
            options = {"train_micro_batch_size_per_gpu": 1, "undertow": {"context_parallel": shared}}
            deepspeed.initialize(model=torch.nn.Linear(1, 1), training_data=[0], config=options)
    for stage, section in cases:
        torch.manual_seed(3)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
        small = Qwen3Config(vocab_size=64, num_attention_heads=4, num_key_value_heads=2, **sizes)
        model = AutoModelForCausalLM.from_config(small)
        options = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "undertow": section,
        }
        engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=options)
        losses = []
        for part in range(2):
            ids = torch.randint(0, 64, (1, 19), generator=torch.Generator().manual_seed(10 * part + rank // shared))
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            weights = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy().copy()
        stream = model.__dict__.get("_undertow_stream_engine")
        assert (stream is not None and stream.last_plan is not None) == ("stream" in section)
        engine.destroy()
        found.append((losses, weights))
    return found


def test_context_parallel_under_every_stage(ranks):
    """Two ranks with one sequence make the update of one rank with it."""
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    pytest.importorskip("transformers", reason="needs transformers")
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    import deepspeed.runtime.zero.stage3  # noqa: F401

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    [[(alone, weights)]] = ranks(1, spread, [(0, {})], 1)
    both, chunks = ({"context_parallel": 2, "stream": stream} for stream in (True, {"chunk": 4}))
    cases = [(0, {"context_parallel": 2}), (1, both), (2, chunks), (3, chunks)]
    for mine in ranks(2, spread, cases, 2):
        for losses, trained in mine:  # float32 sums in another order; an axis counted twice is an error of 1e-2
            assert losses == pytest.approx(alone, abs=2e-5)
            assert abs(trained - weights).max() < 1e-5
