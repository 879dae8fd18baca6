"""The command as a user types it: listing, a small run, its files, the comparison, and clear refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from undertow.__main__ import main
from undertow.benchmarks import checksum, cli
from undertow.benchmarks.case import Arm, Benchmark, Case, Trial
from undertow.benchmarks.discover import FOLDER, listed, load
from undertow.benchmarks.report import Report


@pytest.fixture
def small(monkeypatch):
    """The checksum benchmark on buffers so small that a test may run it."""
    monkeypatch.setattr(checksum, "MIB", 2**13)
    monkeypatch.setattr(checksum, "IN_CACHE_BYTES", 2**12)


def bench(*arguments: object) -> int:
    return main(["bench", *map(str, arguments)])


def test_no_name_lists_the_benchmarks(capsys):
    assert bench() == 0
    out = capsys.readouterr().out
    for name, line in listed().items():
        assert any(text.startswith(name) and line in text for text in out.splitlines())


@pytest.mark.parametrize("name", sorted(listed()))
def test_every_benchmark_loads_under_its_own_name(name):
    """Loading imports no rival, so a listed benchmark always says what it would compare."""
    benchmark = load(name)
    assert benchmark.name == name and benchmark.claim and callable(benchmark.cases)
    assert listed()[name].strip()


def test_modules_of_the_harness_are_no_benchmarks():
    assert "harness" not in listed() and (FOLDER / "harness.py").exists()


def test_a_run_writes_what_it_measured(small, tmp_path, capsys):
    assert bench("checksum", "--quick", "--rounds", 6, "--filter", "64", "--output", tmp_path, "--no-plot") == 0
    names = sorted(path.suffix for path in tmp_path.iterdir())
    assert names == [".json", ".md"]
    data = json.loads(next(tmp_path.glob("checksum_*.json")).read_text())
    assert data["command"] == "undertow bench checksum --rounds 6 --seed 0 --quick --filter 64"
    assert {"hardware", "torch", "python", "undertow", "date", "xxhash"} <= set(data["facts"])
    assert all(row["wrong"] == 0 and len(row["samples_s"]) == 6 for row in data["rows"] if row["seconds"])
    assert {row["role"] for row in data["rows"]} >= {"plain", "again", "ours", "hardware", "rival"}
    out = capsys.readouterr().out
    assert "xxh3_128" in out and "(A/A)" in out and str(tmp_path) not in json.dumps(data)


def test_a_wrong_answer_fails_the_command(small, tmp_path, monkeypatch):
    monkeypatch.setattr(checksum.xxhash, "xxh3_128_digest", lambda data: b"\0" * 16)
    assert bench("checksum", "--quick", "--rounds", 6, "--output", tmp_path, "--no-plot") == 1
    page = next(tmp_path.glob("*.md")).read_text()
    assert "not timed" in page


def test_a_check_times_nothing_and_finds_a_wrong_answer(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert bench("checksum", "--quick", "--check") == 0
    assert "xxh3_128: right" in capsys.readouterr().out
    monkeypatch.setattr(checksum.xxhash, "xxh3_128_digest", lambda data: b"\0" * 16)
    assert bench("checksum", "--quick", "--check") == 1
    assert "xxh3_128: the answer is wrong" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_compare_with_a_former_run(small, tmp_path, capsys):
    for folder in ("old", "new"):
        assert bench("checksum", "--quick", "--rounds", 6, "--output", tmp_path / folder, "--no-plot") == 0
    old, new = (next((tmp_path / folder).glob("*.json")) for folder in ("old", "new"))
    capsys.readouterr()
    arguments = ("--read", new, "--compare", old, "--output", tmp_path / "read", "--no-plot")
    assert bench("checksum", *arguments) == 0
    out = capsys.readouterr().out
    assert "| case | arm | time before | time now |" in out and "noise" in out
    assert next((tmp_path / "read").glob("*.json")).read_text() == new.read_text()


def test_the_plot_is_a_png(small, tmp_path):
    pytest.importorskip("matplotlib")
    assert bench("checksum", "--quick", "--rounds", 6, "--output", tmp_path) == 0
    picture = next(tmp_path.glob("*.png"))
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    assert f"]({picture.name})" in next(tmp_path.glob("*.md")).read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["checksm"], "no benchmark 'checksm'; expected one of"),
        (["checksum", "--rounds", "5"], "--rounds 5; expected at least 6"),
        (["checksum", "--filter", "no such"], "leaves no case"),
        (["checksum", "--minutes", "0"], "--minutes 0; expected more than 0"),
        (["mpi_datatypes", "--minutes", "1"], "times itself"),
        (["mpi_datatypes", "--list"], "undertow bench mpi_datatypes --quick"),
        (["checksum", "--compare", "absent.json"], "absent.json"),
        (["checksum", "--machine", "absent.json"], "undertow probe"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert bench(*arguments) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_time_that_is_up_cuts_rounds_and_then_cases(tmp_path, monkeypatch):
    """The first of two cases uses up all of the time: it gets the fewest rounds, and the other none."""
    seconds = [0.0]
    monkeypatch.setattr(cli, "time", SimpleNamespace(monotonic=lambda: seconds[0]))

    def slow() -> int:
        seconds[0] += 1
        return 1

    def a_case(name: str) -> Case:
        arms = [Arm("plain", slow), Arm("ours", slow)]
        return Case(name, lambda: Trial(arms, lambda: 1), "plain", "ours", warm_ups=1)

    about = Benchmark("small", "a claim", lambda context: [a_case("first"), a_case("second")], rounds=1000)
    report = cli._Run(about, False, 1000, "", 0, "", 10.0).report(tmp_path)
    assert report is not None and len(report.rows[0].samples_s) == 6
    assert report.not_compared() == ["small (second): the time of --minutes was up"]
    kept = [Report.load(path) for path in tmp_path.iterdir()]  # after the first case, and there was no later one
    assert [[row.case for row in each.rows] for each in kept] == [["first"] * 3]
    assert "--minutes 0.166667" in report.command


def test_an_unwritable_folder_is_one_clear_line(small, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert bench("checksum", "--quick", "--rounds", 6, "--output", tmp_path / "file", "--no-plot") == 2
    assert "cannot write to" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "in the way"


def test_cases_are_listed_without_running(capsys):
    assert bench("checksum", "--list") == 0
    assert capsys.readouterr().out.split("\n")[:2] == ["256 KiB", "1 MiB"]


def test_a_benchmark_runs_as_a_module_from_the_root():
    """`python -m benchmarks.checksum`, as in a checkout; in the wheel the parent folder of the package serves."""
    folder = Path(FOLDER).parent
    command = [sys.executable, "-m", "benchmarks.checksum", "--list"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "256 KiB" in done.stdout, done.stderr


def test_a_signal_ends_a_run_after_its_round_and_what_was_measured_is_written(tmp_path, monkeypatch):
    calls = [0]

    def signalled() -> int:
        calls[0] += 1
        if calls[0] == 3:  # checked, timed, timed
            os.kill(os.getpid(), signal.SIGTERM)
        return 1

    def a_case(name: str) -> Case:
        arms = [Arm("plain", lambda: 1), Arm("ours", signalled)]
        return Case(name, lambda: Trial(arms, lambda: 1), "plain", "ours", warm_ups=0)

    about = Benchmark("small", "a claim", lambda context: [a_case("first"), a_case("second")], rounds=1000)
    monkeypatch.setattr("undertow.benchmarks.discover.load", lambda name: about)
    before = signal.getsignal(signal.SIGTERM)
    assert bench("small", "--output", tmp_path, "--no-plot") == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    (kept,) = [Report.load(path) for path in tmp_path.glob("*.json")]
    assert [len(row.samples_s) for row in kept.rows if row.case == "first"] == [2, 2, 2]
    assert kept.not_compared() == ["small (second): stopped before"]
