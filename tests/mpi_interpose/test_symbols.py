"""An MPI that lacks functions which the preload was built for."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from mpis import Install, find, start
from test_programs import compiled, taken

from undertow.mpi_interpose import cli
from undertow.mpi_interpose.signatures import OWN
from undertow.mpi_interpose.toolchain import probe


@pytest.fixture
def mpich() -> Install:
    install = find("mpich-wheel")
    if install is None:
        pytest.skip("the wheel mpich is not installed")
    return install


def without(library: Path, names: list[str], folder: Path) -> Path:
    """A copy of libmpi in which the functions (and their profiling names, which end alike) have other names."""
    data = library.read_bytes()
    for name in names:
        data, n = re.subn(rb"MPI(_" + name.encode() + rb"\0)", rb"XXX\1", data)
        assert n, name
    folder.mkdir()
    (folder / library.name).write_bytes(data)
    return folder


def run_with(mpich: Install, folder: Path, tmp_path: Path) -> tuple[str, Path]:
    program, report = compiled(mpich, "rules.c", tmp_path), tmp_path / "report"
    report.unlink(missing_ok=True)
    listed = subprocess.run(["ldd", probe(mpich.mpicc).library], capture_output=True, text=True, check=True).stdout
    needed = dict.fromkeys(str(Path(file).parent) for file in re.findall(r"=> (\S+/\S+)", listed))
    path = ":".join([str(folder), *needed])  # the copy would look for its own libraries beside itself
    return start(mpich, 2, ["env", f"LD_LIBRARY_PATH={path}", program], "force", report), report


def test_an_mpi_that_lacks_functions_is_served_with_the_rest(mpich: Install, tmp_path: Path) -> None:
    lacking = ["Neighbor_alltoallw", "Exscan", "Pack_c", "Testsome"]
    folder = without(Path(probe(mpich.mpicc).library), lacking, tmp_path / "less")
    out, report = run_with(mpich, folder, tmp_path)
    assert "ok" in out and "nothing" not in out
    assert str(folder) in Path(f"{report}.0.json").read_text()  # it was this library that served the run
    counts = taken(report, [0, 1])
    assert counts["MPI_Isend"] > 0 and counts["MPI_Pack"] > 0 and counts["MPI_Bcast"] > 0


def test_an_mpi_that_lacks_what_we_need_is_left_alone(mpich: Install, tmp_path: Path) -> None:
    real = Path(probe(mpich.mpicc).library)
    folder = without(real, ["Type_get_true_extent_x"], tmp_path / "less")
    out, report = run_with(mpich, folder, tmp_path)
    assert "ok" in out and out.count("lacks MPI_Type_get_true_extent_x") == 2
    assert not list(tmp_path.glob("report*"))


def test_the_doctor_says_what_is_missing(mpich: Install) -> None:
    mpi = probe(mpich.mpicc)
    assert cli.missing(mpi) == "nothing is missing"
    less = replace(mpi, symbols=tuple(s for s in mpi.symbols if s != "MPI_Exscan" and not s.endswith("_c")))
    assert "MPI_Exscan" in cli.missing(less) and "large-count" in cli.missing(less)
    assert "handed on" in cli.missing(replace(mpi, symbols=tuple(s for s in mpi.symbols if s != f"MPI_{OWN[0]}")))
