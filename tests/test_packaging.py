"""What is shipped: setup.cfg lists every package, the wheel holds every file, the documents' links lead somewhere."""

from __future__ import annotations

import configparser
import fcntl
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from undertow.mpi_interpose import gpu_build

ROOT = Path(__file__).resolve().parents[1]
NOT_SHIPPED = {"tests", "build", "docs", "runs"}


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def package_folders() -> list[Path]:
    """Folders with an __init__.py, relative to the root; hidden folders and what the wheel leaves out not counted."""
    rooms = [f for f in ROOT.iterdir() if f.is_dir() and f.name not in NOT_SHIPPED and f.name[0] not in "._"]
    return sorted([Path(), *(p.parent.relative_to(ROOT) for room in rooms for p in room.rglob("__init__.py"))])


def python_files() -> list[Path]:
    found = sorted(path.relative_to(ROOT) for folder in package_folders() for path in (ROOT / folder).glob("*.py"))
    return [path for path in found if path != Path("setup.py")]  # makes the wheel, is no part of it


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built once by way of the source distribution, without a network and outside dist/; `.ci/test` names
    the one that it has made of this checkout."""
    if os.environ.get("UNDERTOW_WHEEL"):
        return zipfile.ZipFile(os.environ["UNDERTOW_WHEEL"])
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base  # which all workers of a run have
    folder = shared / "wheels"
    with (shared / "wheels.lock").open("w") as lock:  # builds beside each other would write to one build/ and egg-info
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not list(folder.glob("*.whl")):
            command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_every_folder_with_an_init_is_a_listed_package():
    listed = setup_cfg()["options"]["packages"].split()
    assert sorted(listed) == sorted(".".join(("undertow", *folder.parts)) for folder in package_folders())


def test_every_room_with_modules_has_an_init():
    rooms = {f for f in package_folders() if f.parts}
    for folder in {path.parent.relative_to(ROOT) for room in rooms for path in (ROOT / room).rglob("*.py")}:
        assert (ROOT / folder / "__init__.py").exists(), f"{folder} has modules and no __init__.py: it would vanish"


def test_every_module_is_in_the_wheel(wheel):
    missing = {str(Path("undertow") / path) for path in python_files()} - set(wheel.namelist())
    assert not missing


def test_package_data_is_in_the_wheel(wheel):
    names = set(wheel.namelist())
    data = setup_cfg()["options.package_data"]
    assert "py.typed" in data["undertow"]
    for package, patterns in data.items():
        folder = ROOT / Path(*package.split(".")[1:])
        for pattern in re.split(r"[,\s]+", patterns):
            for path in folder.glob(pattern):
                assert path.is_dir() or str(Path("undertow") / path.relative_to(ROOT)) in names, f"{path} is left out"


def test_sources_of_other_languages_are_in_the_wheel(wheel):
    """C, CUDA, Fortran and batch files beside the modules: forgotten in package_data, they vanish from the wheel."""
    names = set(wheel.namelist())
    for folder in {f.parts[0] for f in package_folders() if f.parts} - {"benchmarks"}:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".f90", ".sbatch", ".in"}:
                assert str(Path("undertow") / path.relative_to(ROOT)) in names, f"{path} is left out"


def test_the_wheel_holds_nothing_else(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"undertow", next(top for top in tops if top.endswith(".dist-info"))}
    for unwanted in ("undertow/tests/", "undertow/build/", "undertow/docs/", "undertow/runs/", "undertow/.venv/"):
        assert not any(name.startswith(unwanted) for name in wheel.namelist()), unwanted


def test_the_preloads_of_fixed_abis_are_in_the_wheel_ready_made(wheel):
    """Then the wheel is one for this platform and any Python; where there is no compiler it is a pure one."""
    folder = "undertow/mpi_interpose/prebuilt/"
    held = {name.removeprefix(folder) for name in wheel.namelist() if name.startswith(folder)}
    if shutil.which("g++") is None:
        assert not held and wheel.filename.endswith("-py3-none-any.whl")
        return
    names = [f"libundertow_mpi_{name}" for name in ("abi", "mpich", "core")]
    assert held == {f"{name}.{suffix}" for name in names for suffix in ("so", "txt")}
    assert re.search(r"-py3-none-(manylinux_2_\d+|linux)_\w+\.whl$", wheel.filename)
    assert not any(name == "undertow/setup.py" for name in wheel.namelist())
    if shutil.which("ptxas") and shutil.which("fatbinary"):  # the device's kernels as machine code, too
        assert all(gpu_build.MAGIC in wheel.read(f"{folder}{name}.so") for name in names[:2])


def test_documented_extras_exist():
    extras = set(setup_cfg()["options.extras_require"])
    assert {"test", "mpi", "hf", "deepspeed", "cuda13", "bench", "plots"} <= extras
    for path in documents():
        for names in re.findall(r"undertow\[([\w,\s-]+)\]", path.read_text()):
            assert set(re.split(r"\s*,\s*", names)) <= extras, f"{path}: undertow[{names}]"
    for path in python_files():
        for name in re.findall(r"extra=\"([\w-]+)\"", (ROOT / path).read_text()):
            assert name in extras, f"{path}: extra={name!r}"


def documents() -> list[Path]:
    folders = ("docs", "benchmarks", "checkpointing", "comms", "parallel", "examples", "slurm", "mpi_interpose")
    return sorted([*ROOT.glob("*.md"), *(path for folder in folders for path in (ROOT / folder).rglob("*.md"))])


def test_relative_links_resolve():
    broken = []
    for path in documents():
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        targets = [t for t in re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", t)]
        broken += [f"{path}: {t}" for t in targets if not (path.parent / t.split("#")[0]).exists()]
    assert not broken


def test_the_documents_name_real_make_targets():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"demo", "test", "quick", "check", "wheel", "clean"} <= targets
    for path in documents():
        named = set(re.findall(r"`make ([a-z]+)[` ]", path.read_text()))
        assert named <= targets, f"{path}: {named - targets}"


@pytest.mark.parametrize("script", ["run", "setup", "test", "check", "wheel", "in-venv", "system-packages"])
def test_scripts_are_executable_and_parse(script):
    path = ROOT / ".ci" / script
    assert path.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", str(path)], timeout=240).returncode == 0


@pytest.mark.parametrize("forbidden", ["1", ""])
def test_scripts_keep_bytecode_in_the_build_folder_where_it_may_not_lie_beside_the_sources(forbidden):
    """Else every process compiles what it imports: an import of torch costs twice as much."""
    ask = "import sys; print(sys.dont_write_bytecode, sys.pycache_prefix)"
    command = f'. "{ROOT / ".ci" / "env.sh"}" && "{sys.executable}" -c "{ask}"'
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPYCACHEPREFIX"}
    done = subprocess.run(
        ["bash", "-c", command], env={**env, "PYTHONDONTWRITEBYTECODE": forbidden}, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.stdout.split() == ["False", str(ROOT / "build" / "bytecode") if forbidden else "None"], done.stderr


def test_unlisted_skips_fail_in_ci(tmp_path):
    """The judge of skips, on a JUnit file that pytest itself writes."""
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_gpu(): pytest.skip('needs a CUDA device')\n"
        "def test_slurm(): pytest.skip('needs sbatch; apt-get install slurm-wlm')\n"
        "@pytest.mark.xfail\ndef test_hope(): assert False\n"
        "def test_good(): pass\n"
    )
    junit = tmp_path / "junit.xml"
    folder = str(tmp_path)
    pytest_run = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        "/dev/null",
        "--rootdir",
        folder,
        "--confcutdir",
        folder,
        folder,
    ]
    assert subprocess.run([*pytest_run, "--junitxml", str(junit)], capture_output=True, timeout=280).returncode == 0
    judge = [sys.executable, str(ROOT / ".ci" / "skips.py"), str(junit)]
    done = subprocess.run(judge, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "skipped: 3 tests, of which 2" in done.stdout
    assert "test_slurm: needs sbatch" in done.stdout and "test_gpu" not in done.stdout
