"""The benchmarks of one process's checkpoints on a tiny model: every arm that runs here reads back what it saved, and
when it is durable is seen by the same rule."""

from __future__ import annotations

import os
import threading

import pytest
import torch
import typer
from typer.testing import CliRunner

from undertow.benchmarks import (
    checkpoint_durable,
    checkpoint_every,
    checkpoint_flush,
    checkpoint_stall,
    checkpoint_steps,
)
from undertow.benchmarks.case import Measured
from undertow.benchmarks.checkpoint_job import Job, Method, Size
from undertow.dist.errors import UserError
from undertow.dist.machine import Machine
from undertow.examples.lm import LMConfig

TINY = Size("tiny", LMConfig(layers=1, width=64, heads=2, kv_heads=2, hidden=128, vocab=256), 1, 8, 2)


@pytest.fixture(autouse=True)
def closed(monkeypatch):
    monkeypatch.setattr(checkpoint_stall, "init_process_group", lambda *unused, **named: None)
    yield
    checkpoint_stall._close_jobs()


def measured(arm) -> Measured:
    arm.prepare()
    found = arm.run()
    assert found.answer == 0, arm.name
    return found


@pytest.mark.parametrize("kinds", ["disk", "end to end", "host", "stall"])
def test_every_arm_reads_back_and_is_seen_durable(tmp_path, kinds):
    trial = checkpoint_stall._trial(TINY, torch.device("cpu"), tmp_path, 2, kinds)
    for arm in trial.arms:
        if arm.unavailable or "process" in arm.name or "NVRx" in arm.name:  # those start processes, for seconds
            continue
        for _ in range(2):
            extras = measured(arm).extras
            if arm.name != "no checkpoints" and extras["saves"]:
                assert 0 < extras["written_s"] <= extras["durable_s"]


def test_saves_that_follow_one_another_and_the_raw_disk(tmp_path):
    try:
        os.close(os.open(tmp_path / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o600))
    except OSError:
        raw = False  # tmpfs has none
    else:
        raw = True
    machine = Machine("a disk of 1 GB/s", disks={"write_direct": 1e9})
    for arm in checkpoint_flush._trial(TINY, torch.device("cpu"), tmp_path, machine, 3, rivals=True).arms:
        if "undertow" in arm.name:
            nbytes = checkpoint_stall._jobs[-1].state_bytes
            assert arm.predicted_s == pytest.approx(3 * nbytes / 1e9)
        if raw or "raw" not in arm.name:
            assert (measured(arm).seconds or 0) > 0


class Late(Method):
    """Written when it is let go."""

    def __init__(self, folder) -> None:
        self.path, self.gone = folder, threading.Event()

    def written_sign(self):
        return self.gone.is_set


def test_a_save_is_durable_no_sooner_than_it_is_written(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_bytes(b"1")
    synced, real = [], os.fsync
    monkeypatch.setattr(
        checkpoint_durable.os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))
    )
    late = Late(tmp_path)
    watch = checkpoint_durable.Watch(late, 0.0)
    assert watch.written_s == 0 and not synced
    late.gone.set()
    watch.result()
    assert 0 < watch.written_s <= watch.durable_s
    assert set(synced) == {str(p) for p in (tmp_path, tmp_path.parent, tmp_path / "inner", tmp_path / "inner" / "file")}


def test_a_save_that_never_ends_is_an_error(tmp_path):
    with pytest.raises(TimeoutError, match="no sign of a complete save"):
        checkpoint_durable.Watch(Late(tmp_path), 0.0).result(timeout_s=0.05)


def test_the_steps_after_a_save_are_compared_with_their_likes():
    plain = checkpoint_steps.Arm("plain", steps_ms=[[10.0, 10.0], [11.0, 10.0], [10.0, 12.0]])
    arm = checkpoint_steps.Arm("undertow", steps_ms=[[13.0, 10.0], [14.0, 10.0], [13.0, 12.0]])
    assert checkpoint_steps.over_ms(arm, plain) == [3.0, 0.0]
    assert checkpoint_steps.stall_text(arm, plain) == "3.0 (few rounds)"
    arm.steps_ms, plain.steps_ms = 2 * arm.steps_ms, 2 * plain.steps_ms
    assert checkpoint_steps.stall_text(arm, plain) == "3.0 [3.0, 3.0]"


