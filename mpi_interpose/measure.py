"""Measure the library against our kernels, and keep the result as the table that the preload decides by.

The timing program is C (csrc/tools/measure.c), built by the MPI's own wrapper and run on two ranks: within one pair of
processes it calls the library by its profiling names and the preload by the plain ones. What it prints is read by
samples.py and fitted by policy.py. The table lies beside the preload, which finds it by itself, and in the Machine file
of `undertow probe`, where other tools look for what this machine can do.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path

from . import policy
from .build import builtin_model
from .chosen import beside
from .compile import CSRC, cache_folder, run
from .errors import InterposeError
from .launch import environment
from .samples import Cell, parse
from .toolchain import Mpi
from .toolchain import environment as clean_environment

ROUNDS, QUICK_ROUNDS = 31, 9


def program(mpi: Mpi) -> Path:
    """The timing program for `mpi`, built once."""
    source = CSRC / "tools" / "measure.c"
    texts = source.read_text() + (CSRC / "tools" / "cells.h").read_text()
    key = hashlib.sha256((mpi.key + texts).encode()).hexdigest()[:16]
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
    found = named or beside(mpi.mpicc) or shutil.which("mpirun")
    if not found:
        raise InterposeError(f"no mpirun beside {mpi.mpicc}; name it with --mpirun")
    return [found, *(["--oversubscribe"] if mpi.flavour == "openmpi" else [])]


def measure(
    mpi: Mpi,
    library: Path,
    mpirun: Sequence[str] = (),
    *,
    rounds: int = ROUNDS,
    quick: bool = False,
    only: str = "",
    table: Path | None = None,
    progress: Callable[[int, str], None] = lambda done, cell: None,
) -> list[Cell]:
    """All cells; some minutes (`quick`: fewer sizes). InterposeError when the program fails or a byte is wrong.

    `only`: cells whose "use name" contains it, or is it where a $ stands behind. `table`: the policy behind the arm
    `auto`, default the preload's own. `mpirun`: the launcher with its options. `progress(cells so far, title)` is
    called after each.
    """
    values = {**clean_environment(), **environment(library, "auto", None)}
    preload = values.pop("LD_PRELOAD")
    if table:
        values["UNDERTOW_MPI_MODEL"] = str(table)
    start = list(mpirun) or launcher(mpi)
    ranks = ["-n", "2", "env", f"LD_PRELOAD={preload}", str(program(mpi)), str(rounds), str(int(quick)), only]
    lines: list[str] = []
    # The launcher is started without the preload; `env` sets it for the ranks.
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen([*start, *ranks], env=values, stdout=subprocess.PIPE, stderr=errors, text=True) as job:
            assert job.stdout is not None
            done = 0
            for line in job.stdout:
                lines.append(line)
                if line.startswith("cell "):
                    done += 1
                    words = line.split()
                    progress(done, f"{words[1]} {words[3]} {words[6]}")
        if job.returncode:
            errors.seek(0)
            said = (errors.read() or "".join(lines)).strip()[-600:]
            raise InterposeError(f"timing failed, {start[0]} ended with {job.returncode}: {said}")
    cells = parse(lines)
    bad = [cell for cell in cells if cell.wrong]
    if bad:
        raise InterposeError(f"{bad[0].wrong} bytes of {bad[0].title} are wrong: a defect of ours, nothing is written")
    return cells


def apart(
    mpi: Mpi,
    library: Path,
    mpirun: Sequence[str] = (),
    *,
    rounds: int,
    progress: Callable[[int, str], None] = lambda done, cell: None,
) -> list[Cell]:
    """The cells of messages, those of each datatype by processes that have sent nothing else.

    What a program has sent before changes what its caches and its library hold, and most programs send few datatypes.
    """
    names = dict.fromkeys(cell.name for cell in measure(mpi, library, mpirun, rounds=1, only="message"))
    found: list[Cell] = []
    for name in names:
        found += measure(mpi, library, mpirun, rounds=rounds, only=f"message {name}$")
        progress(len(found), f"message {name}, apart")
    return found


def facts(mpi: Mpi) -> list[str]:
    return [mpi.version, f"{cpu()}, {os.cpu_count()} cores, measured by `undertow mpi measure`"]


def cpu() -> str:
    """The processor's name as the system tells it."""
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def write(
    cells: list[Cell], mpi: Mpi, target: Path, peer: str | None = None, *, fresh: Sequence[Cell] = ()
) -> list[policy.Row]:
    """Write the table of `cells` to `target`, of messages what also gains in the cells `fresh` (those of `apart`) where
    there are any; rows for peers elsewhere in an older table there stay."""
    peer = peer or next((cell.link for cell in cells), "local")
    found = policy.rows(cells, peer=peer)
    if fresh:
        found = policy.least_gains([policy.known(run, peer=peer) for run in (cells, fresh)])
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = [line for line in _lines(target) if _other_peer(line, peer)] if target.exists() else []
    scratch = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    scratch.write_text(policy.text(found, facts(mpi)) + "".join(f"{line}\n" for line in kept))
    scratch.replace(target)
    return found


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def _other_peer(line: str, peer: str) -> bool:
    return line.startswith(("send_", "recv_")) and line.split()[0].split("_")[1] != peer


