"""The fixed ABIs: our declarations against the MPIs' own headers, what is prebuilt, a machine without a compiler."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mpis import PROGRAMS, Install, environment, find, need

from undertow.mpi_interpose import build, compile, launch, standard, toolchain
from undertow.mpi_interpose.chosen import choose
from undertow.mpi_interpose.compile import PREBUILT, Unit
from undertow.mpi_interpose.errors import InterposeError


def own_wrapper(flavour: str, name: str) -> str:
    wrapper = Path(need(name).mpicc)
    wrapper = wrapper.with_name("mpicc_abi") if flavour == "abi" else wrapper
    if not wrapper.exists():
        pytest.skip(f"no {wrapper.name} beside {name}")
    return str(wrapper)


@pytest.mark.parametrize("flavour, name", [("abi", "mpich-wheel"), ("mpich", "mpich-wheel"), ("mpich", "debian-mpich")])
def test_our_constants_are_those_of_the_mpis_own_header(flavour: str, name: str, tmp_path: Path) -> None:
    """Compiled with that MPI's mpi.h and run: each constant as a number, sizes, places of a status's fields."""
    known = {f"MPI_{one}": number for one, number in standard.CONSTANTS[flavour].items()}
    known |= {f"MPI_{one}": number for one, (_, number) in standard.HANDLES[flavour].items()}
    known |= {f"MPI_{one}": number for one, (_, number) in standard.ADDRESSES[flavour].items()}
    if name == "debian-mpich":
        del known["MPI_COMBINER_VALUE_INDEX"]  # MPI 4.1
    fields = ("MPI_SOURCE", "MPI_TAG", "MPI_ERROR")
    lines = [f'  printf("{one} %ld\\n", (long)({one}));' for one in known]
    lines += [f'  printf("{one} %ld\\n", (long)offsetof(MPI_Status, {one}));' for one in fields]
    sizes = ("MPI_Status", "MPI_Aint", "MPI_Count", *(f"MPI_{kind}" for kind in standard.HANDLE_TYPES))
    lines += [f'  printf("sizeof({one}) %ld\\n", (long)sizeof({one}));' for one in sizes]
    body = "\n".join(["#include <mpi.h>", "#include <stddef.h>", "#include <stdio.h>", "int main(void) {", *lines])
    (tmp_path / "theirs.c").write_text(body + "\n  return 0;\n}\n")
    words = [own_wrapper(flavour, name), "-w", str(tmp_path / "theirs.c"), "-o", str(tmp_path / "theirs")]
    subprocess.run(words, check=True, env=environment(need(name)))
    found = subprocess.run([str(tmp_path / "theirs")], capture_output=True, text=True, check=True).stdout
    theirs = dict(line.split(" ") for line in found.splitlines())
    assert {one: int(theirs[one]) for one in known} == known

    places = [part.split("[")[0] for part in standard.STATUS[flavour]]
    assert {one: int(theirs[one]) for one in fields} == {one: 4 * places.index(one) for one in fields}
    handle = standard.HANDLE_BYTES[flavour]
    ours = {"MPI_Status": standard.STATUS_BYTES[flavour], "MPI_Aint": 8, "MPI_Count": 8}
    ours |= {f"MPI_{kind}": 8 if kind in standard.ALWAYS_STRUCT else handle for kind in standard.HANDLE_TYPES}
    assert {one: int(theirs[f"sizeof({one})"]) for one in ours} == ours


@pytest.mark.parametrize("flavour", ["abi", "mpich"])
def test_our_header_declares_all_that_we_call_as_the_mpi_does(flavour: str, tmp_path: Path) -> None:
    """Both headers in one unit would collide, so each function's type is printed from either and compared."""
    symbols = sorted(standard.SYMBOLS_NEEDED)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mpi.h").write_text(standard.header(flavour))
    include = [w for w in toolchain.show(own_wrapper(flavour, "mpich-wheel")) if w.startswith(("-I", "-D"))]
    text = "#include <mpi.h>\n#include <cstdio>\n#include <typeinfo>\nint main() {\n"
    text += "\n".join(f'std::printf("{one} %s\\n", typeid(decltype({one})).name());' for one in symbols) + "\n}\n"
    (tmp_path / "types.cc").write_text(text)
    names = []
    for place, flags in (("ours", [f"-I{tmp_path / 'ours'}"]), ("theirs", [*include, "-DMPICH_SKIP_MPICXX"])):
        target = tmp_path / f"types-{place}"
        command = [compile.compiler(), "-w", *flags, str(tmp_path / "types.cc"), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True)
        said = subprocess.run([str(target)], capture_output=True, text=True, check=True).stdout
        names.append({a: _plain(b) for a, b in (line.split(" ", 1) for line in said.splitlines())})
    assert set(names[0]) == set(symbols)
    differing = {one for one in symbols if names[0][one] != names[1][one]}
    assert not differing, {one: (names[0][one], names[1][one]) for one in differing}


