"""Kill a workload's process by SIGKILL in the middle of its work, start it again, and compare with one left in peace.

The victim is a process of its own, killed from outside as soon as its journal shows the update asked for: nothing in it
can prepare for that, and what it had not committed is lost. The trajectory, weights and metrics must come out the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...dist.errors import UndertowError
from .journal import JOURNAL, trajectory


@dataclass(frozen=True)
class Fault:
    """Killed when update `killed` was done; the next process went on from update `resumed`."""

    killed: int
    resumed: int


@dataclass(frozen=True)
class Comparison:
    """`same` by part: losses step by step, weights (a hash), metrics. `updates`: how many the undisturbed run made."""

    faults: tuple[Fault, ...]
    updates: int
    repeated: int
    same: dict[str, bool]


def start(name: str, out: Path, options: Sequence[str], log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "undertow", "workloads", "train", name, "--out", str(out), *options]
    with log.open("ab") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL)


def kill_at(process: subprocess.Popen, out: Path, step: int, log: Path, timeout_s: float) -> int:
    """SIGKILL `process` once update `step` is in its journal; the newest update there."""
    deadline_s, journal = time.monotonic() + timeout_s, out / JOURNAL
    while (newest := max(trajectory(journal), default=-1)) < step:
        if process.poll() is not None:
            raise UndertowError(f"the run ended with code {process.returncode} before update {step}; see {log}")
        if time.monotonic() > deadline_s:
            process.kill()
            raise UndertowError(f"update {step} did not come within {timeout_s:.0f} s; see {log}")
        time.sleep(0.002)
    process.kill()
    process.wait()
    return newest


def finish(process: subprocess.Popen, log: Path, timeout_s: float) -> None:
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise UndertowError(f"the run did not end within {timeout_s:.0f} s; see {log}") from None
    if code:
        raise UndertowError(f"the run ended with code {code}:\n{log.read_text()[-2000:]}")


def killed_and_whole(
    name: str, options: Sequence[str], at: Sequence[int], out: Path, *, timeout_s: float = 600.0
) -> Comparison:
    """Run `undertow workloads train NAME OPTIONS` in peace, and once more with a SIGKILL at each update of `at`."""
    out.mkdir(parents=True, exist_ok=True)
    log, whole, broken = out / "log.txt", out / "whole", out / "killed"
    finish(start(name, whole, options, log), log, timeout_s)
    faults: list[Fault] = []
    process = start(name, broken, options, log)
    for step in sorted(at):
        died_at = kill_at(process, broken, step, log, timeout_s)
        lines = len((broken / JOURNAL).read_text().splitlines())
        process = start(name, broken, [*options, "--resume"], log)
        faults.append(Fault(died_at, _first_after(process, broken, lines, log, timeout_s)))
    finish(process, log, timeout_s)
    mine, peace = (json.loads((folder / "result.json").read_text()) for folder in (broken, whole))
    paths = [trajectory(folder / JOURNAL) for folder in (broken, whole)]
    same = {"losses": paths[0] == paths[1]} | {part: mine[part] == peace[part] for part in ("weights", "metrics")}
    repeated = sum(fault.killed + 1 - fault.resumed for fault in faults)
    return Comparison(tuple(faults), peace["updates"], repeated, same)


def _first_after(process: subprocess.Popen, out: Path, lines: int, log: Path, timeout_s: float) -> int:
    """The first update that a resumed process writes below `lines` lines."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        for line in (out / JOURNAL).read_text().splitlines()[lines:]:
            if line.endswith("}"):
                return json.loads(line)["step"]
        if process.poll():
            break
        time.sleep(0.002)
    process.kill()
    raise UndertowError(f"the resumed run made no update; see {log}")
