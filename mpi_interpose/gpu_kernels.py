"""Compile csrc/gpu/kernels.cu to the PTX text that is shipped: `python -m undertow.mpi_interpose.gpu_kernels`.

Users need no CUDA compiler: the driver translates PTX for the device at hand and keeps the result in its own cache, or
gpu_build has assembled it beforehand. The text is committed, so that a change of the kernels shows in review. Its first
line holds a hash of the sources and the compiler's release; `--check` compares the hash, and the whole text where the
same nvcc is at hand. nvcc is the machine's, or PyPI's (the extra `cuda-build`).
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tempfile
from pathlib import Path

from .compile import CSRC, run
from .errors import InterposeError
from .gpu_build import PTX as TARGET
from .gpu_build import find_tool

SOURCE = CSRC / "gpu" / "kernels.cu"
INCLUDED = tuple(CSRC / "gpu" / name for name in ("pieces.hh", "shapes.hh"))
ARCHITECTURE = "compute_75"  # the oldest that CUDA 13 compiles for; the driver translates it for every newer device
PTX_VERSION = "8.0"  # readable by drivers from R525 (CUDA 12.0) on; the kernels use nothing newer


def find_nvcc() -> str | None:
    """nvcc on PATH, else PyPI's."""
    return find_tool("nvcc")


def release(nvcc: str) -> str:
    """For example '13.0'."""
    found = re.search(r"release ([\d.]+)", run([nvcc, "--version"], "asking nvcc for its version"))
    return found.group(1) if found else "unknown"


def heading(version: str) -> str:
    """The first line of the shipped text."""
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in (SOURCE, *INCLUDED))).hexdigest()
    return f"// {SOURCE.name}, {', '.join(file.name for file in INCLUDED)} {digest}, nvcc {version}"


def compiled() -> str:
    """The PTX of the source as it is now; InterposeError without nvcc."""
    nvcc = find_nvcc()
    if not nvcc:
        raise InterposeError("no nvcc on PATH; install a CUDA toolkit, or `pip install undertow[cuda-build]`")
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "kernels.ptx"
        run([nvcc, "-std=c++17", "-O3", f"-arch={ARCHITECTURE}", "-ptx", str(SOURCE), "-o", str(output)], "nvcc")
        return heading(release(nvcc)) + "\n" + portable(output.read_text())


def portable(ptx: str) -> str:
    """An older version number, without the comments and hints that name the compiler's build."""
    lines = [
        line.rstrip()
        for line in ptx.splitlines()
        if line.strip() and not line.lstrip().startswith("//") and "used_bytes_mask" not in line
    ]
    text = "\n".join(lines) + "\n"
    return re.sub(r"^\.version .*$", f".version {PTX_VERSION}", text, flags=re.MULTILINE)


def belongs() -> bool:
    """Whether the shipped text was made from the sources as they are."""
    shipped = TARGET.read_text()
    first = shipped.splitlines()[0]
    version = first.rsplit(" ", 1)[1]
    if first != heading(version):
        return False
    nvcc = find_nvcc()
    return not nvcc or release(nvcc) != version or compiled() == shipped


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the shipped text, write nothing")
    options = parser.parse_args(argv)
    if options.check:
        same = belongs()
        sys.stdout.write(f"{TARGET.name} {'belongs to' if same else 'DIFFERS from'} {SOURCE.name}\n")
        return 0 if same else 1
    text = compiled()
    TARGET.write_text(text)
    sys.stdout.write(f"{TARGET} ({len(text)} bytes)\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InterposeError as error:
        sys.exit(f"gpu_kernels: {error}")
