"""The "undertow" section read and explained from the shell, and streaming switched on by it under real DeepSpeed."""

from __future__ import annotations

import json
import os

import pytest
import torch

from undertow.__main__ import main

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
    assert main(["deepspeed", "check", config(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "DeepSpeed's own" in out and "off: stream" in out


WRONG = {
    "misspelt": ({"strean": True}, "write 'stream'"),
    "key": ({"stream": {"bugdet": "1GB"}}, "write 'budget'"),
    "size": ({"stream": {"budget": "much"}}, "much"),
    "type": ({"stream": 3}, "true, false or an object"),
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