def test_steps_after_a_save_of_every_arm_and_an_arm_whose_file_is_wrong(tmp_path, monkeypatch):
    job = Job(TINY, torch.device("cpu"), tmp_path)
    checkpoint_stall.keep_open(job)
    load = checkpoint_steps.Undertow.load

    def spoilt(method):
        return {key: value + ("host" in str(method.folder)) for key, value in load(method).items()}

    monkeypatch.setattr(checkpoint_steps.Undertow, "load", spoilt)
    arms = {arm.name: arm for arm in checkpoint_steps.run(job, ["ours", "arena", "parked"], 3, 2, 60.0, 0)}
    assert "tensors are wrong" in arms.pop("undertow host, 0.4 parked").note
    assert "tensors are wrong" in arms.pop("undertow host").note
    for arm in arms.values():
        assert [len(row) for row in arm.steps_ms] == [3, 3] and min(map(min, arm.steps_ms)) > 0, arm
        assert all(0 < cost["written_s"] <= cost["durable_s"] for cost in arm.costs)
    page = checkpoint_steps.write(tmp_path, "tiny", {"facts": {"hardware": "a", "date": "b"}, "steps": 3, "seed": 0,
                                  "state_bytes": 1}, list(arms.values()), ["ours"])  # fmt: skip
    assert "| **undertow disk, arena 0.25, 0.75 parked** |" in page.read_text()
    assert "| **undertow disk, arena 0.25** |" in page.read_text() and page.with_suffix(".png").stat().st_size


def test_training_with_a_save_every_few_steps_end_to_end(tmp_path, monkeypatch):
    job = Job(TINY, torch.device("cpu"), tmp_path)
    checkpoint_stall.keep_open(job)
    monkeypatch.setattr(checkpoint_every.TorchSave, "load", lambda method: {})
    ways = ("undertow disk, 0.4 parked", "undertow host, 0.4 parked", "torch.save")
    began = job.step
    cells = checkpoint_every.run(job, [1, 50], 2, 1, ways=ways)
    found = {(cell.arm, cell.every): cell for cell in cells}
    for cell in cells:
        if cell.arm == "torch.save":
            assert cell.note.startswith("failed: KeyError") and not cell.ratios
        else:
            assert len(cell.ratios) == 2 and min(cell.ratios) > 0
    assert found[ways[0], 1].intervals == [6, 6] and found[ways[1], 50].saves == [1, 1]
    # a check of each way; then in two rounds, for two ways, the plain steps before a cell and one interval more in it
    plain = checkpoint_every.BEFORE + checkpoint_every.STEPS_OF_PLAIN
    assert job.step - began == len(ways) + 2 * 2 * (2 * plain + 7 * 1 + 2 * 50)
    page = checkpoint_every.write(tmp_path, cells, {"facts": {"hardware": "a", "date": "b"}, "step_ms": {"tiny": 1.0}})
    assert "| tiny | **undertow host, 0.4 parked** |" in page.read_text()


def test_a_long_sample_ends_after_its_first_timed_interval(tmp_path, monkeypatch):
    job = Job(TINY, torch.device("cpu"), tmp_path)
    checkpoint_stall.keep_open(job)
    monkeypatch.setattr(checkpoint_every, "LONG_S", 0.0)
    began = job.step
    cells = checkpoint_every.run(job, [1], 2, 1, ways=("undertow host",))
    assert cells[0].intervals == cells[0].saves == [1, 1]
    assert job.step - began == 1 + 2 * (checkpoint_every.BEFORE + checkpoint_every.STEPS_OF_PLAIN + 2)


def test_a_cell_says_how_many_saves_were_made():
    cell = checkpoint_every.Cell("tiny", 5, "undertow", [0.5, 0.25], [3, 2], [3, 3])
    assert cell.text() == "0.375 (0.250 to 0.500), 5 of 6 saves"
    assert checkpoint_every.Cell("tiny", 5, "rival", note="not installed").text() == "not installed"


@pytest.mark.parametrize(("program", "arms"), [(checkpoint_steps, "--arms ours"), (checkpoint_every, "--ways disk")])
def test_the_programs_write_where_they_are_told_and_refuse_what_they_do_not_know(tmp_path, monkeypatch, program, arms):
    """python -m undertow.benchmarks.checkpoint_steps, and the same of checkpoint_every."""
    monkeypatch.setattr(program, "init_process_group", lambda *unused, **named: None)
    monkeypatch.setattr(program, "SIZES", {"tiny": TINY})
    size, result = "--size" if program is checkpoint_steps else "--sizes", tmp_path / "found"
    app = typer.Typer()
    app.command()(program.main)
    more = "--steps 2" if program is checkpoint_steps else "--every 2 --rival-rounds 1"
    words = [size, "tiny", *arms.split(), *more.split(), "--rounds", "1", "--folder", tmp_path, "--result", result]
    ran = CliRunner().invoke(app, list(map(str, words)))
    assert ran.exit_code == 0, ran.output
    assert "**undertow disk (fsync)**" in ran.output and len(list(result.glob("*.md"))) == 1
    assert not list(tmp_path.glob("undertow-bench-*"))
    for wrong in ([size, "huge"], [size, "tiny", arms.split()[0], "nothing"]):
        refused = CliRunner().invoke(app, wrong)
        assert isinstance(refused.exception, UserError) and "expected" in str(refused.exception), refused.output
