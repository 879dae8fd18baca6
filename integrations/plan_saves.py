"""What checkpoints cost a job and what failures leave of it: bytes, stall, time to commit, interval, goodput."""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpointing.frequency import Frequency
from ..dist.machine import Machine
from ..dist.units import format_bytes, format_rate, format_seconds
from .plan_job import Job, Line, rate, source

DISK_BYTES_PER_S = 1.0e9  # assumed, per rank
PCIE_BYTES_PER_S = 25e9  # assumed, pinned device to host
CALL_S = 0.005  # assumed: what the call itself blocks, however little there is to copy
COMMIT_S = 0.03  # assumed: manifest, syncs, the ranks' vote, renaming
HIDING = 0.9  # of a step passes before the optimizer changes what is being copied
HOST_GENERATIONS = 3  # as Checkpointer(host_every=…) holds
PARTNER_GENERATIONS = 2  # of another rank's part, besides, with partner=Partner()


@dataclass(frozen=True)
class Saves:
    """`rank_bytes` of a checkpoint that each rank writes; `stall_s` of training; `commit_s` until it is durable;
    `interval_s` between saves; `goodput`: share of the time that ends in the result."""

    lines: tuple[Line, ...]
    rank_bytes: float
    stall_s: float
    commit_s: float
    interval_s: float
    goodput: float


def saves(job: Job, machine: Machine | None, step_s: float) -> Saves:
    """For steps of `step_s` seconds."""
    nbytes = job.shape.parameters * (job.weight + job.state_bytes) / job.ranks
    copy = rate(machine, "copies", ("d2h_pinned", "host"), PCIE_BYTES_PER_S)
    disk = rate(machine, "disks", ("write_direct", "write_buffered"), DISK_BYTES_PER_S)
    copy_s = nbytes / copy.value
    commit_s = copy_s + nbytes / disk.value + COMMIT_S
    stall_s = CALL_S + max(0.0, copy_s - HIDING * step_s)  # what has not left when the optimizer begins
    interval_s = max(step_s, Frequency(mtbf_s=job.mtbf_s).interval_s(stall_s=stall_s, commit_s=commit_s))
    loss = stall_s / interval_s + (interval_s / 2 + commit_s + job.restart_s) / job.mtbf_s
    goodput = max(0.0, 1.0 - loss)
    rated = source(copy.measured, disk.measured)
    lines = (
        _tiers(job, nbytes),
        Line(
            "checkpoint cost",
            f"stall {format_seconds(stall_s)}, durable after {format_seconds(commit_s)}",
            f"call, copy at {format_rate(copy.value)} beyond {HIDING:.0%} of a step; disk at {format_rate(disk.value)}",
            rated,
        ),
        Line(
            "checkpoint interval",
            f"every {_steps(interval_s / step_s)} ({format_seconds(interval_s)})",
            f"checkpointing.frequency (Daly 2006), a failure every {format_seconds(job.mtbf_s)}",
            rated,
        ),
        Line(
            "expected goodput",
            f"{goodput:.2%}",
            f"1 - stall/interval - (interval/2 + commit + {format_seconds(job.restart_s)} restart)/mtbf",
            rated,
        ),
    )
    return Saves(lines, nbytes, stall_s, commit_s, interval_s, goodput)


def _steps(number: float) -> str:
    return "step" if number < 1.5 else f"{round(number)} steps"


def _tiers(job: Job, nbytes: float) -> Line:
    if (HOST_GENERATIONS + PARTNER_GENERATIONS + 1) * nbytes <= job.host_bytes:
        tiers = "host memory (host_every; partner, on several machines) and disk"
        fits = f"{HOST_GENERATIONS} generations, {PARTNER_GENERATIONS} of a partner and an arena fit"
    elif (HOST_GENERATIONS + 1) * nbytes <= job.host_bytes:
        tiers, fits = "host memory (host_every) and disk", f"{HOST_GENERATIONS} generations and an arena fit"
    elif nbytes <= job.host_bytes:
        tiers, fits = "disk", f"one arena fits, {HOST_GENERATIONS} generations do not"
    else:
        tiers, fits = "disk, in pieces: the copy waits for the disk", "not even one arena fits"
    form = f"(weights + state) / ranks; {fits} in {format_bytes(job.host_bytes)} of host memory"
    return Line("checkpoint tiers", f"{tiers}: {format_bytes(nbytes)} a rank", form, "modelled")