def _plain(mangled: str) -> str:
    """A function's mangled type written as its arguments' sizes: i, 8-byte integers as l, every pointer as P."""
    done = subprocess.run(["c++filt", "-t", mangled], capture_output=True, text=True, check=True).stdout.strip()
    result, _, arguments = done.partition(" (")
    words = ["P" if "*" in one or "[" in one or "(" in one else one.strip() for one in _split(arguments[:-1])]
    return result + ":" + ",".join({"long": "l", "long long": "l"}.get(one, one) for one in words)


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "(<") - (letter in ")>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def test_a_fixed_abi_serves_whom_its_soname_promises_it() -> None:
    every = tuple(standard.SYMBOLS_NEEDED)
    assert standard.fits("abi", "/a/libmpi_abi.so.1.0.2", every) == "abi"
    assert standard.fits("mpich", "/a/libmpich.so.12", every) == "mpich"
    assert standard.fits("mpich", "/a/libmpi.so.14", every) is None  # another promise
    assert standard.fits("mpich", "/a/libmpi.so.12", every[1:]) is None  # an older one: built for what it has
    assert standard.fits("openmpi", "/a/libmpi.so.40", every) is None


def test_a_change_compiles_again_what_includes_the_file_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "a.hh").write_text('#pragma once\n#  include "b.hh"\n#include <vector>\n')
    (tmp_path / "b.hh").write_text('#include "a.hh"\nint b();\n')  # they include each other
    (tmp_path / "c.hh").write_text("int c();\n")
    (tmp_path / "one.cc").write_text('#include "a.hh"\n')
    (tmp_path / "two.cc").write_text('#include "c.hh"\n')
    made = tmp_path / "made"
    made.mkdir()
    (made / "generated.inc").write_text("1")
    one, two = (Unit(name, tmp_path / f"{name}.cc") for name in ("one", "two"))
    three = Unit("three", "#include <generated.inc>\n", (), (made,))
    assert [file.name for file in one.included()] == ["a.hh", "b.hh"]

    def digests() -> list[str]:
        return [unit.digest() for unit in (one, two, three)]

    before = digests()
    (tmp_path / "b.hh").write_text('#include "a.hh"\nlong b();\n')
    after = digests()
    assert [old != new for old, new in zip(before, after)] == [True, False, False]
    (made / "generated.inc").write_text("2")
    assert [old != new for old, new in zip(after, digests())] == [False, False, True]
    assert one.digest(("-O1",)) != one.digest()


def test_the_core_knows_nothing_of_the_glue_and_each_unit_finds_its_headers() -> None:
    """A header of the glue compiles no unit of the core again; the scan misses no file that the compiler reads."""
    for unit in build.fixed_units("abi"):
        found = {file.name for file in unit.included()}
        if isinstance(unit.source, Path) and unit.source.parent.name == "core":
            assert not {file for file in unit.included() if file.parent.name in ("abi", "gpu")}, unit.name
        if unit.name == "entries":
            assert {"mpi.h", "reals.inc", "entries.inc", "glue.hh", "handlers_p2p.hh"} <= found
            cxx = [compile.compiler(), "-std=c++17", "-MM", *unit.flags]
            places = [f"-I{place}" for place in (*unit.includes, *compile.INCLUDE)]
            said = subprocess.run([*cxx, *places, str(unit.source)], capture_output=True, text=True, check=True).stdout
            read = {Path(word).name for word in said.replace("\\\n", " ").split()[2:]}
            assert read <= found, read - found


