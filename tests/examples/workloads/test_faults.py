"""A workload whose process is killed in the middle of a task ends as if nothing had happened."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from undertow.__main__ import main
from undertow.checkpointing.folder import read_manifest
from undertow.checkpointing.restore import Reader
from undertow.examples.workloads import faults
from undertow.examples.workloads.journal import Journal, trajectory

GUARDED = ["--variant", "worked, guarded", "--set", "steps=140", "--set", "checkpoint_every=20"]


# The victim, which from the update of the kill on waits for it: so quick a run would often be over before it comes.
WAITING = """
import sys, time
from undertow.__main__ import main
from undertow.examples.workloads.journal import Journal
note = Journal.__call__
def waiting(self, step, loss):
    note(self, step, loss)
    time.sleep(5 if step >= 108 else 0)
Journal.__call__ = waiting
sys.exit(main(["workloads", "train", *sys.argv[1:]]))
"""


@pytest.fixture
def waiting_victim(monkeypatch):
    start = faults.start

    def start_waiting(name, out, options, log):
        if out.name != "killed" or "--resume" in options:
            return start(name, out, options, log)
        with log.open("ab") as stream:
            command = [sys.executable, "-c", WAITING, name, "--out", str(out), *options]
            return subprocess.Popen(command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL)

    monkeypatch.setattr(faults, "start", start_waiting)


@pytest.mark.slow
def test_killed_in_a_task_that_was_rolled_back(tmp_path: Path, capsys, waiting_victim):
    """Seven spans of 20 updates: three for the addition, one for each task. With this tolerance task 0 counts as bad
    and is learned again from update 60 on; the kill comes in task 2, so the resumed process must know of the roll-back.
    """
    out = tmp_path / "run"
    words = ["workloads", "kill", "trace", "--at", "108", "--out", str(out), *GUARDED, "--set", "tolerance=-2.0"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "killed by SIGKILL" in printed and printed.count("identical") == 3
    whole, killed = (json.loads((out / folder / "result.json").read_text()) for folder in ("whole", "killed"))
    assert whole["evidence"]["checkpoint"]["rollbacks"] == 1 and whole["updates"] == 160
    ((died, resumed),) = re.findall(r"after update (\d+), went on from update (\d+)", printed)
    assert 108 <= int(died) < 139 and int(resumed) % 20 == 0  # which save was committed by then is the disk's affair
    assert killed["updates"] >= 140 - int(resumed) > 0


CURRICULUM = {
    "nodes": 12,
    "edges": 18,
    "depth": 3,
    "width": 32,
    "graphs": 8,
    "batch": 8,
    "steps": 48,
    "stage_updates": 12,
}


@pytest.mark.slow
def test_killed_in_the_middle_of_a_curriculum(tmp_path: Path, capsys):
    """Stages begin at updates 0, 12, 24 and 36; killed in the second, the next process must know where it is: what a
    batch asks depends on the stage."""
    out, options = tmp_path / "run", {**CURRICULUM, "checkpoint_every": 4}
    words = [word for name, value in options.items() for word in ("--set", f"{name}={value}")]
    assert main(["workloads", "kill", "thoughts", "--variant", "trained", "--at", "18", "--out", str(out), *words]) == 0
    printed = capsys.readouterr().out
    assert "killed by SIGKILL" in printed and printed.count("identical") == 3
    ((died, resumed),) = re.findall(r"after update (\d+), went on from update (\d+)", printed)
    assert 18 <= int(died) < 47 and int(resumed) % 4 == 0
    path = out / "killed" / "checkpoints" / f"step-{48:09d}"
    assert Reader(path, read_manifest(path)).object("curriculum") == {"stage": 4}


def test_a_journal_survives_a_torn_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    with Journal(path) as note:
        note(0, 3.0)
        note(1, 2.0)
    path.write_text(path.read_text() + '{"step": 2, "lo')
    with Journal(path) as note:
        note(1, 1.5)
        note(2, 1.0)
    assert trajectory(path) == {0: 3.0, 1: 1.5, 2: 1.0}
    assert trajectory(tmp_path / "none") == {}


@pytest.mark.parametrize("step", ["0", "700"])
def test_a_kill_outside_the_run_is_refused(step, tmp_path: Path, capsys):
    assert main(["workloads", "kill", "trace", "--at", step, "--out", str(tmp_path / "run")]) == 2
    assert "updates between 1 and 699" in capsys.readouterr().err
