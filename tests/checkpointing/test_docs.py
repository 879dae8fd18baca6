"""The examples of docs/checkpointing.md and docs/deepspeed.md run as they stand."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from undertow.__main__ import main

DOCS = Path(__file__).parents[2] / "docs"


def examples(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), flags=re.S)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_checkpointing_guide(folder, capsys):
    first, *others = examples("checkpointing.md", "python")
    exec(first, {})
    assert sorted(path.name for path in (folder / "runs" / "a").glob("step-*"))[-1] == "step-000000020"
    exec(first, {})  # goes on, and has nothing left to do but steps 20 to 29
    for source in others:
        exec(source, {})
    assert "every" in capsys.readouterr().out


def test_its_options_work_together(folder):
    import torch

    from undertow.checkpointing import Checkpointer

    _, _, tiers, preemption, _ = examples("checkpointing.md", "python")
    options: dict = {}
    for source in (tiers, preemption):
        names: dict = {}
        exec(source, names)
        options |= names["options"]
    model = torch.nn.Linear(4, 4)
    with Checkpointer("runs/a", model=model, **options) as ckpt:
        for step in range(3):
            ckpt.step(step)
        ckpt.wait()
    assert {report.tier for report in ckpt.reports if report.ok} == {"host", "disk", "mirror"}


@pytest.mark.parametrize("line", range(7))
def test_its_shell_commands(folder, line, capsys):
    source = examples("checkpointing.md", "python")[0]
    exec(source, {})
    exec(source.replace("runs/a", "runs/b"), {})
    commands = [row.split("#")[0].split() for row in examples("checkpointing.md", "console")[0].splitlines()]
    assert len(commands) == 7 and commands[line][0] == "undertow"
    extra = ["--count", "1"] if "watch" in commands[line] else []
    assert main(commands[line][1:] + extra) in ((0, 1) if "diff" in commands[line] else (0,))
    assert capsys.readouterr().out


def test_the_deepspeed_guide(ranks, folder):
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  # slow to import in each rank

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a build of a minute
    (source,) = examples("deepspeed.md", "python")

    def run(rank, world):
        deepspeed.init_distributed("gloo")
        exec(source, {})
        return (folder / "runs" / "ds" / "latest").read_text()

    assert ranks(2, run) == ["global_step3"] * 2
    assert ranks(2, run) == ["global_step6"] * 2  # it went on
    assert main(["deepspeed", "verify", "runs/ds"]) == 0
