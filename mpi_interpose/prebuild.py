"""What the wheel holds compiled: the preloads of the two fixed ABIs, and the core for `explain` and `doctor`.

setup.py calls `build_into` while the wheel is made. Without a C++ compiler, or on another system than Linux, nothing is
prebuilt, the wheel is a pure one, and everything is built at first use as in a checkout. Beside each library stands a
line of text with the digest of its sources and the processor, so that it is used for no other sources.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .build import LINK_FLAGS, fixed_units
from .compile import CSRC, Unit, compiler, core_units, digest_of, link
from .errors import InterposeError


def libraries() -> dict[str, tuple[list[Unit], tuple[str, ...]]]:
    """Name → units and link flags of each library that is shipped."""
    fixed = {f"libundertow_mpi_{flavour}": (fixed_units(flavour), LINK_FLAGS) for flavour in ("abi", "mpich")}
    return {**fixed, "libundertow_mpi_core": ([*core_units(), Unit("capi", CSRC / "core" / "capi.cc")], ())}


def build_into(folder: Path) -> list[Path]:
    """Compile what is shipped into `folder`; the libraries, or nothing where there is no compiler."""
    if not sys.platform.startswith("linux"):
        return []
    try:
        compiler()
    except InterposeError as error:
        sys.stderr.write(f"undertow: nothing is prebuilt, the wheel will be a pure one: {error}\n")
        return []
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, (units, flags) in libraries().items():
        target = link(units, (), folder / f"{name}.so", (*flags, "-Wl,--strip-all"))
        target.with_suffix(".txt").write_text(f"{digest_of(units)} {platform.machine()}\n")
        made.append(target)
    return made


def platform_tag(libraries: Sequence[Path]) -> str:
    """'manylinux_2_34_x86_64': the oldest glibc that has every symbol version the libraries name (PEP 600).

    Where they need a library beside glibc's own, or no glibc, it is 'linux_x86_64', which is for this machine only.
    """
    versions, needed = {(2, 5)}, set()
    for library in libraries:
        data = library.read_bytes()
        versions |= {(int(a), int(b)) for a, b in re.findall(rb"\0GLIBC_(\d+)\.(\d+)", data)}
        listed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=False).stdout
        needed |= set(re.findall(r"\(NEEDED\).*\[(.+)\]", listed)) or {"unknown"}
    allowed = r"(libc|libm|libdl|libpthread|librt)\.so\.\d|ld-linux.*"
    if platform.libc_ver()[0] != "glibc" or not all(re.fullmatch(allowed, name) for name in needed):
        return f"linux_{platform.machine()}"
    major, minor = max(versions)
    return f"manylinux_{major}_{minor}_{platform.machine()}"
