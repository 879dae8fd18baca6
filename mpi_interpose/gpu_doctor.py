"""What `undertow mpi doctor` says of device buffers: is the MPI CUDA-aware, is there a device, which path is taken.

Asked from outside the program: the library's own answer (MPIX_Query_cuda_support, which needs no MPI_Init) and the
driver's list of devices. No context is created. What holds for each pair of ranks takes the ranks: see gpu_pairs.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

from . import gpu_build
from .build import library as library_of
from .toolchain import Mpi, environment

NOT_STAGED = (
    "window memory and RMA, persistent collectives, partitioned messages, split collective file calls (_begin): this "
    "library cannot read device memory there; each is named once when it happens"
)
_ASK = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
print(library.MPIX_Query_cuda_support() if hasattr(library, "MPIX_Query_cuda_support") else -1)
"""


def cuda_aware(mpi: Mpi) -> bool | None:
    """The library's own answer; None when it has none. Asked in a child, because the library is loaded for it."""
    return answer_of(mpi.library)


def answer_of(library: str) -> bool | None:
    """The answer of the MPI library at this path."""
    done = subprocess.run(
        [sys.executable, "-c", _ASK, library], capture_output=True, text=True, check=False, env=environment()
    )
    answer = done.stdout.strip()
    return {"0": False, "1": True}.get(answer) if done.returncode == 0 else None


def devices() -> list[str]:
    """Names of the devices that the driver shows; empty without a driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    names = []
    for k in range(count.value):
        name = ctypes.create_string_buffer(256)
        if not cuda.cuDeviceGetName(name, 256, k):
            names.append(name.value.decode())
    return names


def rows(mpi: Mpi) -> list[tuple[str, str]]:
    """The doctor's lines on device buffers."""
    wish = os.environ.get("UNDERTOW_MPI_GPU", "auto")
    aware = cuda_aware(mpi)
    library = "the library does not say whether it is CUDA-aware"
    if aware is not None:
        library = "the library says that it is CUDA-aware" if aware else "the library is not CUDA-aware"
    found = devices()
    if wish in ("off", "0"):
        path = "handed on as they are (UNDERTOW_MPI_GPU=off)"
    elif not found:
        path = "no CUDA device here; programs without one pay nothing"
    else:
        how = {
            "direct": "kernels write and read pinned host memory",
            "staged": "kernels work in device scratch, the copy engine moves it to and from pinned host memory",
        }.get(wish, "pinned host memory, by the kernel itself for small messages and by the copy engine for large ones")
        path = f"packed on {', '.join(sorted(set(found)))}; between every pair of ranks through {how}"
        if os.environ.get("UNDERTOW_MPI_IPC", "auto") not in ("", "0"):
            path += "; large blocks of the w collectives through the sender's device memory where all ranks can open it"
    found_rows = [("GPU buffers", path), ("CUDA-aware", library)]
    if not found:
        return found_rows
    if aware is not True and wish not in ("off", "0"):
        found_rows.append(("GPU, not staged", NOT_STAGED))
    return [
        *found_rows,
        ("GPU kernels", kernels(library_of(mpi))),
        ("pairs of ranks", "mpirun -n 2 undertow mpi doctor"),
    ]


def kernels(preload: Path) -> str:
    """What the preload holds for the device; the report of a run says what was loaded, and how long it took."""
    if gpu_build.held_by(preload):
        cards = " and ".join(f"sm_{number}" for number in gpu_build.ASSEMBLED)
        return f"machine code for {cards}, PTX for other cards and older drivers"
    return "PTX, which the driver translates at first use (built without a CUDA assembler: undertow[cuda-build])"
