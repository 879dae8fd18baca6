"""docs/checkpointing.md does what it shows."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from undertow.checkpointing import Checkpointer, Frequency, Mirror
from undertow.checkpointing.cost import predict
from undertow.dist.machine import Machine

GUIDE = Path(__file__).parents[2] / "docs" / "checkpointing.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.S)


def test_the_programs_of_the_guide_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(PROGRAMS) == 3
    names: dict = {}
    for program in PROGRAMS:
        exec(compile(program, str(GUIDE), "exec"), names)
    assert sorted(path.name for path in Path("runs/a").glob("step-*")) == [
        "step-000000000",
        "step-000000010",
        "step-000000020",
    ]
    assert names["start"] == 0
    assert torch.equal(names["weight"], names["model"].weight)
    assert "SavePlan rank 0/1" in (said := capsys.readouterr().out)
    assert "no partner copies: all ranks (1)" in said
    exec(compile(PROGRAMS[0], str(GUIDE), "exec"), names)
    assert names["start"] == 20


def test_the_table_of_options_names_real_ones():
    table = GUIDE.read_text().split("## Options")[1].split("## Restart")[0]
    options = re.findall(r"^\| `(\w+)` \|", table, re.M)
    import inspect

    real = {name for name, p in inspect.signature(Checkpointer).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert set(options) == real - {"rng", "chunk_bytes", "ops"}


MACHINE = Machine("box", copies={"d2h_pinned": 50e9, "host_one_thread": 8e9}, disks={"write_direct": 1e9})


def test_predictions_follow_the_rates():
    one = predict(4_000_000_000, MACHINE, cuda=True, window_s=0.1)
    assert (one.copy_s, one.stall_s, one.durable_s, one.interval_s) == (0.08, 0.0, 4.0, 4.0)
    assert predict(4_000_000_000, MACHINE, cuda=True).stall_s == pytest.approx(0.08)
    assert predict(4_000_000_000, MACHINE, cuda=False).copy_s == pytest.approx(0.5)
    eager = predict(4_000_000_000, MACHINE, cuda=True, window_s=1, eager_bytes=500_000_000)
    assert eager.stall_s == pytest.approx(0.01)
    small = predict(4_000_000_000, MACHINE, cuda=True, window_s=1, arena_bytes=1_000_000_000)
    assert small.stall_s == pytest.approx(2.0)  # three of four seconds of writing, less the window
    parked = predict(4_000_000_000, MACHINE, cuda=True, parked_bytes=3_000_000_000, arena_bytes=500_000_000)
    assert parked.stall_s == pytest.approx(0.5)  # half a second of writing, which is longer than the copy of a quarter
    assert predict(4_000_000_000, MACHINE, cuda=True, parked_bytes=3_000_000_000).stall_s == pytest.approx(0.02)
    assert predict(4_000_000_000, MACHINE, cuda=True, ranks_per_disk=8).interval_s == pytest.approx(32)
    device = replace(MACHINE, copies=MACHINE.copies | {"d2d": 2e12})
    beside = predict(4_000_000_000, device, cuda=True, window_s=0.1)
    assert beside.stall_s == pytest.approx(0.001)  # what fits into the window still reads the device's memory
    assert predict(4_000_000_000, device, cuda=False).stall_s == predict(4_000_000_000, MACHINE, cuda=False).stall_s


def test_what_was_not_measured_is_not_guessed():
    one = predict(10**9, Machine("blank"), cuda=True)
    assert (one.copy_s, one.stall_s, one.durable_s, one.interval_s) == (None,) * 4
    assert "not measured" in str(one)


def test_explain_names_tiers_cost_and_reason(tmp_path):
    model = torch.nn.Linear(512, 512)
    mirror = Mirror(tmp_path / "far", every=5)
    with Checkpointer(tmp_path / "near", model=model, every=Frequency(first=1), mirror=mirror, rng=False) as ckpt:
        for step in range(3):
            ckpt.step(step)
            ckpt.wait()
        ckpt.save(99)
        text = ckpt.explain(MACHINE)
    assert all(part in text for part in ("1.0 MiB", "far", "near", "predicted on box", "step", "steps (", "mirror"))
