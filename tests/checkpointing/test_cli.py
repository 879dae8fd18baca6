"""`undertow ckpt`: what it prints, its exit codes, and that it changes nothing unless told to."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp

sys.path.insert(0, str(Path(__file__).parent))

from ckpt_job import CHUNK_BYTES, Job

from undertow.__main__ import main as undertow
from undertow.checkpointing.catalogue import entries, locate
from undertow.checkpointing.cli import main
from undertow.checkpointing.diff import compare_checkpoints
from undertow.checkpointing.manifest import COMMIT
from undertow.checkpointing.tensor_stream import pieces
from undertow.dist import progress
from undertow.dist.errors import UserError


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Steps 1, 2, 3 of one job; between 2 and 3 only one element of one tensor and one of another changes."""
    root = tmp_path_factory.mktemp("cli") / "c"
    job = Job(layers=1)
    with job.checkpointer(root, keep=None) as ckpt:
        for step in (1, 2):
            job.advance(step)
            ckpt.save(step)
        ckpt.fence()
        with torch.no_grad():
            job.model[0].weight[3, 5] += 0.5
            job.model[1].running_mean[:2] = torch.tensor([float("nan"), 7.0])
        ckpt.save(3)
        assert all(report.ok for report in ckpt.wait())
    return root


@pytest.fixture
def root(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "c")
    return tmp_path / "c"


def damage(root: Path, step: int) -> None:
    path = root / f"step-{step:09d}" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def names(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_list_shows_what_is_there(root, capsys):
    os.truncate(root / "step-000000002" / "__0_0.distcp", 100)
    (root / "step-000000003" / COMMIT).unlink()
    shutil.copytree(root / "step-000000001", root / ".step-000000009.tmp-0a1b")
    shutil.copytree(root / "step-000000001", root / ".step-000000007.bad-1f")
    before = names(root)
    assert main(["list", str(root)]) == 0
    out = capsys.readouterr().out
    assert "1 whole" in out
    for text in ("whole", "has 100 bytes", "not committed", "being written", "set aside: damaged"):
        assert text in out
    assert names(root) == before


def test_list_of_one_checkpoint_by_its_own_folder_or_another_name(root, capsys):
    shutil.copytree(root / "step-000000002", root / "kept")
    for path in (root / "step-000000002", root / "kept"):
        assert main(["list", str(path)]) == 0
        out = capsys.readouterr().out
        assert "1 whole" in out and "│    2 │" in out
    (root / "kept" / "manifest.json").write_bytes(b"{}")
    assert main(["list", str(root / "kept")]) == 0
    assert "damaged" in capsys.readouterr().out


def test_a_runs_folder_stands_for_its_checkpoints(root, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(root, run / "checkpoints")
    (run / "config.json").write_text("{}")
    assert main(["list", str(run)]) == 0
    assert f"whole in {run / 'checkpoints'}" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["list", "verify", "inspect"])
def test_a_checkpoint_of_dcp_is_called_by_its_name(tmp_path, capsys, verb):
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "dcp")
    assert undertow(["ckpt", verb, str(tmp_path / "dcp")]) == 2
    assert "is a checkpoint of torch.distributed.checkpoint" in capsys.readouterr().err


def test_list_survives_checkpoints_that_vanish(root, monkeypatch):
    from undertow.checkpointing import catalogue

    real = catalogue.read_manifest

    def gone(path):
        shutil.rmtree(path, ignore_errors=True)
        return real(path)

    monkeypatch.setattr(catalogue, "read_manifest", gone)
    assert [entry.state for entry in entries(root)] == ["damaged"] * 3
    assert entries(root) == []


def test_ages_are_never_negative(root):
    assert {entry.age_s for entry in entries(root, now_s=0.0)} == {0.0}
    assert all(entry.age_s > 1e6 for entry in entries(root, now_s=1e12))


def test_verify_newest_step_and_all(root, capsys):
    assert main(["verify", str(root)]) == 0
    assert main(["verify", str(root / "step-000000001")]) == 0
    damage(root, 2)
    before = names(root)
    assert main(["verify", str(root)]) == 0
    assert main(["verify", str(root), "--step", "2"]) == 1
    assert main(["verify", str(root), "--all"]) == 1
    captured = capsys.readouterr()
    assert "step-000000002: DAMAGED: " in captured.out
    assert "is damaged in bytes" in captured.out
    assert "verify step-000000003" in captured.err
    assert names(root) == before


def test_verify_does_not_pass_over_a_damaged_newest(root):
    os.truncate(root / "step-000000003" / "__0_0.distcp", 10)
    assert main(["verify", str(root)]) == 1


