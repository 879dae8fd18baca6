"""SIGKILL of a rank at seeded moments of the main job; `benchmarks/kill_resume.py` does the same hundreds of times."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from undertow.benchmarks import kill_resume
from undertow.benchmarks.kill_resume import Job, Moment, moment, reference, run_trial, summary

SEED = 7


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Half a megabyte of the standard library: reading all of it would take longer than the runs."""
    folder, total = tmp_path_factory.mktemp("data"), 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        (folder / path.name).write_bytes(path.read_bytes())
        total += path.stat().st_size
        if total > 500_000:
            break
    return folder


@pytest.mark.slow
def test_kills_and_resumed_runs_are_bit_identical(tmp_path, data):
    """Seeded moments of each kind (two in a stage of a save, one in a step, one outside) and four named ones."""
    kill_resume.prepare()
    options = ["--recipe", "tiny", "--steps", "20", "--data", str(data)]
    run_s = reference(tmp_path, options, 2, 280)
    begun = kill_resume.spans_begun(tmp_path, 2)
    moments = [moment(SEED, trial, begun=begun, run_s=run_s) for trial in (0, 1, 2, 7)]
    moments += [Moment(0, "flush", 2, 0.0), Moment(1, "flush", 3, 0.001)]
    moments += [Moment(0, "commit", 3, 0.002), Moment(1, "fsync", 1, 0.0)]
    rows = [run_trial(trial, when, tmp_path, options, 2, 280) for trial, when in enumerate(moments)]
    assert all(row.good for row in rows), [row for row in rows if not row.good]
    found = summary(rows)
    assert found["inside_a_save"] >= 4
    assert found["inside_a_flush"] >= 2
    assert len({row.resumed_from for row in rows}) > 2


@pytest.mark.slow
def test_a_kill_at_three_ranks(tmp_path, data):
    """From three ranks on, sums in another order would differ in the last bits."""
    kill_resume.prepare()
    options = ["--recipe", "tiny", "--steps", "12", "--batch", "6", "--data", str(data)]
    reference(tmp_path, options, 3, 280)
    row = run_trial(0, Moment(2, "flush", 2, 0.0), tmp_path, options, 3, 280)
    assert row.struck
    assert row.good, row
    assert row.resumed_from == 0 or row.resumed_from == 5


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_resumes(tmp_path, data):
    kill_resume.prepare()
    options = ["--recipe", "tiny", "--steps", "12", "--data", str(data)]
    reference(tmp_path, options, 2, 280)
    mine = [*options, "--out", str(tmp_path / "trial-000")]
    first = Job(mine, 2, tmp_path / "log", Moment(0, "commit", 2, 0.0))
    first.wait(280)
    again = Job([*mine, "--resume"], 2, tmp_path / "log", Moment(1, "restore", 1, 0.0))
    again.wait(280)
    assert -9 in again.codes.values()
    Job([*mine, "--resume"], 2, tmp_path / "log").succeed(280)
    assert kill_resume.compare(tmp_path / "reference", tmp_path / "trial-000").identical


def test_moments_are_a_function_of_seed_and_trial():
    begun = [{**dict.fromkeys(kill_resume.STAGES, 5), "step": 30}, {**dict.fromkeys(kill_resume.STAGES, 4), "step": 30}]
    del begun[1]["vote"]
    drawn = [moment(3, trial, begun=begun, run_s=2.0) for trial in range(400)]
    assert drawn == [moment(3, trial, begun=begun, run_s=2.0) for trial in range(400)]
    assert {when.rank for when in drawn} == {0, 1}
    assert {when.inside for when in drawn} == {"", "step", *kill_resume.STAGES}
    assert all(1 <= when.nth <= begun[when.rank][when.inside] for when in drawn if when.inside)
    assert all(0 < when.delay_s < 2.0 for when in drawn if not when.inside)
