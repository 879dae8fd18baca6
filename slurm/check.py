"""Is this node fit to train? Asked on every node before the ranks start, because one bad node stops them all.

Looked at: torch is installed, the GPUs are there and each can compute, the run's folder can be written and has room.
One line per fault, with the node's name; a fit node says one line too.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from importlib.util import find_spec
from pathlib import Path

from ..dist.units import format_bytes


def faults(folder: Path, *, gpus: int, disk_bytes: int) -> list[str]:
    """What is wrong with this node; empty when it is fit."""
    return _folder_faults(folder, disk_bytes) + _gpu_faults(gpus)


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _folder_faults(folder: Path, disk_bytes: int) -> list[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".fit-") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return [f"{folder} cannot be written ({error.strerror})"]
    return (
        [f"{folder} has {format_bytes(free)} free, less than {format_bytes(disk_bytes)}"] if free < disk_bytes else []
    )


def _gpu_faults(gpus: int) -> list[str]:
    if find_spec("torch") is None:
        return ["python has no torch"]
    if not gpus:
        return []
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen < gpus:
        return [f"{seen} CUDA devices, fewer than {gpus}"]
    bad = []
    for index in range(gpus):
        try:
            x = torch.ones(1024, 1024, device=f"cuda:{index}")
            if (x @ x).sum().item() != 1024.0**3:
                bad.append(f"cuda:{index} computes wrongly")
        except RuntimeError as error:
            bad.append(f"cuda:{index} fails ({str(error).splitlines()[0]})")
    return bad
