"""Run the main job, kill a rank inside a checkpoint, restart it, and compare with a run that nobody disturbed.

Used by `undertow demo`, by a test and by the benchmark of twenty seeded kills. The victim dies by SIGKILL from
outside, at a moment chosen by its trace: the file shows every span that is open, so it is certain that a kill landed
while checkpoint bytes were on their way.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..dist.errors import UndertowError
from ..dist.trace import open_spans, trace_path
from ..dist.trace_read import read_attempts
from .metrics import read

IN_FLIGHT = ("copy", "flush", "fsync", "vote", "commit")


@dataclass(frozen=True)
class Kill:
    """Rank `rank` was killed at `step`, inside the spans `inside` (empty: between checkpoints)."""

    rank: int
    step: int
    inside: tuple[str, ...]


def start(out: Path, ranks: int, options: Sequence[str], *, log: Path) -> subprocess.Popen:
    """`torchrun -m undertow train` in a session of its own; its output goes to `log`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "undertow", "train", "--out", str(out), "--threads", "1", *options]
    with log.open("ab") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, start_new_session=True)


def finish(process: subprocess.Popen, log: Path, *, timeout_s: float) -> None:
    """Wait for a run that is expected to succeed."""
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        stop(process)
        raise UndertowError(f"the run did not end within {timeout_s:.0f} s; its output is in {log}") from None
    if code:
        raise UndertowError(f"the run ended with code {code}; its output is in {log}:\n{log.read_text()[-2000:]}")


def stop(process: subprocess.Popen) -> None:
    """End a run and everything it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def kill_inside(
    process: subprocess.Popen, out: Path, *, rank: int, from_step: int, inside: Sequence[str], timeout_s: float
) -> Kill | None:
    """SIGKILL `rank` as soon as, at or after `from_step`, one of the spans `inside` is open (none: at once).

    Waits for torchrun to notice and end the others. None: the run ended well before such a moment was seen.
    """
    trace = trace_path(out / "trace", rank)
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if process.poll() == 0:
            return None
        if process.poll() is not None:
            raise UndertowError(f"the run ended with code {process.returncode} before rank {rank} could be killed")
        step = _newest_step(trace)
        if step >= from_step and (not inside or any(span.name in inside for span in open_spans(trace))):
            os.kill(_pid(trace), signal.SIGKILL)
            left_open = tuple(span.name for span in open_spans(trace) if span.name in IN_FLIGHT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                stop(process)
            return Kill(rank, _newest_step(trace), left_open)
        time.sleep(0.002)
    stop(process)
    raise UndertowError(f"no moment inside {', '.join(inside)} came within {timeout_s:.0f} s")


def _newest_step(trace: Path) -> int:
    attempts = read_attempts(trace) if trace.exists() else []
    begun = [e["args"]["step"] for a in attempts for e in a.events if e["name"] == "step" and e["ph"] == "B"]
    return max(begun, default=-1)


def _pid(trace: Path) -> int:
    return read_attempts(trace)[-1].os_pid


@dataclass(frozen=True)
class Outcome:
    """Two runs side by side: equal when losses (as exact floats), weights and optimizer state agree."""

    losses: int
    first_difference: int | None
    weights_equal: bool
    state_equal: bool

    @property
    def identical(self) -> bool:
        return self.first_difference is None and self.weights_equal and self.state_equal


def compare(reference: Path, other: Path) -> Outcome:
    """Compare two finished run folders."""
    ours, theirs = (
        [line["loss"] for line in read(path / "metrics.jsonl") if "loss" in line] for path in (reference, other)
    )
    different = [step for step, (a, b) in enumerate(zip(ours, theirs)) if a != b]
    if len(ours) != len(theirs):
        different.append(min(len(ours), len(theirs)))
    results = [json.loads((path / "result.json").read_text()) for path in (reference, other)]
    return Outcome(
        len(ours),
        different[0] if different else None,
        results[0]["weights_hash"] == results[1]["weights_hash"],
        results[0]["state_hash"] == results[1]["state_hash"],
    )
