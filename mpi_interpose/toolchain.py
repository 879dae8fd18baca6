"""Which MPI is this: found from an mpicc, by compiling and running one small probe.

Every fact that decides how the interposer is built comes from the probe, not from names: the library's version text,
the file that provides MPI_Init, which ABI the handles have, and which functions exist. Where there is no compiler the
library itself is looked for near the launcher and asked (`look`), which is enough for the preloads that are shipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from .compile import cache_folder, run
from .errors import InterposeError
from .signatures import OWN, OWN_OPTIONAL, SYMBOLS

PROBE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <mpi.h>
#include <stdio.h>
int main(int argc, char** argv) {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = "";
  int length = 0, version = 0, subversion = 0;
  Dl_info where = {0};
  MPI_Get_library_version(text, &length);
  MPI_Get_version(&version, &subversion);
  dladdr(dlsym(RTLD_DEFAULT, "MPI_Get_library_version"), &where);
  printf("standard %d.%d\nfile %s\nstatus %d\nhandle %d\n", version, subversion, where.dli_fname,
         (int)sizeof(MPI_Status), (int)sizeof(MPI_Datatype));
  for (int i = 1; i < argc; ++i)
    if (dlsym(RTLD_DEFAULT, argv[i])) printf("has %s\n", argv[i]);
  printf("version %s\n", text);
  return 0;
}
"""


@dataclass(frozen=True)
class Mpi:
    """One MPI installation as its probe saw it."""

    mpicc: str
    flavour: str  # 'openmpi', 'mpich' or 'abi'
    version: str  # first line of MPI_Get_library_version
    standard: str
    library: str
    status_bytes: int
    handle_bytes: int
    include_flags: tuple[str, ...]
    symbols: tuple[str, ...]

    @property
    def key(self) -> str:
        """Names the build: a different library, or a different set of symbols, is another build."""
        facts = json.dumps(asdict(self), sort_keys=True)
        return f"{self.flavour}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"


def environment() -> dict[str, str]:
    """The environment for our own small MPI programs: Open MPI must be allowed to run as root, nothing is preloaded."""
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    return env


def show(mpicc: str) -> list[str]:
    """The compile command behind a wrapper (`-show` in MPICH's, `--showme` in Open MPI's)."""
    for option in ("-show", "--showme"):
        try:
            done = subprocess.run([mpicc, option], capture_output=True, text=True, check=False)
        except OSError as error:
            raise InterposeError(f"cannot run {mpicc}: {error}") from error
        if done.returncode == 0 and "-l" in done.stdout:
            return done.stdout.split()
    raise InterposeError(f"{mpicc} answers neither -show nor --showme; expected an MPI compiler wrapper (--mpicc PATH)")


def probe(mpicc: str) -> Mpi:
    """Compile and run the probe with `mpicc`; cached by the wrapper's answer and the library file's time and size."""
    command = show(mpicc)
    includes = tuple(word for word in command if word.startswith(("-I", "-D")))
    names = [*SYMBOLS, *(f"MPI_{name}" for name in (*OWN, *OWN_OPTIONAL))]
    question = "\n".join([mpicc, *command, PROBE, *names])
    cached = cache_folder() / "probes" / (hashlib.sha256(question.encode()).hexdigest()[:20] + ".json")
    known = _recall(cached)
    if known:
        return known
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "probe.c", Path(folder) / "probe"
        source.write_text(PROBE)
        run([mpicc, str(source), "-o", str(program), "-ldl"], f"compiling a probe with {mpicc}")
        answer = run([str(program), *names], f"running a probe built by {mpicc}", env=environment())
    facts = dict(line.split(" ", 1) for line in answer.splitlines() if not line.startswith("has ") and " " in line)
    symbols = tuple(sorted(line[4:] for line in answer.splitlines() if line.startswith("has ")))
    mpi = Mpi(
        mpicc=mpicc,
        flavour=_flavour(facts["version"], Path(facts["file"]).name),
        version=facts["version"].strip(),
        standard=facts["standard"],
        library=facts["file"],
        status_bytes=int(facts["status"]),
        handle_bytes=int(facts["handle"]),
        include_flags=includes,
        symbols=symbols,
    )
    cached.parent.mkdir(parents=True, exist_ok=True)
    stamp = _stamp(mpi.library)
    scratch = cached.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps({"stamp": stamp, "mpi": asdict(mpi)}))
    scratch.replace(cached)
    return mpi


LIBRARIES = ("libmpi.so.12", "libmpich.so.12", "libmpi.so.40", "libmpi.so.80")
ASK = """
import ctypes, sys
lib = ctypes.CDLL(sys.argv[1])
text, length, a, b = ctypes.create_string_buffer(8192), ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
lib.MPI_Get_library_version(text, ctypes.byref(length))
lib.MPI_Get_version(ctypes.byref(a), ctypes.byref(b))
print(f"{a.value}.{b.value}")
print(*(name for name in sys.argv[2:] if hasattr(lib, name)))
print(text.value.decode().split(chr(10))[0])
"""


def look(folders: list[Path], abi: bool) -> Mpi | None:
    """The MPI whose library belongs to the programs in one of these folders, asked without a compiler; or None."""
    roots = dict.fromkeys([*(place.resolve() for place in folders), *folders])
    multiarch = str(sysconfig.get_config_var("MULTIARCH") or "")
    listed = [Path(word) for word in os.environ.get("LD_LIBRARY_PATH", "").split(":") if word]
    places = [root.parent / lib for root in roots for lib in ("lib", "lib64", f"lib/{multiarch}")]
    for name in ("libmpi_abi.so.1",) if abi else LIBRARIES:
        for folder in [*places, *listed]:
            if (folder / name).exists():
                return _ask((folder / name).resolve())
    return None


def _ask(library: Path) -> Mpi:
    from .standard import HANDLE_BYTES, STATUS_BYTES

    names = sorted({*SYMBOLS, *(f"MPI_{name}" for name in (*OWN, *OWN_OPTIONAL))})
    answer = run([sys.executable, "-c", ASK, str(library), *names], f"asking {library}", env=environment())
    standard, symbols, version = answer.splitlines()[:3]
    flavour = _flavour(version, library.name)
    sizes = {"status_bytes": STATUS_BYTES[flavour], "handle_bytes": HANDLE_BYTES[flavour]}
    return Mpi(
        "", flavour, version.strip(), standard, str(library), **sizes, include_flags=(), symbols=tuple(symbols.split())
    )


def _stamp(library: str) -> list[int]:
    info = os.stat(library)
    return [info.st_mtime_ns, info.st_size]


def _recall(cached: Path) -> Mpi | None:
    try:
        data = json.loads(cached.read_text())
        fields = data["mpi"]
        mpi = Mpi(**{**fields, **{name: tuple(fields[name]) for name in ("include_flags", "symbols")}})
        return mpi if data["stamp"] == _stamp(mpi.library) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or written by another version: probe again


def _flavour(version: str, library: str) -> str:
    if library.startswith("libmpi_abi"):
        return "abi"
    if version.startswith("Open MPI"):
        return "openmpi"
    if "MPICH" in version or "Intel(R) MPI" in version or "MVAPICH" in version:
        return "mpich"
    raise InterposeError(
        f"unknown MPI '{version[:60]}' ({library}); expected Open MPI, MPICH or the MPI-5 standard ABI"
    )
