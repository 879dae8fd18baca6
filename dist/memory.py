"""How much memory this process holds, held at most, and may still take, on the host and on its CUDA device.

Host numbers come from /proc, because the peak there can be reset (`VmHWM` by writing 5 to clear_refs), and PSS, which
counts a page shared by n processes as 1/n, is the number that adds up over ranks. What may still be taken respects the
container's limit (cgroup v1 and v2), which psutil does not see.
"""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:  # `undertow env` reads the host's memory where no torch is installed
    import torch

_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2^63 for "no limit"


@dataclass(frozen=True)
class Memory:
    """Bytes. None where the system does not tell. `device_*` are 0 without CUDA.

    `rss` resident; `pss` resident with shared pages divided; `peak_rss` since the last `reset_peak` (or the start);
    `shared` resident shared memory; `locked` mlocked pages; `pinned` page-locked host memory held by torch's allocator,
    whose blocks are powers of two; `shm_used` of /dev/shm, by all processes.
    """

    rss: int
    peak_rss: int
    pss: int | None = None
    shared: int | None = None
    locked: int | None = None
    pinned: int = 0
    shm_used: int | None = None
    device_allocated: int = 0
    device_reserved: int = 0
    device_peak_allocated: int = 0
    device_peak_reserved: int = 0


def read(device: torch.device | None = None, *, pss: bool = True) -> Memory:
    """This process's memory now, and that of `device` when it is CUDA. For PSS the kernel walks all pages, in
    milliseconds that grow with what is resident: a loop leaves it out, `pss=False`."""
    status = _kib_fields(Path("/proc/self/status"))
    rollup = _kib_fields(Path("/proc/self/smaps_rollup")) if pss else {}
    rss = status.get("VmRSS", psutil.Process().memory_info().rss)
    on_device: dict[str, int] = {}
    if device is not None and device.type == "cuda":
        import torch

        on_device = {
            "device_allocated": torch.cuda.memory_allocated(device),
            "device_reserved": torch.cuda.memory_reserved(device),
            "device_peak_allocated": torch.cuda.max_memory_allocated(device),
            "device_peak_reserved": torch.cuda.max_memory_reserved(device),
        }
    return Memory(
        rss=rss,
        peak_rss=status.get("VmHWM", rss),
        pss=rollup.get("Pss"),
        shared=status.get("RssShmem"),
        locked=status.get("VmLck"),
        pinned=_pinned_bytes(),
        shm_used=_shm_used(),
        **on_device,
    )


def reset_peak(device: torch.device | None = None) -> bool:
    """Start the peaks anew. Returns whether the kernel allowed it for the host's peak (some containers do not)."""
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def free_bytes(device: torch.device | None = None) -> int:
    """What this process may still allocate. On CUDA, torch's cached but unused blocks count as free."""
    if device is not None and device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(psutil.virtual_memory().available, *_cgroup_free(), _UNLIMITED)


def _cgroup_free(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes left below each memory limit above this process; the page cache that can be dropped counts as left."""
    left = []
    for line in _read(membership).splitlines():
        controllers, path = line.split(":", 2)[1:]
        if controllers == "":
            base, limit_file, usage_file, cache_field = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, cache_field = root / "memory", "total_inactive_file"
            limit_file, usage_file = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = base / path.lstrip("/")
        for level in (folder, *folder.parents):
            if level == base.parent:
                break
            limit, usage = _read(level / limit_file).strip(), _read(level / usage_file).strip()
            if limit.isdigit() and usage.isdigit() and int(limit) < _UNLIMITED:
                cache = re.search(rf"^{cache_field} (\d+)$", _read(level / "memory.stat"), re.MULTILINE)
                left.append(max(0, int(limit) - int(usage) + (int(cache[1]) if cache else 0)))
    return left


def _pinned_bytes() -> int:
    torch = sys.modules.get("torch")  # who has not imported it has pinned nothing
    if torch is None or not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return 0
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))


def _shm_used() -> int | None:
    try:
        return shutil.disk_usage("/dev/shm").used
    except OSError:
        return None


def _kib_fields(path: Path) -> dict[str, int]:
    """`Name:   123 kB` lines → bytes by name."""
    return {match[1]: int(match[2]) << 10 for match in re.finditer(r"^(\w+):\s+(\d+) kB$", _read(path), re.MULTILINE)}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