@pytest.fixture(scope="module")
def prebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of shipped libraries: the wheel's, or one made here as the wheel's is."""
    if os.environ.get("UNDERTOW_TESTED_FROM") and shutil.which("g++"):
        assert (PREBUILT / "libundertow_mpi_abi.so").exists(), "the wheel was made with a compiler, and holds nothing"
    if PREBUILT.exists():
        return PREBUILT
    from undertow.mpi_interpose import prebuild

    folder = tmp_path_factory.mktemp("prebuilt")
    assert len(prebuild.build_into(folder)) == 3
    return folder


def test_shipped_libraries_export_mpi_and_nothing_of_the_cpp_library(prebuilt: Path) -> None:
    from undertow.mpi_interpose import prebuild

    library = prebuilt / "libundertow_mpi_abi.so"
    said = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in said.stdout.splitlines()}
    assert {"MPI_Init", "MPI_Send_c", "MPI_Pack"} <= names
    assert all(name.startswith(("MPI_", "undertow_measure")) for name in names), names
    assert prebuild.platform_tag([library]).endswith(platform.machine())


def test_a_library_of_other_sources_or_processors_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "PREBUILT", tmp_path)
    assert compile.shipped("lib", "abc") is None
    (tmp_path / "lib.so").write_text("")
    for words, used in ((f"abc {platform.machine()}", True), (f"abd {platform.machine()}", False), ("abc mips", False)):
        (tmp_path / "lib.txt").write_text(words + "\n")
        assert (compile.shipped("lib", "abc") is not None) == used


def test_without_a_compiler_the_shipped_library_serves(
    prebuilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user of the wheels undertow, mpich and mpi4py on a machine without g++ and cc: two ranks, calls served."""
    mpich = find("mpich-wheel")
    if mpich is None:
        pytest.skip("the wheel mpich is not installed")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "sh", "env", "cat", "ls", "sed", "grep", "dirname", "basename", "uname", "hostname"):
        where = shutil.which(name)
        assert where
        (tools / name).symlink_to(where)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("UNDERTOW_MPI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compile, "PREBUILT", prebuilt)
    for name in ("CXX", "MPICC"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InterposeError):
        compile.compiler()
    assert shutil.which("cc") is None
    mpi = choose(list(mpich.mpirun), None, False).mpi
    assert mpi.flavour == "mpich" and "prebuilt" in build.origin(mpi)
    abi = choose(list(mpich.mpirun), None, True).mpi
    assert (
        abi.flavour == "abi" and build.library(abi).read_bytes() == (prebuilt / "libundertow_mpi_abi.so").read_bytes()
    )
    report = tmp_path / "report.json"
    command = [*mpich.mpirun, "-n", "2", sys.executable, str(PROGRAMS / "messages.py"), "sends_and_receives"]
    assert launch.run(command, "force", report) == 0
    data = json.loads(report.read_text())
    assert data["ranks"] == [0, 1] and sum(counts["taken"] for counts in data["functions"].values()) > 10
    assert not list((tmp_path / "cache").glob("objects/*"))


@pytest.mark.slow
def test_the_launcher_chooses_the_standard_abi_for_its_programs(tmp_path: Path) -> None:
    """A C program of the standard ABI under the library that the launcher chooses for it by itself."""
    install: Install = need("mpich-wheel")
    wrapper = own_wrapper("abi", "mpich-wheel")
    words = [wrapper, str(PROGRAMS / "rules.c"), "-O1", "-o", str(tmp_path / "program")]
    subprocess.run(words, check=True, env=environment(install))
    report = tmp_path / "report.json"
    assert launch.run([*install.mpirun, "-n", "2", str(tmp_path / "program")], "check", report) == 0
    data = json.loads(report.read_text())
    assert "libmpi_abi" in data["library"] and data["mismatches"] == 0
    assert data["functions"]["MPI_Isend"]["taken"] > 0