def test_diff_counts_and_measures(root, capsys):
    assert main(["diff", str(root), str(root), "--step-a", "2", "--step-b", "2"]) == 0
    assert main(["diff", str(root), str(root), "--step-a", "2", "--step-b", "3"]) == 1
    found = {item.key: item for item in compare_checkpoints(locate(root, 2), locate(root, 3))}
    different = {key for key, item in found.items() if item.kind != "equal"}
    assert different == {"model.0.weight", "model.1.running_mean"}
    weight = found["model.0.weight"]
    assert (weight.count, weight.total, weight.largest) == (1, 272 * 272, pytest.approx(0.5, abs=1e-6))
    mean = found["model.1.running_mean"]
    assert mean.count == 2
    assert mean.largest != mean.largest  # NaN: one side is no number
    assert "model.0.weight" in capsys.readouterr().out


def test_diff_of_other_shapes_and_names(root, tmp_path, capsys):
    other = Job(layers=2, width=280)
    with other.checkpointer(tmp_path / "other") as ckpt:
        ckpt.save(1)
        assert ckpt.wait()[-1].ok
    assert main(["diff", str(root), str(tmp_path / "other")]) == 1
    kinds = {item.key: item.kind for item in compare_checkpoints(locate(root), locate(tmp_path / "other"))}
    assert kinds["model.0.weight"] == "shape or type"
    assert kinds["model.2.weight"] == "only in B"
    assert kinds["optimizer.state.0.weight.exp_avg"] == "only in A"


