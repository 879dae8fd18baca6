"""Start a program under the preload: choose the library that fits it, set the environment, merge the ranks' reports.

The preload also reaches mpirun itself, which is harmless: nothing happens before MPI_Init. Open MPI passes variables
to other hosts only when told (-x), so they are named; Hydra passes all.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

from . import build
from .chosen import choose, is_launcher, is_srun
from .errors import InterposeError

PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # batch systems send them to be saved
MODES = ("auto", "force", "check", "off")


def wants_abi(command: list[str]) -> bool:
    """Whether the program is linked to the standard ABI's library: its file names libmpi_abi."""
    for word in command[1 if is_launcher(command[0]) else 0 :]:
        path = Path(shutil.which(word) or word)
        try:
            if path.is_file() and path.stat().st_size < 1 << 28:
                data = path.read_bytes()
                if data[:4] == b"\x7fELF":
                    return b"libmpi_abi.so" in data
        except OSError:
            continue
    return False


def environment(library: Path, mode: str, report: str | None, *, alike: bool = True) -> dict[str, str]:
    """The variables that switch the preload on; an LD_PRELOAD of the user's stays behind ours.

    `alike`: all ranks run one program.
    """
    if mode not in MODES:
        raise InterposeError(f"--mode {mode}; expected one of {', '.join(MODES)}")
    before = os.environ.get("LD_PRELOAD", "")
    values = {"LD_PRELOAD": f"{library} {before}".strip(), "UNDERTOW_MPI_MODE": mode}
    # Reordering the ranks of a graph takes messages among all ranks: here all of them get the preload.
    values["UNDERTOW_MPI_REORDER"] = os.environ.get("UNDERTOW_MPI_REORDER", "1")
    # So does device memory of other ranks, and all must come to it through C: programs of several languages do not.
    values["UNDERTOW_MPI_IPC"] = os.environ.get("UNDERTOW_MPI_IPC", "auto" if alike else "0")
    # These must stand alike on all ranks, also on other hosts.
    shared = ("UNDERTOW_MPI_GPU", "UNDERTOW_MPI_CUDA_AWARE", "UNDERTOW_MPI_PATIENCE_MS")
    values |= {name: value for name, value in os.environ.items() if name.startswith(shared)}
    if report:
        values["UNDERTOW_MPI_REPORT"] = report
    return values


def one_program(command: list[str]) -> bool:
    """Whether a launcher's words name one program for all ranks, as far as they show it."""
    several = {":", "--app", "-app", "--appfile", "-configfile", "--configfile", "--multi-prog"}
    return not several & set(command)


def disabled() -> bool:
    value = os.environ.get("UNDERTOW_DISABLE", "")
    return value not in ("", "0")


def run(command: list[str], mode: str, report: Path | None, mpicc: str | None = None, abi: bool = False) -> int:
    """Run `command` under the preload and give back its exit status; the merged report goes to `report`."""
    if not command:
        raise InterposeError("nothing to run; expected, for example, `undertow mpi run -- mpirun -n 4 ./app`")
    if not shutil.which(command[0]):
        raise InterposeError(f"'{command[0]}' is not a program")
    if report and not report.absolute().parent.is_dir():
        raise InterposeError(f"cannot write {report}: there is no folder {report.absolute().parent}")
    if disabled() or mode == "off":
        return _status(command, {})
    mpi = choose(command, mpicc, abi or wants_abi(command)).mpi
    library = build.library(mpi)
    shared = report.absolute().parent if report else None  # ranks on other nodes see the report's folder, not /tmp
    with tempfile.TemporaryDirectory(prefix=".undertow-mpi-", dir=shared) as folder:
        parts = str(Path(folder) / "rank") if report else None
        values = environment(library, mode, parts, alike=one_program(command))
        full = list(command)
        if mpi.flavour == "openmpi" and is_launcher(command[0]) and not is_srun(command[0]):
            full[1:1] = [word for name in values for word in ("-x", name)]
        status = _status(full, values)
        if report:
            merge(sorted(Path(folder).glob("rank.*.json")), report)
    return status


def _status(command: list[str], values: dict[str, str]) -> int:
    """Run to the end. Signals that batch systems send go on to `command`, whose ranks may save upon them."""
    with subprocess.Popen(command, env={**os.environ, **values}) as process:
        if threading.current_thread() is not threading.main_thread():  # handlers are the main thread's
            return process.wait()
        before = {number: signal.signal(number, lambda got, _: process.send_signal(got)) for number in PASSED_ON}
        try:
            return process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def merge(parts: list[Path], target: Path) -> dict:
    """One JSON file from the ranks' files: sums over ranks, and the list of ranks that wrote one."""
    ranks = [json.loads(part.read_text()) for part in parts]
    merged: dict = {"format": 1, "ranks": sorted(r["rank"] for r in ranks), "mismatches": 0}
    functions: dict[str, dict[str, int]] = {}
    refused: dict[str, int] = {}
    types: dict[tuple, dict] = {}
    for rank in ranks:
        merged.update({name: rank[name] for name in ("size", "mode", "kernels", "library")})
        merged["mismatches"] += rank["mismatches"]
        for name, counts in rank["functions"].items():
            _sum(functions.setdefault(name, {}), counts)
        _sum(refused, rank["refused"])
        _sum(merged.setdefault("gpu", {}), rank["gpu"])
        for row in rank["types"]:
            names = ("plan", "layout", "class", "size", "block", "combiners")
            known = types.setdefault((row["plan"], *row["combiners"]), {key: row[key] for key in names})
            known["types"] = known.get("types", 0) + row["types"]
            for use in ("pack", "unpack", "send", "recv"):
                if use in row:
                    _sum(known.setdefault(use, {}), row[use])
            known["checked"] = _best_known(known.get("checked", []), row.get("checked", []))
    ordered = sorted(types.values(), key=lambda row: -sum(row.get(use, {}).get("bytes", 0) for use in USES))
    merged.update(functions=dict(sorted(functions.items())), refused=refused, types=ordered)
    scratch = target.with_name(target.name + ".tmp")
    scratch.write_text(json.dumps(merged, indent=1) + "\n")
    scratch.replace(target)
    return merged


USES = ("pack", "unpack", "send", "recv")


def _best_known(some: list[dict], more: list[dict]) -> list[dict]:
    """What timed calls and rounds said, per use, link and size that of the rank that timed most."""
    found: dict[tuple, dict] = {}
    for one in (*some, *more):
        place = (one["use"], one["of"], one["link"], one["least_bytes"])
        if place not in found or sum(one["samples"]) > sum(found[place]["samples"]):
            found[place] = one
    return [found[place] for place in sorted(found)]


def _sum(into: dict[str, int], counts: dict[str, int]) -> None:
    for name, value in counts.items():
        into[name] = into.get(name, 0) + value
