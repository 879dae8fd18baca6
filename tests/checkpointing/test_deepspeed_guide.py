"""The example of docs/deepspeed.md runs as it stands, and goes on when it is run again."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from undertow.__main__ import main

GUIDE = Path(__file__).parents[2] / "docs" / "deepspeed.md"


def test_the_guide(ranks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  # slow to import in each rank

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a build of a minute
    (source,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.S)

    def run(rank, world):
        deepspeed.init_distributed("gloo")
        exec(source, {})
        return (tmp_path / "runs" / "ds" / "latest").read_text()

    assert ranks(2, run) == ["global_step3"] * 2
    assert ranks(2, run) == ["global_step6"] * 2  # it went on
    assert main(["deepspeed", "verify", "runs/ds"]) == 0
