"""The preload with AddressSanitizer and UndefinedBehaviorSanitizer inside, and the variables that a rank then needs."""

from __future__ import annotations

import subprocess
from functools import lru_cache
from pathlib import Path

from mpis import Install

from undertow.mpi_interpose import build
from undertow.mpi_interpose.compile import SANITIZE_FLAGS, core_units, link
from undertow.mpi_interpose.toolchain import probe


@lru_cache
def preload(mpicc: str) -> Path:
    """Built once beside the plain library; without AVX-512, whose objects few machines could run."""
    mpi = probe(mpicc)
    plain = build.library(mpi)
    target = plain.parent / f"sanitized{SANITIZE_FLAGS[0]}" / plain.name
    if target.exists():
        return target
    core = core_units(("generic", "avx2"))
    names = {unit.name for unit in core_units()}
    glue = [unit for unit in build.units(mpi) if unit.name not in names]
    return link([*core, *glue], SANITIZE_FLAGS, target, ("-ldl", "-lpthread"))


def runtime() -> str:
    """What must be loaded first: the sanitizer, and the C++ library whose exceptions it looks up when it starts."""
    names = ("libasan.so", "libstdc++.so.6")
    ask = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True) for name in names]
    return " ".join(done.stdout.strip() for done in ask)


def variables(install: Install, leaks: bool) -> list[str]:
    """NAME=VALUE words for `env`; an error ends the program. `leaks`: not for Python, which never frees everything."""
    return [
        f"LD_PRELOAD={runtime()} {preload(install.mpicc)}",
        f"ASAN_OPTIONS=detect_leaks={int(leaks)}",
        "UBSAN_OPTIONS=print_stacktrace=1",
    ]
