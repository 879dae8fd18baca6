"""Is streaming faster than what you had, here, for this step? Measured before it is relied on.

The planner compares plans by predicted work; this runs both ways on the real model and batch, interleaved, and leaves
the faster one on. Plain means gradient checkpointing of every layer with the model's own loss, as before. Where plain
runs out of memory there is nothing to compare and streaming stays. On several ranks the verdict is the same on all: the
slowest rank's times count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from ...dist.errors import UserError
from ...dist.units import format_seconds
from .engine import Engine

ALLOWED = 0.97  # streaming stays on when plain / streamed is at least this


@dataclass(frozen=True)
class Verdict:
    """Seconds of each run, in the order in which they were run; `plain_s` is empty where plain did not fit."""

    plain_s: tuple[float, ...]
    streamed_s: tuple[float, ...]

    @property
    def ratio(self) -> float | None:
        """plain / streamed, the median over the rounds."""
        if not self.plain_s:
            return None
        return statistics.median(a / b for a, b in zip(self.plain_s, self.streamed_s))

    @property
    def streams(self) -> bool:
        return self.ratio is None or self.ratio >= ALLOWED

    def __str__(self) -> str:
        if self.ratio is None:
            return "streamed: plain checkpointing runs out of memory"
        plain, ours = (statistics.median(times) for times in (self.plain_s, self.streamed_s))
        chosen = "streamed" if self.streams else "plain checkpointing"
        rounds = len(self.plain_s)
        times = f"plain {format_seconds(plain)}, streamed {format_seconds(ours)} a step"
        return f"{chosen}: {times}; plain / streamed {self.ratio:.3f} in the median of {rounds} rounds"


def keep_faster(engine: Engine, model: nn.Module, step: Callable[[], object], rounds: int = 3) -> Verdict:
    """Run `step` (forward and backward) both ways, `rounds` times after one warm-up, and leave the faster way on.

    Gradients that `step` leaves in `model` are thrown away and those from before are put back; generators are left as
    they were found. Call it on every rank. `UserError` when there is no round, and with an attention of one's own: the
    plain way would call the model's, which sees the rows of this rank alone.
    """
    if engine.attend is not None:
        raise UserError("keep_faster with attend", remedy="time both ways by hand, the plain one with that attention")
    if rounds < 1:
        raise UserError(f"{rounds} rounds", expected="at least 1")
    before = [(p, p.grad) for p in model.parameters()]
    device = next(model.parameters()).device
    times: dict[bool, list[float]] = {True: [], False: []}
    fits = True
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(forked):
        try:
            for turn in range(rounds + 1):
                for plain in (False, True):
                    if plain and not fits:
                        continue
                    engine.plain = plain
                    seconds = _timed(step, model, device)
                    if seconds is None and not plain:
                        raise torch.OutOfMemoryError("a streamed step runs out of memory")
                    seconds, fits = _slowest(seconds, device)
                    if turn and fits:
                        times[plain].append(seconds)
        finally:
            engine.plain = False
            for parameter, gradient in before:
                parameter.grad = gradient
    verdict = Verdict(tuple(times[True]) if fits else (), tuple(times[False]))
    engine.plain = not verdict.streams
    return verdict


def _timed(step: Callable[[], object], model: nn.Module, device: torch.device) -> float | None:
    """Seconds, or None when memory ran out."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    for parameter in model.parameters():
        parameter.grad = None
    synchronize()
    start = time.perf_counter()
    try:
        step()
    except torch.OutOfMemoryError:
        return None
    synchronize()
    return time.perf_counter() - start


def _slowest(seconds: float | None, device: torch.device) -> tuple[float, bool]:
    """The slowest rank's seconds, and whether the step fitted on all."""
    value = float("inf") if seconds is None else seconds
    if dist.is_available() and dist.is_initialized():
        slowest = torch.tensor([value], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        value = float(slowest)
    return value, value != float("inf")
