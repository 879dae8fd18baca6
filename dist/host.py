"""What hangs in this host: processors, memory, GPUs and their links, network cards; read, never measured.

GPUs are asked of nvidia-smi rather than of torch.cuda, so that reading creates no CUDA context: a process that will
fork its ranks, and a bug report on a broken driver, both need that. What is not there is empty; nothing here raises.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

_GPU_FIELDS = ("index", "name", "uuid", "memory.total", "pci.bus_id", "pcie.link.gen.max", "pcie.link.width.max")


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi numbers it (CUDA_VISIBLE_DEVICES may renumber). `pcie` is 'gen5 x16' or ''."""

    index: int
    name: str
    uuid: str
    memory_bytes: int
    pci: str
    pcie: str = ""


@dataclass(frozen=True)
class Nic:
    """A network interface; `kind` is 'ethernet' or 'infiniband'; `bits_per_s` None where the driver does not tell."""

    name: str
    kind: str
    bits_per_s: int | None
    up: bool


@dataclass(frozen=True)
class Host:
    """This host. `gpu_links` holds nvidia-smi's word ('NV18', 'PIX', 'SYS', …) for each pair of GPU indices."""

    name: str
    identity: str
    cpu: str
    cores: int
    numa_nodes: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    gpu_links: tuple[tuple[int, int, str], ...] = ()
    nics: tuple[Nic, ...] = ()


def host_identity() -> str:
    """Equal on two processes exactly when they share a kernel and a host name, so a container is a host of its own."""
    return f"{_text(Path('/proc/sys/kernel/random/boot_id'))}/{socket.gethostname()}"


def clock_identity() -> str:
    """Equal on two processes that read the same monotonic clock: same kernel, same time namespace."""
    try:
        namespace = os.readlink("/proc/self/ns/time")
    except OSError:
        namespace = ""
    boot = _text(Path("/proc/sys/kernel/random/boot_id"))
    return f"{boot}/{namespace}" if boot else f"{socket.gethostname()}/{os.getpid()}"


def read_host() -> Host:
    """Everything about this host; a few milliseconds without GPUs, up to a second with."""
    return Host(
        name=socket.gethostname(),
        identity=host_identity(),
        cpu=cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        numa_nodes=max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))),
        memory_bytes=psutil.virtual_memory().total,
        gpus=parse_gpus(nvidia_smi(f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits")),
        gpu_links=parse_topology(nvidia_smi("topo", "-m")),
        nics=read_nics(),
    )


def cpu_name() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def nvidia_smi(*arguments: str) -> str:
    """nvidia-smi's output; '' where it is missing, fails or hangs (10 s)."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    try:
        done = subprocess.run([tool, *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """The CSV of `nvidia-smi --query-gpu`, fields as in `_GPU_FIELDS`; memory comes in MiB."""
    gpus = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != len(_GPU_FIELDS) or not fields[0].isdigit():
            continue
        memory_bytes = int(fields[3]) << 20 if fields[3].isdigit() else 0
        pcie = f"gen{fields[5]} x{fields[6]}" if fields[5].isdigit() and fields[6].isdigit() else ""
        gpus.append(Gpu(int(fields[0]), fields[1], fields[2], memory_bytes, fields[4], pcie))
    return tuple(gpus)


def parse_topology(text: str) -> tuple[tuple[int, int, str], ...]:
    """The GPU rows and columns of `nvidia-smi topo -m`, each pair once with the lower index first."""
    links = []
    columns: list[str] = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines():
        cells = line.split()
        if not columns:
            if cells[:1] == ["GPU0"] and "X" not in cells[1:2]:
                columns = [cell for cell in cells if re.fullmatch(r"GPU\d+", cell)]
            continue
        if cells and cells[0] in columns:
            row = int(cells[0][3:])
            for column, word in zip(columns, cells[1:]):
                if row < int(column[3:]):
                    links.append((row, int(column[3:]), word))
    return tuple(links)


def read_nics(root: Path = Path("/sys/class")) -> tuple[Nic, ...]:
    """Interfaces with a device behind them, and InfiniBand/RoCE ports, from /sys."""
    nics = []
    for folder in _folders(root / "net"):
        if (folder / "device").exists():
            speed = _text(folder / "speed")
            bits_per_s = int(speed) * 10**6 if speed.isdigit() and int(speed) else None
            nics.append(Nic(folder.name, "ethernet", bits_per_s, _text(folder / "operstate") == "up"))
    for device in _folders(root / "infiniband"):
        for port in _folders(device / "ports"):
            match = re.match(r"(\d+(?:\.\d+)?) Gb/sec", _text(port / "rate"))
            bits_per_s = int(float(match[1]) * 10**9) if match else None
            up = "ACTIVE" in _text(port / "state")
            nics.append(Nic(f"{device.name}:{port.name}", "infiniband", bits_per_s, up))
    return tuple(nics)


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # /sys refuses to tell some values (the speed of a virtual card)
        return ""
