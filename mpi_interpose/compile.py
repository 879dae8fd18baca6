"""Compile C++ sources into a cache: objects keyed by compiler, flags, the source and what it includes.

The interposer cannot be shipped compiled for MPIs whose handles differ, so it is built where it runs, once. The key
is a hash over contents, never over times, and files appear by rename, so that any number of ranks or test processes
may build at the same time and all end with the same file. What is shipped compiled (prebuilt/, see prebuild.py) is
used where it was made of the very same sources.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .errors import InterposeError

CSRC = Path(__file__).parent / "csrc"
PREBUILT = Path(__file__).parent / "prebuilt"
INCLUDE = tuple(CSRC / room for room in ("core", "abi", "gpu"))
CORE = ("ir", "passes", "walk", "plan", "exec", "graph")
LONGEST = ("kernels_", "entries")  # units of 4 to 6 s; the others take one or less
BASE_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-g1", "-fvisibility=hidden", "-Wall", "-Wextra")
ISA_FLAGS = {
    "generic": (),
    "avx2": ("-mavx2", "-mbmi2"),
    "avx512": ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mbmi2"),
}
SANITIZE_FLAGS = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")


def cache_folder() -> Path:
    """Where built libraries, models and reports of this user live (UNDERTOW_MPI_CACHE, else XDG's cache)."""
    named = os.environ.get("UNDERTOW_MPI_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "undertow" / "mpi"


def compiler() -> str:
    """The C++ compiler (CXX, else g++, c++, clang++); InterposeError in one line when there is none."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "c++", "clang++")):
        found = shutil.which(name)
        if found:
            return found
    raise InterposeError(
        "no C++ compiler found (looked for $CXX, g++, c++, clang++); install one (for example `apt install g++`)"
    )


def run(command: list[str], what: str, **options) -> str:
    """Run a tool and give back its output; InterposeError with its last lines when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    except OSError as error:
        raise InterposeError(f"{what}: cannot start {command[0]} ({error})") from error
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-12:])
        raise InterposeError(f"{what} failed: {' '.join(command[:3])} … ended with {done.returncode}\n{tail}")
    return done.stdout


@lru_cache(maxsize=512)
def _names(text: str) -> list[str]:
    """What a source names in #include lines, also those that the preprocessor may leave out."""
    return re.findall(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"\n]+)[>"]', text, flags=re.MULTILINE)


@dataclass(frozen=True)
class Unit:
    """One translation unit: a source file or generated text, with its own extra flags and folders of generated headers.

    `includes` are searched like -I folders; their paths are no part of the key, what a source includes from them is.
    A unit that is `aside` is no part of what names a library; its text may be a function, called when it is compiled.
    """

    name: str
    source: Path | str | Callable[[], str]
    flags: tuple[str, ...] = ()
    includes: tuple[Path, ...] = ()
    aside: bool = False

    def text(self) -> str:
        if isinstance(self.source, Path):
            return self.source.read_text()
        return self.source if isinstance(self.source, str) else self.source()

    def included(self) -> list[Path]:
        """Our files that the source includes, directly or not, in the order of their first mention."""
        found: dict[Path, None] = {}
        pending = [(self.text(), self.source.parent if isinstance(self.source, Path) else None)]
        while pending:
            text, beside = pending.pop(0)
            for name in _names(text):
                places = [*([beside] if beside else []), *self.includes, *INCLUDE]
                file = next((place / name for place in places if (place / name).is_file()), None)
                if file and file not in found:
                    found[file] = None
                    pending.append((file.read_text(), file.parent))
        return list(found)

    def digest(self, flags: Sequence[str] = ()) -> str:
        """Changes with the source, the files it includes and the flags; not with the compiler."""
        parts = [self.name, *flags, *self.flags, self.text()]
        parts += [f"{file.name}\n{file.read_text()}" for file in self.included()]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def digest_of(units: Sequence[Unit], flags: Sequence[str] = ()) -> str:
    """Names the library made of `units`."""
    named = [unit.digest(flags) for unit in units if not unit.aside]
    return hashlib.sha256("".join(named).encode()).hexdigest()[:20]


