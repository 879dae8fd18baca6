"""The examples of docs/huggingface.md run as they stand, twice: from nothing, and from their own checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install 'undertow[hf]'")

import transformers  # noqa: E402

from undertow.checkpointing.tag_folder import problems  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"


@pytest.fixture
def examples(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    transformers.utils.logging.disable_progress_bar()
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)


def long_rows(rank, world, out):
    from undertow.examples import context_parallel_trainer  # torchrun -m undertow.examples.context_parallel_trainer

    context_parallel_trainer.main(out, ranks=world, length=65, steps=10)


@pytest.mark.slow
def test_context_parallel(examples, ranks):
    assert "ContextParallelCallback(trainer, ranks=2)" in examples[1]
    ranks(2, long_rows, "runs/long")
    assert sorted(path.name for path in Path("runs/long").iterdir()) == ["checkpoint-10", "checkpoint-5"]
    assert problems(Path("runs/long/checkpoint-10")) == []


@pytest.mark.slow
def test_the_trainer(examples):
    names: dict = {}
    exec(examples[0], names)
    folders = sorted(path.name for path in Path("runs/hf").iterdir())
    assert folders == ["checkpoint-10", "checkpoint-5"]
    assert all(problems(Path("runs/hf") / name) == [] for name in folders)
    exec(examples[0].replace("max_steps=10", "max_steps=15"), names)
    assert names["trainer"].state.global_step == 15
    assert sorted(path.name for path in Path("runs/hf").iterdir()) == ["checkpoint-10", "checkpoint-15"]


def test_accelerate(examples):
    names: dict = {}
    exec(examples[2], names)
    exec(examples[2].replace("20)", "22)"), names)
    assert names["step"] == 21 and [report.step for report in names["ckpt"].reports] == [20]
