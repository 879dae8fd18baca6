"""The scripts that users copy: each runs as it stands, and in about thirty lines."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import undertow

EXAMPLES = Path(undertow.__file__).parent / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("plain_*.py")), ids=lambda path: path.stem)
def test_they_are_short_and_need_nothing_else_of_the_examples(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 33
    assert set(re.findall(r"undertow\.examples\.(\w+)", source)) <= {path.stem, "lm"}


@pytest.mark.parametrize("name", ["plain_attention", "plain_overlap", "plain_schedule"])
def test_those_of_several_ranks_say_how_they_are_started(name, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as left:
        runpy.run_module(f"undertow.examples.{name}", run_name="__main__")
    source = (EXAMPLES / f"{name}.py").read_text().splitlines()[0]
    assert str(left.value) == f"start it by: torchrun --nproc-per-node 2 -m undertow.examples.{name}"
    assert source.endswith(f'   {str(left.value).removeprefix("start it by: ")}"""')


def test_checkpoint(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plain_checkpoint", str(tmp_path)])
    runpy.run_module("undertow.examples.plain_checkpoint", run_name="__main__")
    straight = capsys.readouterr().out.splitlines()
    runpy.run_module("undertow.examples.plain_checkpoint", run_name="__main__")
    assert capsys.readouterr().out.splitlines() == straight[-1:]  # from step 40 on, to the same digits


def test_stream(capsys):
    names = runpy.run_module("undertow.examples.plain_stream", run_name="__main__")
    plan = names["stream"].last_plan
    assert plan.tokens == 2048 and plan.device_bytes <= 12 << 20
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0]


def run_schedule(rank, world):
    dist.init_process_group = dist.destroy_process_group = lambda *names: None  # these ranks are joined already
    names = runpy.run_module("undertow.examples.plain_schedule", run_name="__main__")
    return names["out"].tolist()


def test_schedule(ranks):
    assert ranks(2, run_schedule) == [[[1.0] * 3] * 2] * 2


def run_parallel(rank, world):
    dist.init_process_group = dist.destroy_process_group = lambda *names: None  # these ranks are joined already
    attention = runpy.run_module("undertow.examples.plain_attention", run_name="__main__")
    overlap = runpy.run_module("undertow.examples.plain_overlap", run_name="__main__")
    return attention["errors"], overlap["error"], overlap["team"].explain()


def test_attention_and_overlap(ranks):
    """float64: sums of some hundred products of size 1, in another order."""
    for errors, error, explained in ranks(2, run_parallel):
        assert len(errors) == 4 and max(errors) < 1e-12 and error < 1e-10
        assert "matmul_reduce_scatter M=128" in explained and "still measuring" not in explained


@pytest.mark.slow
def test_message_passing():
    """Under MPI, with the preload; the launcher that belongs to this Python's MPI."""
    pytest.importorskip("mpi4py", reason="needs mpi4py: pip install 'undertow[mpi]'")
    launcher = Path(sys.executable).parent / "mpirun"
    program = [str(launcher if launcher.exists() else "mpirun"), "-n", "2", sys.executable, "-m"]
    command = [sys.executable, "-m", "undertow", "mpi", "run", "--", *program, "undertow.examples.plain_mpi"]
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environment = os.environ | allowed | {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks exchanged four columns" in done.stdout
