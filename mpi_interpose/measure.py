"""Measure the library against our kernels, and keep the result as the table that the preload decides by.

The timing loop is a C program (csrc/tools/measure.c), built by the MPI's own wrapper: within one process it calls the
library by its profiling names and the preload by the plain ones. A cell of the table is (use, class, block, message
size); where several datatypes fall into one cell, the one with the least gain speaks for it, so the table errs towards
passing through.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from .build import builtin_model
from .compile import CSRC, cache_folder, run
from .errors import InterposeError
from .launch import environment
from .toolchain import Mpi
from .toolchain import environment as clean_environment

GAIN = 1.15  # as in csrc/abi/model.hh
CLASSES = ("contiguous", "strided", "crossed", "table", "mixed", "records")


@dataclass(frozen=True)
class Row:
    """One datatype in one use: medians in ns of the library, of the library again, and of ours; wrong bytes."""

    use: str
    cls: str
    name: str
    block: int
    size: int
    library_ns: float
    again_ns: float
    ours_ns: float
    wrong: int

    @property
    def ratio(self) -> float:
        """The gain that the table believes: the better of the two library medians against ours."""
        return min(self.library_ns, self.again_ns) / self.ours_ns


def program(mpi: Mpi) -> Path:
    """The timing program for `mpi`, built once."""
    source = CSRC / "tools" / "measure.c"
    key = hashlib.sha256((mpi.key + source.read_text()).encode()).hexdigest()[:16]
    target = cache_folder() / f"measure-{key}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            output = Path(folder) / "measure"
            run([mpi.mpicc, "-O2", str(source), "-o", str(output), "-ldl"], "compiling the timing program")
            output.replace(target)
    return target


def launcher(mpi: Mpi, named: str | None = None) -> list[str]:
    """mpirun of this MPI with the options that let two ranks share any machine."""
    wrapper = Path(mpi.mpicc)
    suffix = wrapper.name.split(".", 1)[1] if "." in wrapper.name else ""
    beside = [wrapper.with_name(f"mpirun.{suffix}"), wrapper.with_name("mpirun")]
    found = named or next((str(path) for path in beside if path.exists()), shutil.which("mpirun"))
    if not found:
        raise InterposeError(f"no mpirun beside {mpi.mpicc}; name it with --mpirun")
    return [found, *(["--oversubscribe"] if mpi.flavour == "openmpi" else [])]


def parse(text: str) -> list[Row]:
    rows = []
    for line in text.splitlines():
        words = line.split()
        if len(words) == 9 and words[0] in ("pack", "unpack", "send", "recv", "both"):
            use, cls, name = words[:3]
            library_ns, again_ns, ours_ns = map(float, words[5:8])
            rows.append(Row(use, cls, name, int(words[3]), int(words[4]), library_ns, again_ns, ours_ns, int(words[8])))
    return rows


def measure(
    mpi: Mpi, library: Path, mpirun: str | None = None, *, quick: bool, messages: bool, progress: Console | None = None
) -> list[Row]:
    """All rows; takes about a minute (`quick`: some seconds). InterposeError when the program fails."""
    values = {**clean_environment(), **environment(library, "force", None)}
    flag = "1" if quick else "0"
    commands = [[str(program(mpi)), "local", flag]]
    if messages:
        commands.append([*launcher(mpi, mpirun), "-n", "2", str(program(mpi)), "messages", flag])
    rows: list[Row] = []
    for command in commands:
        if progress:
            progress.print(f"timing {command[-2]} calls of {mpi.version[:40]} …")
        # The launcher is started without the preload; `env` sets it for the ranks.
        at = len(command) - 3
        preload = ["env", f"LD_PRELOAD={values['LD_PRELOAD']}"]
        done = subprocess.run(
            [*command[:at], *preload, *command[at:]],
            env={name: value for name, value in values.items() if name != "LD_PRELOAD"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise InterposeError(f"timing failed ({done.returncode}): {(done.stderr or done.stdout).strip()[-600:]}")
        rows += parse(done.stdout)
    bad = [row for row in rows if row.wrong]
    if bad:
        raise InterposeError(f"{bad[0].wrong} bytes of {bad[0].name} are wrong: a defect of ours, nothing is written")
    return rows


def cells(rows: list[Row]) -> dict[tuple[str, str, int, int], Row]:
    """The row with the least gain of every cell of the table."""
    best: dict[tuple[str, str, int, int], Row] = {}
    for row in rows:
        key = (row.use, row.cls, int(math.log2(max(1, row.block))), int(math.log2(max(1, row.size))))
        if row.use != "both" and (key not in best or row.ratio < best[key].ratio):
            best[key] = row
    return dict(sorted(best.items()))


def table_text(rows: list[Row], mpi: Mpi) -> str:
    """The model's file: comments, then `use class log2(block) log2(bytes) library_ns ours_ns`."""
    lines = [f"# {mpi.version}", f"# {os.cpu_count()} cores, measured by `undertow mpi measure`; see model.hh"]
    for (use, cls, block, size), row in cells(rows).items():
        lines.append(f"{use} {cls} {block} {size} {min(row.library_ns, row.again_ns):.0f} {row.ours_ns:.0f}")
    return "\n".join(lines) + "\n"


def write(rows: list[Row], mpi: Mpi, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(target.name + ".tmp")
    scratch.write_text(table_text(rows, mpi))
    scratch.replace(target)


def model_file(library: Path) -> Path:
    """Where the preload looks for a table of this machine: beside itself."""
    return library.parent / "model.txt"


def lookup(text: str, use: str, cls: str, block: int, size: int) -> tuple[float, float] | None:
    """(library ns, our ns) of the nearest cell, by the same rule as model.cc."""
    b, s = int(math.log2(max(1, block))), int(math.log2(max(1, size)))
    best, answer = 1 << 30, None
    for line in text.splitlines():
        words = line.split()
        if len(words) != 6 or words[0] != use or words[1] != cls:
            continue
        db, ds = abs(int(words[2]) - b), abs(int(words[3]) - s)
        if db <= 2 and ds <= 4 and 2 * db + ds < best:
            best, answer = 2 * db + ds, (float(words[4]), float(words[5]))
    return answer


def predictions(mpi: Mpi, plan: str, count: int) -> list[str]:
    """What the model says of a plan (as `core.describe` prints it): one line per use."""
    from .build import library  # the library's folder may hold a measured table

    match = re.match(r"(\w+), (\d+) B in \d+ pieces of about (\d+) B", plan)
    if not match:
        return []
    cls, size, block = match[1], int(match[2]) * count, int(match[3])
    path = model_file(library(mpi))
    text = path.read_text() if path.exists() else builtin_model(mpi.flavour)
    lines = [f"model      {path if path.exists() else 'built-in table'} for {mpi.version[:40]}"]
    for use in ("pack", "unpack", "send", "recv"):
        known = None if cls == "contiguous" else lookup(text, use, cls, block, size)
        if not known:
            lines.append(f"{use:<10} passed through (nothing measured near {cls}, {block} B blocks, {size} B)")
            continue
        ratio = known[0] / known[1]
        verdict = "packed by us" if ratio >= GAIN else "passed through"
        lines.append(
            f"{use:<10} {verdict}: library {known[0] / 1e3:.2f} us, ours {known[1] / 1e3:.2f} us, {ratio:.2f}x"
        )
    return lines
