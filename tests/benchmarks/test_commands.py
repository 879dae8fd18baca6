"""Every benchmark as its command, in its smallest form: each arm once against the reference, nothing timed.

`undertow bench NAME --check` for those that the harness times; a few cells for those that time themselves. A benchmark
that cannot run here is listed instead, and NEEDS says why. Documented filters fit a case.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import typer
from typer.testing import CliRunner

from undertow.__main__ import main
from undertow.benchmarks import checkpoint_stall, halo3d, halo3d_load, kill_resume, overlap_timeline
from undertow.benchmarks.case import Context
from undertow.benchmarks.discover import FOLDER, listed, load
from undertow.benchmarks.mpi_datatypes import installed, label

pytestmark = pytest.mark.slow
ROOT = FOLDER.parent

# Name → (ranks, the filter that leaves its smallest case): `undertow bench NAME --check --quick --filter FILTER`.
CHECKED = {
    "schedules": (2, "all-gather, 64"),
    "token_ring": (2, "8 of 8 key heads, 400 MB/s"),
    "checkpoint_flush": (1, "21 M"),
    "checkpoint_phases": (1, "5 M"),
    "checkpoint_restore": (1, "21 M, warm"),
    "checkpoint_stall": (1, "21 M, host every 1"),
    "checkpoint_threads": (1, "2 layers"),
    "checksum": (1, "1 MiB"),
    "copies": (1, "host to host, 1.0 MiB"),
    "overlap": (1, "no link"),  # starts its ranks itself
    "stream_cpu": (1, "1024 tokens"),
    "t3_paper": (1, "T-NLG TP-8 IP"),
}
# Those that need what is not here: (ranks to list the cases with, why, what runs their arms otherwise).
NEEDS = {
    "overlap_cuda": (1, "one GPU: its link is pinned host memory", "tests/comms/test_overlap_cuda.py"),
    "overlap_gpus": (2, "several GPUs", "tests/benchmarks/test_gpu_programs.py"),
    "ring_gpus": (2, "several GPUs", "tests/benchmarks/test_gpu_programs.py"),
    "checkpoint_ranks": (2, "several GPUs", "tests/benchmarks/test_gpu_programs.py"),
    "stream_ranks": (2, "several GPUs", "tests/benchmarks/test_gpu_programs.py"),
}
# Those with a test of their own: they time themselves, or need an MPI.
ELSEWHERE = {
    "attention_product": "tests/benchmarks/test_attention_programs.py",
    "halo3d": "test_the_halo_and_its_model",
    "mpi_datatypes": "test_datatypes_of_one_kind",
    "mpi_rounds": "test_rounds_that_pass",
    "mpi4py_suite": "tests/mpi_interpose/test_mpi4py_suite.py",  # whole it takes minutes; there a part of it runs
    "token_ring_rivals": "test_one_way_beside_the_rivals",
}


@pytest.fixture(autouse=True)
def closed():
    """What a command leaves to the end of its process."""
    yield
    checkpoint_stall._close_jobs()
    if dist.is_initialized():
        dist.destroy_process_group()


def bench(*arguments: object) -> int:
    return main(["bench", *map(str, arguments)])


def _on_a_rank(rank: int, world: int, arguments: tuple[str, ...]) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        return bench(*arguments), said.getvalue()


def run(world: int, ranks, *arguments: str) -> str:
    """What rank 0 says; the command must end well on every rank."""
    if world == 1:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert bench(*arguments) == 0, said.getvalue()
        return said.getvalue()
    found = ranks(world, _on_a_rank, arguments)
    assert [code for code, _ in found] == [0] * world, found
    return found[0][1]


def test_every_benchmark_is_here():
    assert sorted([*CHECKED, *NEEDS, *ELSEWHERE]) == sorted(listed())
    for where in [*ELSEWHERE.values(), *(where for _, _, where in NEEDS.values())]:
        assert (ROOT / where).exists() if "/" in where else where in globals()


@pytest.mark.parametrize("name", NEEDS)
def test_one_that_cannot_run_here_lists_its_cases(name, ranks):
    world, *_ = NEEDS[name]
    said = run(world, ranks, name, "--list", "--quick")
    assert len(said.splitlines()) >= 1 and all(line.strip() for line in said.splitlines())
    if name == "overlap_cuda" and not torch.cuda.is_available():
        assert bench(name, "--check", "--quick") == 2  # and says which benchmark runs here


def test_one_way_beside_the_rivals(ranks, tmp_path):
    run(2, ranks, "token_ring_rivals", "--quick", "--filter", "undertow ring_kv", "--output", str(tmp_path))
    rows = json.loads((tmp_path / "token_ring_rivals.json").read_text())["rows"]
    assert len(rows) == 4 and not any(row["reason"] for row in rows)


@pytest.mark.parametrize("name", CHECKED)
def test_every_arm_is_right(name, ranks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    world, only = CHECKED[name]
    said = run(world, ranks, name, "--check", "--quick", "--filter", only)
    lines = [line for line in said.splitlines() if only in line]
    assert sum(line.endswith(": right") for line in lines) >= 2, said
    assert list(tmp_path.iterdir()) == []


def test_torchrun_starts_the_ranks(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "undertow"]
    command += ["bench", "schedules", "--check", "--quick", "--filter", "all-gather, 64"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(": right") == 2, done.stdout  # rank 0 alone speaks


def _mpi() -> str:
    names = sorted(label(mpi) for mpi in installed())
    if not names:
        pytest.skip("needs an MPI with a compiler wrapper: `make system` brings two")
    return names[0]


def test_datatypes_of_one_kind(tmp_path, monkeypatch, capsys):
    """The exit status says whether a cell lost, which on a busy machine proves nothing."""
    name = _mpi()
    found = [mpi for mpi in installed() if label(mpi) == name]
    monkeypatch.setattr("undertow.benchmarks.mpi_datatypes.installed", lambda: found)
    arguments = ("--quick", "--rounds", "6", "--filter", "pack vector-b16", "--output", tmp_path)
    assert bench("mpi_datatypes", *arguments) in (0, 1)
    data = json.loads(next(tmp_path.glob(f"mpi_datatypes_{name}_*.json")).read_text())
    assert data["cells"] and all("pack vector-b16" in f"{cell['use']} {cell['name']}" for cell in data["cells"])
    assert "no cell slower in mode auto" in capsys.readouterr().out


def test_rounds_that_pass(tmp_path):
    """Its verdict on nanoseconds proves nothing on a busy machine."""
    assert bench("mpi_rounds", "--quick", "--filter", _mpi(), "--output", tmp_path) in (0, 1)
    found = json.loads(next(tmp_path.glob("mpi_rounds_*.json")).read_text())
    assert [cell["mpi"] for cell in found["cells"]] == [_mpi()] and all(cell["starts"] for cell in found["cells"])


def test_the_halo_and_its_model(capsys):
    assert bench("halo3d", "--check", "--quick", "--filter", _mpi()) == 0
    assert capsys.readouterr().out.count(": right") == 2 * 3
    for result in sorted((FOLDER / "results").glob("mpi_datatypes_openmpi-5*.json"))[-1:]:
        assert halo3d.main([str(result)]) == 0
        assert "64^3" in capsys.readouterr().out


def test_a_halo_beside_other_programs(tmp_path, capsys):
    """`python -m undertow.benchmarks.halo3d_load`; its times prove nothing here, that it starts and reads back does."""
    kept = tmp_path / "kept.json"
    words = ["--mpi", _mpi(), "--loads", "niced", "--starts", "2", "--turns", "1", "--output", str(kept)]
    assert halo3d_load.main(words) == 0
    (cell,) = json.loads(kept.read_text())["cells"]
    assert len(cell["starts"]) == 2 and all(one["library"] > 0 for one in cell["starts"])
    table = capsys.readouterr().out
    assert halo3d_load.main(["--read", str(kept)]) == 0 and capsys.readouterr().out == table


def test_one_kill_and_the_timeline(tmp_path, capsys):
    """`python -m undertow.benchmarks.kill_resume --trials 200` with one trial, in this process, whose forks need import
    nothing; and the picture of overlapped calls."""
    program = typer.Typer()
    program.command()(kill_resume.main)
    done = CliRunner().invoke(program, ["--trials", "1", "--ranks", "1", "--out", str(tmp_path / "runs")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["bit_identical"] == 1
    picture = tmp_path / "images" / "timeline.png"
    assert overlap_timeline.main([str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def _filters() -> list[tuple[str, str, str]]:
    """(where it stands, benchmark, filter), of the guides, the benchmarks' own words and the commands in results."""
    places = [*ROOT.glob("README.md"), *ROOT.glob("docs/*.md"), *FOLDER.glob("*.py"), *FOLDER.glob("results/*")]
    found = []
    for place in places:
        if place.suffix in (".md", ".py") or place.name.endswith(".json"):
            for command in re.findall(r"undertow bench (\w+[^\n`]*--filter [^\n`]*)", place.read_text()):
                words = shlex.split(command.split('",')[0].replace("[", " ").replace("]", " ").split("     ")[0])
                found.append((place.name, words[0], words[words.index("--filter") + 1]))
    return sorted(set(found))


@pytest.mark.parametrize(("where", "name", "only"), _filters())
def test_a_documented_filter_leaves_a_case(where, name, only, ranks, monkeypatch):
    benchmark = load(name)
    if only in ("TEXT", "FILTER"):
        return
    if benchmark.program or name == "halo3d":
        cases = [] if benchmark.program else [case.name for case in benchmark.cases(Context())]
        if name != "token_ring_rivals" and only not in "".join([*map(label, installed()), *cases]):
            pytest.skip(f"needs an MPI whose name holds '{only}'")
        return
    world = {**CHECKED, **NEEDS}[name][0]
    if name in NEEDS or "nvidia" in where:  # with GPUs its cases are others
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        assert any(only in case.name for case in benchmark.cases(Context(world_size=world)))
    else:
        assert run(world, ranks, name, "--list", "--filter", only).strip()
