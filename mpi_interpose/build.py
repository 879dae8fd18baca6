"""Build the preload library for one MPI: core + glue + generated wrappers, into the cache.

The library's folder is named after the MPI (flavour and a hash of everything the probe saw) and after our sources, so
an upgrade of either builds anew and old processes keep the file they have mapped. Models measured for that MPI lie in
the same folder, where the library finds them by itself.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from . import fortran
from .compile import CSRC, Unit, cache_folder, core_units, gpu_units, headers_digest, link
from .generate import entries, exports, reals
from .toolchain import Mpi

GLUE = (
    "resolve",
    "decode",
    "prove",
    "types",
    "report",
    "model",
    "transfer",
    "requests",
    "state",
    "graph",
    "reorder",
    "entries",
)
POLICY = CSRC / "policy"


def generated(mpi: Mpi) -> dict[str, str]:
    symbols = set(mpi.symbols)
    texts = {"reals.inc": reals(symbols), "entries.inc": entries(symbols), "exports.cc": exports(symbols)}
    if mpi.flavour == "openmpi":
        texts["fortran.cc"] = fortran.source(symbols)
    return texts


def builtin_model(flavour: str) -> str:
    """The measured table that a flavour starts with; the standard ABI is served by MPICH so far."""
    path = POLICY / f"{'mpich' if flavour == 'abi' else flavour}.txt"
    return path.read_text() if path.exists() else ""


def _literal(text: str) -> str:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return "\n".join(f'    "{line}\\n"' for line in lines) or '    ""'


def _units(mpi: Mpi, folder: Path) -> list[Unit]:
    flags = [f"-I{folder}", *mpi.include_flags]
    if mpi.flavour == "abi":
        flags.append("-DUNDERTOW_ABI=1")
    if tuple(map(int, mpi.standard.split("."))) >= (4, 1):
        flags.append("-DUNDERTOW_COMBINER_VALUE_INDEX=1")
    facts = (
        f'extern "C" {{\nextern const char undertow_built_for[];\nextern const char undertow_flavour_name[];\n'
        f"extern const char undertow_builtin_model[];\n"
        f'const char undertow_built_for[] = "{mpi.version[:60]}";\n'
        f'const char undertow_flavour_name[] = "{mpi.flavour}";\n'
        f"const char undertow_builtin_model[] =\n{_literal(builtin_model(mpi.flavour))};\n}}\n"
    )
    # The generated headers are part of a unit's text for the cache key: objects must not outlive them.
    stamp = "-DUNDERTOW_STAMP=" + folder.name.replace("-", "_")
    glue = [Unit(name, CSRC / "abi" / f"{name}.cc", (*flags, stamp)) for name in GLUE]
    if mpi.flavour == "openmpi":
        glue.append(Unit("fortran", folder / "fortran.cc", (*flags, stamp)))
    glue.append(Unit("hook", CSRC / "gpu" / "hook.cc", (*flags, stamp)))
    return [*core_units(), *gpu_units(), *glue, Unit("exports", folder / "exports.cc"), Unit("facts", facts)]


def library(mpi: Mpi) -> Path:
    """The preload library for `mpi`, built unless the cache has it; InterposeError in one line when it cannot be."""
    texts = generated(mpi)
    sources = [path.read_text() for path in sorted([*CSRC.rglob("*.cc"), *CSRC.rglob("*.ptx")])]
    key = "\n".join([mpi.key, headers_digest(), *sources, *texts.values(), builtin_model(mpi.flavour)])
    folder = cache_folder() / f"{mpi.key}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    target = folder / f"libundertow_mpi_{mpi.flavour}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        scratch = folder / f"{name}.{id(text)}.tmp"
        scratch.write_text(text)
        scratch.replace(folder / name)
    return link(_units(mpi, folder), (), target, ("-ldl", "-lpthread", "-Wl,-z,now", "-Wl,-z,defs"))
