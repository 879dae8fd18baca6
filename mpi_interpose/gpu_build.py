"""What is compiled for the device side, and the kernels' machine code where a CUDA assembler is at hand.

The kernels are shipped as PTX (csrc/gpu/kernels.ptx), which every driver translates for its card: some tenths of a
second at first use, kept by the driver where it may write a cache. Where ptxas and fatbinary are found when a library
is built (a toolkit's, or PyPI's by the extra `cuda-build`), the same PTX is also assembled for ASSEMBLED and embedded
as a fatbin, which is tried first; where the driver is older than the assembler, or the card another, it is the PTX that
is loaded. The fatbin is no part of what names a library: it is the same program with and without, and a wheel that has
it serves machines without the tools.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

from .compile import CSRC, Unit, cache_folder, run
from .errors import InterposeError

SOURCES = ("driver", "choose", "lower", "paths", "context", "device", "ring", "slab")
PTX = CSRC / "gpu" / "kernels.ptx"
ASSEMBLED = (80, 90)  # code for sm_80 serves 8.x, that for sm_90 is Hopper's
MAGIC = (0xBA55ED50).to_bytes(4, "little")  # a fatbin begins so


def gpu_units() -> list[Unit]:
    """The device side without MPI: the driver's functions at run time; the kernels and the paths as constants."""
    texts = {"kernels": PTX, "paths": CSRC / "policy" / "gpu.txt"}
    units = [Unit(name, CSRC / "gpu" / f"{name}.cc") for name in SOURCES]
    units += [Unit(f"gpu_{name}", _constant(f"undertow_gpu_{name}", file)) for name, file in texts.items()]
    return [*units, Unit("gpu_binary", _embedded, aside=True)]


def find_tool(name: str) -> str | None:
    """A program of the CUDA compiler: on PATH, else the one that PyPI's package put beside this Python's packages."""
    found = shutil.which(name)
    if found:
        return found
    for folder in map(Path, sys.path):
        for candidate in sorted((folder / "nvidia").glob(f"*/bin/{name}")):
            return str(candidate)
    return None


@lru_cache(maxsize=1)
def binary() -> Path | None:
    """The kernels' fatbin, assembled into the cache on first use; None (said once) where that cannot be done."""
    tools = [find_tool(name) for name in ("ptxas", "fatbinary")]
    if not all(tools):
        return None
    ptxas, fatbinary = map(str, tools)
    stamps = [f"{tool} {os.stat(tool).st_size} {os.stat(tool).st_mtime_ns}" for tool in (ptxas, fatbinary)]
    key = hashlib.sha256("\n".join([*stamps, str(ASSEMBLED), PTX.read_text()]).encode()).hexdigest()[:20]
    target = cache_folder() / "objects" / f"kernels-{key}.fatbin"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / "kernels.fatbin"
            images = []
            for number in ASSEMBLED:
                code = Path(scratch) / f"sm_{number}.cubin"
                run([ptxas, f"-arch=sm_{number}", "-O3", str(PTX), "-o", str(code)], f"assembling {PTX.name}")
                images.append(f"--image3=kind=elf,sm={number},file={code}")
            run([fatbinary, "-64", f"--create={made}", *images], "putting the kernels' machine code together")
            made.replace(target)
    except InterposeError as error:
        sys.stderr.write(f"undertow: the pack kernels stay PTX, which the driver translates: {error}\n")
        return None
    return target


def held_by(library: Path) -> bool:
    """Whether a built library holds machine code beside the PTX."""
    return MAGIC in library.read_bytes()


def _embedded() -> str:
    """C++ that defines `undertow_gpu_binary`: where the fatbin begins, or null."""
    file = binary()
    begin = "nullptr"
    lines = []
    if file:
        begin = "undertow_gpu_fatbin"
        lines = [
            f"// {file.name}",
            'asm(".section .rodata\\n.balign 64\\n.hidden undertow_gpu_fatbin\\n.globl undertow_gpu_fatbin\\n"',
            f'    "undertow_gpu_fatbin:\\n.incbin \\"{file}\\"\\n.previous\\n");',
            "extern const char undertow_gpu_fatbin[];",
        ]
    lines += ["extern const char* const undertow_gpu_binary;", f"const char* const undertow_gpu_binary = {begin};"]
    return 'extern "C" {\n' + "\n".join(lines) + "\n}\n"


def _constant(name: str, file: Path) -> str:
    """C++ that defines `name` as the text of `file`."""
    lines = "\n".join(
        '"' + line.replace("\\", "\\\\").replace('"', '\\"') + '\\n"' for line in file.read_text().splitlines()
    )
    return f'extern "C" {{\nextern const char {name}[];\nconst char {name}[] =\n{lines};\n}}\n'
