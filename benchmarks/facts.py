"""What a result must carry so that a reader can judge and repeat it: hardware, versions, commit, whether it was clean.

Nothing that names one machine's folders or users is recorded, because results are committed.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path

from undertow.dist.host import cpu_name

ROOT = Path(__file__).resolve().parents[1]


def facts(packages: Sequence[str] = ()) -> dict[str, str]:
    """Facts by name, as text; `packages` are further distributions whose versions matter."""
    import psutil
    import torch

    found = {
        "hardware": hardware(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}" if torch.version.cuda else torch.__version__,
        "load before": " ".join(f"{load:.2f}" for load in os.getloadavg()) + f" on {os.cpu_count()} cores",
    }
    for name in ("numpy", *packages):
        found[name] = _version(name)
    found["undertow"] = f"{_version('undertow')}, {commit()}"
    found["date"] = date.today().isoformat()
    return found


def hardware() -> str:
    """'2 x NVIDIA H200 + 16 cores of AMD EPYC 9654', or the processor alone."""
    import torch

    cpu = (
        f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores of {cpu_name()}"
    )
    if not torch.cuda.is_available():
        return cpu
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return " + ".join([*(f"{names.count(n)} x {n}" for n in dict.fromkeys(names)), cpu])


def slug(text: str) -> str:
    """A short file name part: '2 x NVIDIA H200 + 16 cores of …' → '2x-nvidia-h200'; a processor keeps its cores."""
    text = text.split(" + ")[0].lower().replace(" x ", "x ").replace(" cores of ", "core ")
    text = re.sub(r"\((r|tm)\)|@.*|\b(cpu|processor)\b", "", text)
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")[:48]


def commit() -> str:
    """'commit abc1234', with 'dirty' when tracked files differ from it (results do not count); or 'no git metadata'.

    UNDERTOW_COMMIT goes before git's word: a copy on a lent machine may carry git's folder of an older state.
    """
    if said := os.environ.get("UNDERTOW_COMMIT", ""):
        return f"commit {said}, said by who copied it"
    head = _git("rev-parse", "--short=12", "HEAD")
    if not head or _git("rev-parse", "--show-prefix") != "":
        return "no git metadata"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return f"commit {head}" + (", dirty" if changed else "")


def _git(*arguments: str) -> str | None:
    """git's answer about the package's folder; None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