def sharded(rank: int, world: int, root: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = torch.nn.Linear(61, 301)
    fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    from undertow.checkpointing import Checkpointer

    with Checkpointer(root, model=net, rng=False, chunk_bytes=CHUNK_BYTES) as ckpt:
        ckpt.save(1)
        assert ckpt.wait()[-1].ok


def test_diff_does_not_care_who_wrote_which_part(ranks, tmp_path):
    ranks(3, sharded, str(tmp_path / "three"))
    ranks(2, sharded, str(tmp_path / "two"))
    assert main(["diff", str(tmp_path / "three"), str(tmp_path / "two")]) == 0
    path, manifest = locate(tmp_path / "three")
    torch.manual_seed(0)
    whole = torch.nn.Linear(61, 301).weight
    for budget in (1, 61 * 4 * 7, 10**9):
        got = list(pieces(path, manifest, "model.weight", budget_bytes=budget))
        assert max(piece.nbytes for piece in got) <= max(budget, 61 * 4)
        assert torch.equal(torch.cat(got).view(301, 61), whole)


def test_inspect(root, capsys):
    assert main(["inspect", str(root)]) == 0
    out = capsys.readouterr().out
    for text in ("step 3", "1 rank;", "torch " + torch.__version__, "__0_0.distcp", "model.0.weight", "rng.rank-00000"):
        assert text in out
    assert main(["inspect", str(root), "--filter", "running"]) == 0
    assert "model.0.weight" not in capsys.readouterr().out
    assert main(["inspect", str(root), "--tensor", "model.1.running_mean"]) == 0
    assert "max 7" in (out := capsys.readouterr().out)
    assert "1 of 272 not finite" in out
    assert main(["inspect", str(root), "--json", "--step", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 1


def test_prune_says_first_and_removes_when_told(root, capsys):
    shutil.copytree(root / "step-000000001", root / ".step-000000009.bad-1f")
    before = names(root)
    assert main(["prune", str(root), "--keep", "last=1"]) == 0
    assert "2 would be removed" in capsys.readouterr().out
    assert names(root) == before
    assert main(["prune", str(root), "--keep", "last=1,every=2", "--no-dry-run"]) == 0
    assert [entry.step for entry in entries(root)] == [2, 3, 9]
    assert main(["prune", str(root), "--keep", "last=1", "--aside", "--no-dry-run"]) == 0
    assert [entry.step for entry in entries(root)] == [3]
    assert main(["prune", str(root), "--keep", "last=1", "--no-dry-run"]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_prune_keeps_the_best_by_a_stored_metric(root, capsys):
    from dataclasses import replace

    from undertow.checkpointing.folder import read_manifest
    from undertow.checkpointing.manifest import MANIFEST, commit_bytes

    for step, loss in ((1, 0.5), (2, 0.9), (3, 0.7)):
        path = root / f"step-{step:09d}"
        manifest = read_manifest(path)
        data = replace(manifest, facts={**manifest.facts, "metrics": {"loss": loss}}).dumps()
        (path / MANIFEST).write_bytes(data)
        (path / COMMIT).write_bytes(commit_bytes(data, step, 0.0))
    assert main(["prune", str(root), "--keep", "last=1,best=1:loss", "--no-dry-run"]) == 0
    assert [entry.step for entry in entries(root)] == [1, 3]
    assert "loss 0.5" in capsys.readouterr().out


def test_prune_is_refused_while_a_job_writes(root):
    with Job(seed=9, layers=1).checkpointer(root), pytest.raises(UserError, match="in use by process"):
        main(["prune", str(root), "--keep", "last=1", "--no-dry-run"])
    assert [entry.step for entry in entries(root)] == [1, 2, 3]


def test_watch_looks_as_often_as_told(root, capsys):
    assert main(["watch", str(root), "--interval", "0.01", "--count", "2"]) == 0
    assert capsys.readouterr().out.count("3 whole") == 2  # no terminal: one list after the other


def test_watch_on_a_low_terminal_shows_the_newest(root, monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    for name, value in {"TERM": "xterm", "COLUMNS": "120", "LINES": "8"}.items():
        monkeypatch.setenv(name, value)
    assert main(["watch", str(root), "--interval", "0.01", "--count", "2"]) == 0
    rows = [line for line in out.getvalue().splitlines() if "whole " in line and line.startswith("│")]
    assert "3 whole in" in out.getvalue() and len(rows) >= 2
    assert {row.split("│")[1].strip() for row in rows} == {"2", "3"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_restoring_shows_how_far_it_is_where_that_takes_long(tmp_path, monkeypatch):
    """The clock runs fast: on a terminal bars with the rate, elsewhere plain lines; with the real clock, nothing."""
    job, real = Job(layers=1), time.monotonic

    def clock(speed: float) -> SimpleNamespace:
        return SimpleNamespace(monotonic=lambda: real() * speed)

    with job.checkpointer(tmp_path / "c") as ckpt:
        ckpt.save(1)
        ckpt.wait()
        dcp.save({"model": job.model.state_dict()}, checkpoint_id=tmp_path / "dcp", no_dist=True)
        for terminal, fast in ((True, True), (False, True), (False, False)):
            out = Terminal() if terminal else io.StringIO()
            monkeypatch.setattr(sys, "stderr", out)
            monkeypatch.setenv("TERM", "xterm")
            monkeypatch.setattr(progress, "time", clock(1e6 if fast else 1e-6))
            ckpt.restore()
            ckpt.restore_from(tmp_path / "dcp", names={"optimizer": None})
            for what in ("verify step-000000001", "load step-000000001", "verify dcp", "load dcp"):
                assert (what in out.getvalue()) == fast
            assert ("\x1b[" in out.getvalue()) == terminal
            assert ("done after" in out.getvalue()) == (fast and not terminal)


WRONG = {
    "no such folder": ["list", "/no/such/folder"],
    "no such step": ["inspect", "{root}", "--step", "77"],
    "a step of one checkpoint": ["inspect", "{root}/step-000000001", "--step", "1"],
    "a file": ["verify", "{root}/LATEST"],
    "an empty folder": ["verify", "{empty}"],
    "nothing to verify": ["verify", "{empty}", "--all"],
    "no such tensor": ["inspect", "{root}", "--tensor", "nothing"],
    "a bad rule": ["prune", "{root}", "--keep", "newest=3"],
    "a bad interval": ["watch", "{root}", "--interval", "0"],
    "pruning one checkpoint": ["prune", "{root}/step-000000001", "--keep", "last=1"],
    "no such module": ["export", "{root}", "--module", "nothing", "--out", "{empty}/out"],
    "a bad type": ["export", "{root}", "--dtype", "float33", "--out", "{empty}/out"],
    "a bad size": ["export", "{root}", "--max-shard-size", "big", "--out", "{empty}/out"],
    "a folder that is not empty": ["export", "{root}", "--out", "{root}"],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_one_line_and_exit_code_2(root, tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    before = names(root)
    arguments = [word.format(root=root, empty=tmp_path / "empty") for word in WRONG[name]]
    assert undertow(["ckpt", *arguments]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("undertow ckpt: ")]
    assert len(error) == 1
    assert names(root) == before
    assert not (tmp_path / "empty" / "out").exists()


UNKNOWN = [["bogus"], ["list"], ["verify", "x", "--stpe", "3"], ["inspect", "x", "--step", "a"]]


@pytest.mark.parametrize("arguments", UNKNOWN)
def test_what_the_command_line_does_not_know(arguments, capsys):
    assert main(arguments) == 2
    assert "--help" in capsys.readouterr().err