def shipped(name: str, digest: str) -> Path | None:
    """The library PREBUILT/NAME.so, if it was made of the sources that `digest` stands for, on such a processor."""
    library = PREBUILT / f"{name}.so"
    try:
        fits = library.with_suffix(".txt").read_text().split() == [digest, platform.machine()]
    except OSError:
        return None
    return library if fits and library.exists() else None


def core_units(sets: tuple[str, ...] = tuple(ISA_FLAGS)) -> list[Unit]:
    """The handle-free core with the kernels of the instruction sets `sets`; only x86-64 has more than the portable."""
    if platform.machine() not in ("x86_64", "AMD64"):
        sets = ("generic",)
    defines = tuple(f"-DUNDERTOW_HAVE_{isa.upper()}" for isa in sets)
    units = [Unit(name, CSRC / "core" / f"{name}.cc", defines) for name in CORE]
    return units + [Unit(f"kernels_{isa}", CSRC / "core" / f"kernels_{isa}.cc", ISA_FLAGS[isa]) for isa in sets]


def compile_unit(unit: Unit, flags: tuple[str, ...], folder: Path) -> Path:
    """Object file of a unit, from the cache or compiled now."""
    cxx = compiler()
    version = run([cxx, "--version"], "asking the compiler for its version").splitlines()[0]
    key = "\n".join((cxx, version, unit.digest(flags)))
    target = folder / "objects" / f"{unit.name}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.o"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        if isinstance(unit.source, Path):
            path = unit.source
        else:
            path = Path(scratch) / f"{unit.name}.cc"
            path.write_text(unit.text())
        output = Path(scratch) / "out.o"
        include = [f"-I{room}" for room in (*unit.includes, *INCLUDE)]
        run([cxx, *BASE_FLAGS, *flags, *include, *unit.flags, "-c", str(path), "-o", str(output)], f"compiling {path}")
        output.replace(target)
    return target


def link(
    units: list[Unit],
    flags: tuple[str, ...],
    target: Path,
    link_flags: tuple[str, ...] = (),
    done: Callable[[int, int], None] = lambda ready, total: None,
) -> Path:
    """Compile `units` (one at a time per core, the longest first) and link them to the shared library `target`.

    `done(ready, total)` is told of each unit.
    """
    folder = cache_folder()
    workers = max(1, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        hurried = sorted(units, key=lambda unit: not unit.name.startswith(LONGEST))
        waiting = {unit.name: pool.submit(compile_unit, unit, flags, folder) for unit in hurried}
        for ready, _ in enumerate(concurrent.futures.as_completed(waiting.values())):
            done(ready + 1, len(units))
        objects = [waiting[unit.name].result() for unit in units]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        output = Path(scratch) / target.name
        sanitize = [flag for flag in flags if flag.startswith("-fsanitize")]
        # A preload comes first for every program: what it exported of the C++ library would replace the program's own.
        exported = Path(scratch) / "exported"
        exported.write_text("{ global: MPI_*; mpi_*; undertow_*; local: *; };\n")
        hidden = ["-static-libstdc++", "-static-libgcc", f"-Wl,--version-script,{exported}", "-Wl,--gc-sections"]
        static = [] if sanitize else hidden
        command = [compiler(), "-shared", *sanitize, *map(str, objects), "-o", str(output), *static, *link_flags]
        run(command, f"linking {target.name}")
        output.replace(target)
    return target


def core_library(sanitize: bool = False) -> Path:
    """The core alone as a shared library with the C ABI of core/capi.cc, for tests and `explain`."""
    flags = SANITIZE_FLAGS if sanitize else ()
    sets = ("generic", "avx2") if sanitize else tuple(ISA_FLAGS)  # the slow build leaves out what few machines run
    units = [*core_units(sets), Unit("capi", CSRC / "core" / "capi.cc")]
    digest = digest_of(units, flags)
    ready = None if sanitize else shipped("libundertow_mpi_core", digest)
    target = cache_folder() / f"libundertow_mpi_core-{digest}{'-asan' if sanitize else ''}.so"
    return ready or (target if target.exists() else link(units, flags, target))