def write_machine(found: list[policy.Row], mpi: Mpi, path: Path) -> None:
    """Put the rows into the Machine file (a JSON file of `undertow probe`, made here if missing), under the MPI's name.

    The format is that of dist/machine.py, which this folder must not import; everything else in the file is kept.
    """
    try:
        data = json.loads(path.read_text()) if path.exists() else {"format": 1, "name": platform.node(), "links": {}}
        if data["format"] != 1:
            raise ValueError(f"format {data['format']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InterposeError(
            f"cannot read the Machine file {path} ({type(error).__name__}: {error}); expected what `undertow probe` "
            "writes; move it away or name another with --machine"
        ) from error
    data.setdefault("datatypes", {})[mpi.version[:60].strip()] = [list(astuple(row)) for row in found]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    scratch.write_text(json.dumps(data, indent=2) + "\n")
    scratch.replace(path)


def machine_file() -> Path:
    """Where `undertow probe` writes (Machine.default_path)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "undertow" / "machine.json"


def shipped_table(mpi: Mpi, processor: str) -> str:
    """Which of the tables in the package decides on a kind of processor, and how to have one of one's own."""
    whom, _ = policy.read_sections(builtin_model(mpi.flavour))
    kinds = sorted({kind for _, _, kind in (name.partition(" on ") for name in whom)})
    own = f"of {processor}" if processor in kinds else f"the least gains of {', '.join(kinds)} (this is {processor})"
    return f"built-in table, {own}; `undertow mpi measure` makes one of this machine"


def model_file(library: Path) -> Path:
    """Where the preload looks for a table of this machine: beside itself."""
    return library.parent / "model.txt"


def predictions(mpi: Mpi, plan: str, count: int, leaf: int = 0) -> list[str]:
    """What the model says of a plan (as `core.describe` prints it): one line per use. `leaf`: as in policy.Row."""
    from .build import library  # the library's folder may hold a measured table

    match = re.match(r"(\w+), (\d+) B in \d+ pieces of about (\d+) B every (\d+) B", plan)
    if not match:
        return []
    cls, size, block, step = match[1], int(match[2]) * count, int(match[3]), int(match[4])
    path = model_file(library(mpi))
    table = policy.Policy(path.read_text() if path.exists() else builtin_model(mpi.flavour), mpi.version)
    lines = [f"model      {path if path.exists() else 'built-in table'} for {' '.join(mpi.version.split())[:40]}"]
    for use in ("pack", "unpack", *(f"{side}_{link}" for link in policy.LINKS for side in ("send", "recv"))):
        side, _, link = use.partition("_")
        title = f"{side} {link}".strip()
        dense_message = cls == "contiguous" and link
        gain, saved_ns = (0.0, 0.0) if dense_message else table.ask(use, cls, block, step, size, leaf)
        if not gain:
            lines.append(f"{title:<11} passed through (nothing measured near {cls}, {block} B blocks, {size} B)")
        elif gain < policy.GAIN:
            lines.append(f"{title:<11} passed through: gain {gain:.2f}x")
        else:
            lines.append(f"{title:<11} packed by us: gain {gain:.2f}x, {saved_ns / 1e3:.2f} us saved per call")
    return lines


def corrections(report: dict, plan: str) -> list[str]:
    """What the timed calls of a run said of the datatypes with this plan (`report`: of `undertow mpi run --report`)."""
    words = {"open": "as the table says", "library": "left to the library", "ours": "packed by us"}
    lines = []
    for row in report["types"]:
        for one in row.get("checked", []) if row["plan"] == plan else []:
            library, ours = (value / 1000 for value in one["ps_per_byte"])
            where = (" in rounds" if one["of"] == "rounds" else "") + (f" ({one['link']})" if one["link"] else "")
            plain, taken = (f"in {count} {one['of']}" for count in one["samples"])
            lines.append(
                f"timed      {one['use']}{where}, {one['least_bytes']} B and more: library {library:.3g} ns/B {plain}, "
                f"ours {ours:.3g} ns/B {taken}: {words[one['decision']]}"
            )
    return lines or ["timed      no call with this plan in that run"]
