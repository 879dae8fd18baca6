"""Build the preload library for one MPI: core + glue + generated wrappers, into the cache.

The library's folder is named after the MPI (flavour and a hash of everything the probe saw) and after our sources, so
an upgrade of either builds anew and old processes keep the file they have mapped. Models measured for that MPI lie in
the same folder, where the library finds them by itself. An MPI whose ABI is fixed (standard.py) gets a copy of the one
library of that ABI, which the wheel holds ready; the others are built with their own mpi.h.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from . import fortran, standard
from .compile import CSRC, Unit, cache_folder, core_units, digest_of, link, shipped
from .errors import InterposeError
from .generate import entries, exports, reals
from .gpu_build import gpu_units
from .progress import units_done
from .toolchain import Mpi

GLUE = (
    "resolve",
    "contents",
    "decode",
    "prove",
    "types",
    "passing",
    "patience",
    "script",
    "report",
    "model",
    "transfer",
    "requests",
    "round",
    "state",
    "place",
    "reorder",
    "entries",
)
POLICY = CSRC / "policy"


LINK_FLAGS = ("-ldl", "-lpthread", "-Wl,-z,now", "-Wl,-z,defs")


def generated(flavour: str, symbols: set[str]) -> dict[str, str]:
    """Name → text of the generated sources, without an mpi.h of our own."""
    texts = {"reals.inc": reals(symbols), "entries.inc": entries(symbols), "exports.cc": exports(symbols)}
    if flavour in fortran.FLAVOURS:
        texts["fortran.cc"] = fortran.source(flavour, symbols)
    return texts


def builtin_model(flavour: str) -> str:
    """The measured table that a flavour starts with; the standard ABI is served by MPICH so far."""
    path = POLICY / f"{'mpich' if flavour == 'abi' else flavour}.txt"
    return path.read_text() if path.exists() else ""


def _literal(text: str) -> str:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return "\n".join(f'    "{line}\\n"' for line in lines) or '    ""'


def units(mpi: Mpi) -> list[Unit]:
    """The translation units of the library for `mpi`; the generated sources are written to the cache."""
    fixed = fixed_abi(mpi)
    if fixed:
        return fixed_units(fixed)
    flags = [*mpi.include_flags, f"-DUNDERTOW_BUILT_FOR_{mpi.key.replace('-', '_').upper()}"]  # its mpi.h is not read
    if mpi.flavour == "abi":
        flags.append("-DUNDERTOW_ABI=1")
    if tuple(map(int, mpi.standard.split("."))) >= (4, 1):
        flags.append("-DUNDERTOW_COMBINER_VALUE_INDEX=1")
    return _units(mpi.flavour, mpi.version, tuple(flags), generated(mpi.flavour, set(mpi.symbols)))


def fixed_abi(mpi: Mpi) -> str | None:
    """'abi' or 'mpich' when the library of that fixed ABI serves `mpi`, else None."""
    return standard.fits(mpi.flavour, mpi.library, mpi.symbols)


def fixed_units(flavour: str) -> list[Unit]:
    """Those of a fixed ABI: the same everywhere, with a header of our own."""
    flags = ["-DUNDERTOW_COMBINER_VALUE_INDEX=1", *(["-DUNDERTOW_ABI=1"] if flavour == "abi" else [])]
    texts = {**generated(flavour, set(standard.SYMBOLS_KNOWN)), "mpi.h": standard.header(flavour)}
    return _units(flavour, f"the {flavour} ABI", tuple(flags), texts)


def _units(flavour: str, version: str, flags: tuple[str, ...], texts: dict[str, str]) -> list[Unit]:
    folder = _written(texts)
    facts = (
        f'extern "C" {{\nextern char undertow_built_for[];\nextern const char undertow_flavour_name[];\n'
        f"extern const char undertow_builtin_model[];\n"
        f'char undertow_built_for[256] = "{version[:60]}";\n'
        f'const char undertow_flavour_name[] = "{flavour}";\n'
        f"const char undertow_builtin_model[] =\n{_literal(builtin_model(flavour))};\n}}\n"
    )
    glue = [Unit(name, CSRC / "abi" / f"{name}.cc", flags, (folder,)) for name in GLUE]
    if flavour in fortran.FLAVOURS:
        glue.append(Unit("fortran", folder / "fortran.cc", flags, (folder,)))
    glue += [Unit(name, CSRC / "gpu" / f"{name}.cc", flags, (folder,)) for name in ("hook", "ipc")]
    return [*core_units(), *gpu_units(), *glue, Unit("exports", folder / "exports.cc"), Unit("facts", facts)]


def _written(texts: dict[str, str]) -> Path:
    """A folder of the cache with these files, named after their contents."""
    digest = hashlib.sha256("\0".join(f"{name}\0{text}" for name, text in texts.items()).encode()).hexdigest()[:16]
    folder = cache_folder() / "generated" / digest
    for name, text in texts.items():
        _appear(folder / name, text.encode())
    return folder


def _appear(target: Path, data: bytes) -> None:
    """Write a file by rename, unless it is there with as many bytes."""
    if target.exists() and target.stat().st_size == len(data):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as scratch:
        scratch.write(data)
    os.chmod(scratch.name, 0o755 if target.suffix == ".so" else 0o644)
    os.replace(scratch.name, target)


def origin(mpi: Mpi) -> str:
    """'prebuilt' when the library for `mpi` came with the package, else how it is made."""
    fixed = fixed_abi(mpi)
    if fixed and shipped(f"libundertow_mpi_{fixed}", digest_of(fixed_units(fixed))):
        return "prebuilt, came with the package"
    return "built here" + (", with our own declarations of the ABI" if fixed else f" by {mpi.mpicc}'s flags")


def library(mpi: Mpi) -> Path:
    """The preload library for `mpi`, built unless shipped or cached; InterposeError in one line when it cannot be."""
    parts = units(mpi)
    digest = digest_of(parts)
    name = f"libundertow_mpi_{mpi.flavour}"
    target = cache_folder() / f"{mpi.key}-{digest[:12]}" / f"{name}.so"
    if target.exists():
        return target
    ready = shipped(name, digest) if fixed_abi(mpi) else None
    if ready:
        _appear(target, ready.read_bytes())
        return target
    if not mpi.mpicc and not fixed_abi(mpi):
        raise InterposeError(
            f"the preload for {mpi.version[:40].strip()} is built at first use with that MPI's mpi.h, but only its "
            f"library {mpi.library} was found; install its compiler wrapper (libopenmpi-dev) or name it with --mpicc"
        )
    try:
        with units_done(f"building the preload for {mpi.version[:40].strip()}, once") as done:
            return link(parts, (), target, LINK_FLAGS, done)
    except InterposeError as error:
        if shutil.which("g++") is None and not fixed_abi(mpi):
            what = f"the preload for {mpi.version[:40].strip()} is built at first use: {error}"
            raise InterposeError(what) from error
        raise
