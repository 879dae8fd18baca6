"""`undertow workloads` as typed: what it prints, what it leaves behind, what it refuses."""

from __future__ import annotations

import itertools
import json

import pytest

from undertow.__main__ import main
from undertow.examples.workloads import series
from undertow.examples.workloads.contract import PRESETS
from undertow.examples.workloads.journal import trajectory
from undertow.examples.workloads.registry import MODULES, get

QUICK = ["--set", "steps=6", "--set", "checkpoint_every=2"]


def test_the_list_names_every_workload(capsys):
    assert main(["workloads", "list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in MODULES)


def test_a_run_leaves_its_result_and_can_be_resumed(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["workloads", "train", "stable-rps", "--out", str(out), *QUICK]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["updates"] == 6 and result["evidence"]["checkpoint"]["commits"] == 4
    assert (out / "losses.png").stat().st_size > 10_000
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 6
    assert "checkpoint: commits 4" in capsys.readouterr().out
    assert main(["workloads", "train", "stable-rps", "--out", str(out), *QUICK]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(["workloads", "train", "stable-rps", "--out", str(out), *QUICK, "--resume"]) == 0
    again = json.loads((out / "result.json").read_text())
    assert again["updates"] == 0 and again["weights"] == result["weights"]
    assert main(["workloads", "train", "stable-rps", "--out", str(out), "--resume", "--seed", "1"]) == 2


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "nothing"], "no workload 'nothing'"),
        (["train", "stable-rps", "--variant", "y"], "no variant 'y'"),
        (["train", "stable-rps", "--preset", "y"], "--preset y"),
        (["train", "stable-rps", "--set", "steps"], "--set steps"),
        (["train", "stable-rps", "--stream", "--out", "run"], "stable-rps does not use streamed"),
        (["claim", "stable-rps", "--seeds", "0"], "--seeds 0"),
        (["claim", "stable-rps", "--minutes", "0"], "--minutes 0"),
        (["claim", "thoughts", "--variant", "trained"], "no variant 'trained' of thoughts at preset ci"),
        (["compare", "--preset", "y"], "--preset y"),
    ],
)
def test_what_cannot_be_run_is_one_clear_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["workloads", *words]) == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


def test_a_run_ends_with_what_is_claimed_of_it(tmp_path, capsys):
    assert main(["workloads", "train", "thoughts", "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "two layers and D thoughts solve every depth" in printed and "holds" in printed
    rivals = printed.partition("`undertow workloads claim thoughts --preset ci --device cpu`")[2]
    assert "one path is no substitute" in rivals
    assert main(["workloads", "train", "thoughts", "--out", str(tmp_path / "few"), "--set", "graphs=3"]) == 0
    assert "solve every depth" not in capsys.readouterr().out  # claims are about the presets as they are


@pytest.mark.parametrize("name", MODULES)
def test_the_method_is_the_first_variant_of_a_preset(name):
    methods = {preset: get(name).method(preset) for preset in PRESETS}
    if name == "thoughts":
        assert methods == {"ci": "constructed", "small": "constructed", "gpu": "trained"}
    assert set(methods.values()) <= {claim.variant for claim in get(name).claims}


def test_a_comparison_writes_table_and_result(tmp_path, capsys):
    out = tmp_path / "claims"
    assert main(["workloads", "claim", "thoughts", "--seeds", "2", "--out", str(out)]) == 0
    table, result = (out / "table.md").read_text(), json.loads((out / "result.json").read_text())
    assert len(result["claims"]) == 2 and all(len(claim["values"]) == 2 for claim in result["claims"])
    for claim in result["claims"]:
        assert claim["claim"]["text"] in table and claim["verdict"] in table
    assert "one path is no substitute" in capsys.readouterr().out
    assert (out / "scores.png").stat().st_size > 10_000
    assert main(["workloads", "table", str(out), "--out", str(tmp_path / "joined")]) == 0
    joined = json.loads((tmp_path / "joined" / "result.json").read_text())
    assert joined["claims"] == result["claims"] and joined["runs"] == result["runs"]
    assert main(["workloads", "table", str(tmp_path), "--out", str(tmp_path / "none")]) == 2
    assert "holds no comparison" in capsys.readouterr().err


def spent_after(asked: int):
    """A clock whose time is up when it has been looked at `asked` times."""

    count = itertools.count(1)
    return lambda budget: next(count) > asked


@pytest.mark.slow
@pytest.mark.parametrize("asked", [130, 301, 302])  # in the first run, before the second, before its first update
def test_a_comparison_stops_in_time_and_goes_on_where_it_was(asked, tmp_path, capsys, monkeypatch):
    """Bit-identical to one that was not stopped; till then its claims are open, in the table and by exit status."""
    words = ["workloads", "claim", "stable-rps", "--variant", "full", "--variant", "stable x1", "--out"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*words, str(whole)]) == 3  # the rivals that were not asked for
    with monkeypatch.context() as patch:
        patch.setattr(series.Budget, "up", spent_after(asked))
        assert main([*words, str(cut), "--minutes", "5"]) == 3
    printed = capsys.readouterr()
    assert "stopped after --minutes 5; the same command with --resume goes on" in printed.err
    continuity = json.loads((cut / "result.json").read_text())["claims"][0]
    assert continuity["holds"] is False and continuity["verdict"].startswith("open: waits for stable x1 (seed 0)")
    assert continuity["verdict"] in (cut / "table.md").read_text()
    assert main([*words, str(cut)]) == 2  # holds a run already
    assert main([*words, str(cut), "--resume"]) == 3
    runs = [json.loads((folder / "result.json").read_text())["runs"] for folder in (cut, whole)]
    for mine, peace in zip(*runs):
        assert mine["ended"] and mine["updates"] == mine["losses"] == 300
        assert all(mine[part] == peace[part] for part in ("variant", "weights", "metrics", "updates"))
        assert mine["evidence"]["checkpoint"]["commits"] >= peace["evidence"]["checkpoint"]["commits"]
    for name in ("full", "stable-x1"):
        paths = [folder / "stable-rps" / "seed-0" / name / "metrics.jsonl" for folder in (cut, whole)]
        assert trajectory(paths[0]) == trajectory(paths[1])


def test_two_parts_of_a_comparison_make_one_table(tmp_path, capsys):
    """As they are made on two machines, or in two calls of a machine that is lent for minutes."""
    parts = []
    for name in ("constructed", "one path"):
        parts.append(str(tmp_path / name))
        assert (
            main(
                ["workloads", "compare", "thoughts", "--preset", "ci", "--seeds", "1", "--variant", name]
                + ["--out", parts[-1]]
            )
            == 0
        )
    path = json.loads((tmp_path / "one path" / "result.json").read_text())["claims"]
    assert all(claim["verdict"].startswith("open: waits for constructed") for claim in path)
    assert main(["workloads", "table", *parts, "--out", str(tmp_path / "both")]) == 0
    both = json.loads((tmp_path / "both" / "result.json").read_text())["claims"]
    assert [claim["verdict"] for claim in both] == ["holds", "holds"]
