"""Real MPI programs under a preload that watches its own memory and arithmetic, and one under valgrind.

The sanitizers see the preload's code and everything that it hands to memcpy; valgrind sees the library's too, so what
is the library's own is named in suppressions/valgrind.supp. Any report ends a rank with an error, hence the test.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sanitized
from mpis import PROGRAMS, Install, need, start
from test_passing import TABLE
from test_programs import compiled, taken

from undertow.mpi_interpose.compile import core_library

pytestmark = pytest.mark.slow  # on the checkout only

SUPPRESSIONS = Path(__file__).parent / "suppressions" / "valgrind.supp"


def watched(install: Install, ranks: int, command: list[str], mode: str, report: Path, leaks: bool = False) -> str:
    variables = [*sanitized.variables(install, leaks), f"UNDERTOW_MPI_MODE={mode}", f"UNDERTOW_MPI_REPORT={report}"]
    out = start(install, ranks, ["env", *variables, *command], None)
    assert "runtime error" not in out and "AddressSanitizer" not in out, out[-4000:]
    return out


@pytest.fixture(scope="module")
def mpich() -> Install:
    return need("mpich-wheel")


def test_c_programs_keep_to_their_memory_and_free_it(mpich: Install, tmp_path: Path) -> None:
    for source in ("rules.c", "errors.c"):
        program, report = compiled(mpich, source, tmp_path), tmp_path / "report"
        assert "ok" in watched(mpich, 2, [program], "force", report, leaks=True)
        assert taken(report, [0, 1])["MPI_Wait"] > 0


@pytest.mark.parametrize("mode", ["force", "check"])
def test_python_programs_keep_to_their_memory(mpich: Install, mode: str, seed: int, tmp_path: Path) -> None:
    report, python = tmp_path / "report", str(mpich.python)
    assert "ok 22" in watched(mpich, 2, [python, str(PROGRAMS / "messages.py")], mode, report)
    assert taken(report, [0, 1])["MPI_Irecv"] > 0
    assert "ok 7" in watched(mpich, 3, [python, str(PROGRAMS / "collectives.py")], mode, report)
    assert taken(report, [0, 1, 2])["MPI_Alltoallw"] > 0
    out = watched(mpich, 1, [python, str(PROGRAMS / "fuzz_types.py"), str(seed % 10**6), "400"], mode, report)
    assert "ok 400" in out and taken(report, [0])["MPI_Pack"] > 350


@pytest.mark.parametrize("words", [("passing.py",), ("rounds.py", "waitall"), ("rounds.py", "late")], ids=" ".join)
def test_what_passes_and_tried_rounds_keep_to_their_memory(mpich: Install, words: tuple, tmp_path: Path) -> None:
    table, report = tmp_path / "table.txt", tmp_path / "report"
    table.write_text(TABLE)
    program = ["env", f"UNDERTOW_MPI_MODEL={table}", str(mpich.python), str(PROGRAMS / words[0]), *words[1:]]
    assert "ok" in watched(mpich, 2, program, "auto", report)
    assert taken(report, [0, 1])["MPI_Isend"] > 0


def test_the_decoder_survives_extreme_types(mpich: Install, seed: int, tmp_path: Path) -> None:
    program = [str(mpich.python), str(PROGRAMS / "fuzz_extreme.py"), str(seed % 10**6), "4000"]
    assert "ok 4000" in watched(mpich, 1, program, "force", tmp_path / "report")
    data = json.loads((tmp_path / "report.0.json").read_text())
    assert data["functions"]["MPI_Type_commit"]["calls"] > 3000
    decoded = sum(row["types"] for row in data["types"])
    assert 0 < decoded < data["functions"]["MPI_Type_commit"]["calls"]  # some are understood, some refused


def test_valgrind_finds_nothing_of_ours(mpich: Install, tmp_path: Path) -> None:
    if not shutil.which("valgrind"):
        pytest.skip("valgrind is not installed")
    options = ["-q", "--error-exitcode=9", f"--suppressions={SUPPRESSIONS}", "--leak-check=full"]
    options += ["--show-leak-kinds=definite", "--errors-for-leak-kinds=definite"]
    report = tmp_path / "report"
    variables = [f"LD_PRELOAD={mpich.preload}", "UNDERTOW_MPI_MODE=force", f"UNDERTOW_MPI_REPORT={report}"]
    variables.append("UNDERTOW_MPI_ISA=avx2")  # valgrind knows no AVX-512
    command = ["env", *variables, "valgrind", *options, compiled(mpich, "rules.c", tmp_path)]
    assert "ok" in start(mpich, 2, command, None)
    assert taken(report, [0, 1])["MPI_Pack"] > 0


FUZZ = """
import random, sys
from pathlib import Path
from undertow.mpi_interpose import core
lib = core.load(Path({library!r}))
rng, good = random.Random({seed}), 0
words = "( ) bytes loop seq runs 0 1 3 -4 64 99999 9223372036854775807 -9223372036854775808 4611686018427387904".split()
for turn in range(30000):
    kind = rng.random()
    if kind < 0.3:
        text = " ".join(rng.choice(words) for _ in range(rng.randint(1, 12)))
    else:
        text = "(bytes %s)" % rng.choice(words[6:])
        for _ in range(rng.randint(1, 5)):
            n, m = rng.choice(words[6:]), rng.choice(words[6:])
            wrapped = f"(loop {{n}} {{m}} {{text}})", f"(seq {{n}} {{text}} {{m}} (bytes 2))", f"(runs {{n}} 2 {{m}} 3)"
            text = rng.choice(wrapped)
        if kind < 0.5:
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice("() 9-x") + text[at + rng.randint(0, 2):]
    for name in ("parse", "normalise"):
        answer = getattr(lib, "undertow_core_" + name)(text.encode())
    good += answer[:1] != b"!"
    lib.undertow_core_describe(text.encode(), 0, int(rng.choice(words[6:])))
assert lib.undertow_core_parse(b"(loop 1 1 " * 200000)[:1] == b"!"
assert 1000 < good < 29000, good
"""


def test_text_that_is_nearly_an_ir_breaks_nothing(seed: int) -> None:
    library = core_library(sanitize=True)
    environment = {"LD_PRELOAD": sanitized.runtime(), "ASAN_OPTIONS": "detect_leaks=0"}
    code = FUZZ.format(library=str(library), seed=seed)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
