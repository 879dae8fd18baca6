"""Which MPI is meant: one answer for run, build, doctor, explain and measure, with the reason for it.

A launcher decides, because the ranks that it starts use its MPI: the launcher of the command, else one that lies beside
the command's program (a Python's environment), else the mpirun or mpiexec that is first on PATH, which is what
`undertow mpi run -- mpirun …` starts. Only where there is none do a compiler wrapper beside this Python and then one on
PATH decide. A wrapper that the user names goes before all.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .compile import run
from .errors import InterposeError
from .toolchain import Mpi, environment, look, probe

LAUNCHERS = ("mpirun", "mpiexec", "prterun", "orterun", "srun")
NO_MPI = (
    "no mpicc found: install an MPI with its compiler (`pip install mpich`, or `apt install libopenmpi-dev`), "
    "or name it with --mpicc PATH"
)


@dataclass(frozen=True)
class Choice:
    """An MPI, the launcher that starts its ranks (None: none is known), and why it is this one."""

    mpi: Mpi
    launcher: str | None
    why: str

    def __str__(self) -> str:
        return f"{short(self.mpi.version)}, because of {self.why}"


def short(version: str) -> str:
    """The name and number at the head of a version text."""
    return " ".join(version.split(",")[0][:60].split())


def is_launcher(word: str) -> bool:
    return Path(word).name.split(".")[0] in LAUNCHERS


def is_srun(word: str) -> bool:
    """srun starts the ranks of any MPI, so what lies beside it says nothing."""
    return Path(word).name.split(".")[0] == "srun"


def choose(command: list[str], mpicc: str | None, abi: bool) -> Choice:
    """The MPI of `command` (empty: of `mpirun`), as far as it can be told from outside; InterposeError without one.

    `mpicc`: a wrapper that the user named; MPICC in the environment does so too. `abi`: its standard ABI is meant.
    """
    launcher, why = _launcher(command)
    named, by = (mpicc, "--mpicc") if mpicc else (os.environ.get("MPICC"), "MPICC")
    if named:
        if not shutil.which(named):
            raise InterposeError(f"{by} names '{named}', which is not a program")
        given = command and is_launcher(command[0])
        return Choice(probe(_abi_of(named, abi)), launcher if given else beside(named) or launcher, f"{by} {named}")
    if launcher:
        return Choice(_of_launcher(launcher, abi), launcher, why)
    mpi = _first_probed(_others(), abi, "") or look([Path(sys.executable).parent], abi)
    if mpi is None:
        raise InterposeError(NO_MPI)
    return Choice(mpi, None, f"{mpi.mpicc or mpi.library}; no mpirun or mpiexec is on PATH")


def _launcher(command: list[str]) -> tuple[str | None, str]:
    """The path of the launcher that decides, and the words that say so."""
    if command and is_launcher(command[0]) and not is_srun(command[0]):
        found = shutil.which(command[0])
        if found:
            return found, found if command[0] == found else f"{found}, the first {command[0]} on PATH"
    program = shutil.which(command[0]) if command and not is_launcher(command[0]) else None
    if program:
        for place in (Path(program), Path(program).resolve()):
            found = _first_in(str(place.parent))
            if found:
                return found, f"{found}, beside the program"
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        found = _first_in(folder)
        if found:
            return found, f"{found}, the first on PATH"
    return None, ""


def _first_in(folder: str) -> str | None:
    return next((path for name in ("mpirun", "mpiexec") if (path := shutil.which(name, path=folder))), None)


def beside(wrapper: str) -> str | None:
    """The launcher in a compiler wrapper's folder, of its family where Debian writes that as a suffix."""
    path = Path(shutil.which(wrapper) or wrapper)
    suffix = path.name.split(".", 1)[1] if "." in path.name else ""
    names = ([f"mpirun.{suffix}"] if suffix else []) + ["mpirun", "mpiexec"]
    return next((str(path.with_name(name)) for name in names if path.with_name(name).exists()), None)


def _of_launcher(launcher: str, abi: bool) -> Mpi:
    """The MPI of this launcher: by the wrapper beside it, by another of its family, or by the library near it."""
    found = _first_probed(_wrappers(launcher), abi, "")
    if found:
        return found
    family = family_of(launcher)
    found = _first_probed(_others(), abi, family) or look([Path(launcher).parent, Path(sys.executable).parent], abi)
    if found is None or (family and found.flavour not in (family, "abi")):
        starts = {"openmpi": " of Open MPI", "mpich": " of MPICH"}.get(family, "")
        raise InterposeError(f"{launcher} is a launcher{starts}; {NO_MPI}")
    return found


def _first_probed(wrappers: Iterator[str], abi: bool, family: str) -> Mpi | None:
    """The first of these whose probe compiles (there may be no C compiler), of this family if one is named."""
    for wrapper in wrappers:
        try:
            mpi = probe(_abi_of(wrapper, abi))
        except InterposeError:
            continue  # the shipped preloads need no compiler: the library itself is asked instead
        if family in ("", mpi.flavour) or mpi.flavour == "abi":
            return mpi
    return None


def _others() -> Iterator[str]:
    """Wrappers that lie beside no launcher: this Python's, then the one on PATH."""
    here = Path(sys.executable).with_name("mpicc")
    if here.exists():
        yield str(here)
    found = shutil.which("mpicc")
    if found:
        yield found


def _wrappers(launcher: str) -> Iterator[str]:
    """Compiler wrappers beside the launcher. Debian's alternatives keep the family as a suffix (mpirun.openmpi), at the
    end or in the middle of a chain of links; that suffix is carried over.
    """
    path = Path(launcher)
    for place in (path, path.resolve(), *_links(path)):
        suffix = place.name.split(".", 1)[1] if "." in place.name else ""
        if suffix in ("openmpi", "mpich") and place.with_name(f"mpicc.{suffix}").exists():
            yield str(place.with_name(f"mpicc.{suffix}"))
    if path.with_name("mpicc").exists():
        yield str(path.with_name("mpicc"))


def _links(path: Path) -> list[Path]:
    """Each step of a chain of symbolic links (the alternatives system's middle step carries the family)."""
    steps = []
    while path.is_symlink() and len(steps) < 8:
        target = Path(os.readlink(path))
        path = target if target.is_absolute() else path.parent / target
        steps.append(path)
    return steps


def _abi_of(wrapper: str, abi: bool) -> str:
    """The wrapper of the standard ABI beside this one, where that is wanted and there."""
    path = Path(shutil.which(wrapper) or wrapper)
    sibling = path.with_name("mpicc_abi")
    return str(sibling) if abi and path.name != "mpicc_abi" and sibling.exists() else wrapper


@functools.cache
def family_of(launcher: str) -> str:
    """'openmpi', 'mpich', or '' when `launcher --version` does not tell."""
    try:
        text = run([launcher, "--version"], "asking the launcher", env=environment())
    except InterposeError:
        return ""
    if "Open MPI" in text or "PRRTE" in text or "prte" in text:
        return "openmpi"
    return "mpich" if "HYDRA" in text.upper() or "MPICH" in text or "Intel(R) MPI" in text else ""
