"""Which MPI library mpi4py of this Python loads, and whether it is the one that the launcher starts.

mpi4py's wheels look beside their own Python first and take no notice of PATH, so a system's mpirun may start ranks
whose mpi4py brings another MPI: they do not start, or each sees itself alone, and the preload does nothing. Asked in a
child, which imports mpi4py without MPI_Init.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

from .chosen import Choice, short
from .toolchain import environment

_ASK = """
import mpi4py
mpi4py.rc.initialize = mpi4py.rc.finalize = False
from mpi4py import MPI
print(mpi4py.__version__)
print(MPI.Get_library_version().strip().splitlines()[0])
places = {line.split()[-1] for line in open("/proc/self/maps") if "/libmpi" in line}
names = ("libmpi.so", "libmpich.so", "libmpi_abi.so")
print(min((place for place in places if place.split("/")[-1].startswith(names)), default=""))
"""


@dataclass(frozen=True)
class Mpi4py:
    """What mpi4py loads: its own version, the library's version text and file ('' when that cannot be seen)."""

    version: str
    text: str
    library: str


def ask(python: str = sys.executable) -> Mpi4py | str:
    """What mpi4py of `python` loads, or the last line of why it cannot be imported."""
    done = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, check=False, env=environment())
    lines = done.stdout.splitlines()
    if done.returncode or len(lines) != 3:
        return (done.stderr.strip().splitlines() or ["no answer"])[-1]
    return Mpi4py(*lines)


def rows(choice: Choice, found: Mpi4py | str) -> list[tuple[str, str]]:
    """The doctor's lines: what mpi4py is linked with, and a warning where that is not the MPI of `choice`."""
    if isinstance(found, str):
        return [("mpi4py", "not in this Python" if "No module named" in found else f"cannot be imported: {found}")]
    name = f"{short(found.text)} ({found.library or 'linked in'})"
    said = f"{found.version} of {sys.executable}, with {name}"
    start, mpi = choice.launcher or "the launcher", choice.mpi
    if found.text.strip() == mpi.version.strip():
        return [("mpi4py", said)]
    if family(found.text) == family(mpi.version) != "":
        return [("mpi4py", f"{said}, another version than that of {start}")]
    warning = (
        f"mpi4py of this Python is linked with {name}, but {start} starts ranks of {short(mpi.version)} "
        f"({mpi.library}): its ranks would not start, or each be alone, unserved; use a launcher of "
        "mpi4py's MPI (its folder first on PATH, or --mpirun PATH), or an mpi4py built with this one"
    )
    return [("mpi4py", said), ("warning", warning)]


def family(version: str) -> str:
    """'Open MPI' or 'MPICH', by the text of MPI_Get_library_version; '' for others."""
    return next((name for name in ("Open MPI", "MPICH") if name in version), "")
