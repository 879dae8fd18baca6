"""A signal says that the job will end soon: every rank saves the same step, and none is waited for that is dead.

Schedulers send SIGTERM or SIGUSR1 some time before they kill, to all ranks, to one, or at different moments. The rank
that is told tells rank 0; rank 0 asks all for the step they are in, and the answer comes from a background thread, so
that a rank inside a collective answers too. The step to save is the one after the latest: no rank can have begun it,
because after answering it waits at its next step for the verdict. When a peer is dead, or the grace time is over, the
signal takes its usual effect, with the last commit intact.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from ..dist.errors import UserError
from ..dist.log import get_logger
from .lifeline import Lifeline
from .save import SaveReport

log = get_logger(__name__)
HANG_S = 2.0  # after which a main thread that does not take the signal is taken to hang


@dataclass(frozen=True)
class Preemption:
    """Save when one of `signals` comes, then set `Checkpointer.preempted`; `grace_s` seconds after the signal it takes
    its usual effect, unless the loop has ended by then. Keep `grace_s` below what the scheduler allows (Slurm's
    `--signal=USR1@120`: under 120; torchrun kills its workers 30 s after a SIGTERM)."""

    signals: tuple[str, ...] = ("SIGTERM", "SIGUSR1")
    grace_s: float = 25.0

    def __post_init__(self) -> None:
        unknown = [name for name in self.signals if not name.startswith("SIG") or not hasattr(signal, name)]
        if unknown or not self.signals:
            raise UserError(f"signals {list(self.signals)}", expected="names such as SIGTERM and SIGUSR1")
        if self.grace_s <= 0:
            raise UserError(f"grace_s is {self.grace_s}", expected="a positive number of seconds")


class Preempter:
    """The agreement, on every rank. `at` belongs to the training thread, everything else to the lifeline's."""

    def __init__(self, config: Preemption, lifeline: Lifeline) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise UserError("preemption outside the main thread", remedy="create the Checkpointer in the main thread")
        self.config, self._lifeline = config, lifeline
        self._changed = threading.Condition()
        self._step = -1
        self._verdict: int | str | None = None  # the step to save, or why there is none
        self._answered = False
        self._signal = 0
        self._told = self._lost = self._ended = False
        self._deadline_s: float | None = None
        self._steps: dict[int, int] = {}  # rank 0: rank → the step it is in
        lifeline.on_message, lifeline.on_gone, lifeline.on_wake = self._hear, self._mourn, self._wake
        self._before = {name: signal.signal(getattr(signal, name), self._handle) for name in config.signals}
        lifeline.wake()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._lost:
            self.end()
            os.kill(os.getpid(), number)
        self._signal = self._signal or number
        self._lifeline.wake()

    # -- the training thread ----------------------------------------------------------------------------------------

    def at(self, step: int) -> bool:
        """Called at the begin of every step, on every rank: whether this is the step that all agreed to save."""
        with self._changed:
            if self._answered and self._verdict is None:
                self._changed.wait_for(lambda: self._verdict is not None, timeout=self.config.grace_s)
            self._step = step
            return isinstance(self._verdict, int) and step >= self._verdict

    def conclude(self, step: int, reports: Sequence[SaveReport], *, off: bool) -> bool:
        """The save of `step` for the signal has ended as `reports` say: give the signals back; whether it stands.
        `off`: checkpoints are switched off, and nobody expects one."""
        self.end()
        ok = off or any(report.ok for report in reports if report.step == step and report.tier == "disk")
        log.info("the signal's save of step %d %s; leave the loop", step, "is committed" if ok else "failed")
        return ok

    def end(self) -> None:
        """The save is done, or the run is over: give the signals back to whoever had them, once."""
        if self._ended:
            return
        self._ended = True
        for name, before in self._before.items():
            signal.signal(getattr(signal, name), before if before is not None else signal.SIG_DFL)

    # -- the lifeline's thread --------------------------------------------------------------------------------------

    def _wake(self) -> float | None:
        if self._signal and not self._told:
            self._told = True
            log.info("signal %s: asking all ranks for a step to save", signal.Signals(self._signal).name)
            self._start_clock()
            self._lifeline.send(0, ["ask"])
        if self._deadline_s is None or self._ended:
            return None
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0 and self._lost:
            os.kill(os.getpid(), signal.SIGKILL)
        if left_s <= 0:
            self._give_up(f"the grace time of {self.config.grace_s:g} s is over")
            return HANG_S if self._signal else None
        return left_s

    def _hear(self, rank: int, message: Any) -> None:
        kind, *rest = message
        if kind == "ask" and not self._steps:  # rank 0; asked twice it answers once
            self._steps[-1] = -1
            if self._lifeline.gone:
                self._lifeline.broadcast(["never", f"rank {min(self._lifeline.gone)} is dead"])
            else:
                self._lifeline.broadcast(["where"])
        elif kind == "where":
            self._start_clock()
            with self._changed:
                self._answered = True
                step = self._step
            self._lifeline.send(0, ["at", step])
        elif kind == "at":
            self._steps[rank] = rest[0]
            if len(self._steps) == self._lifeline.world + 1:  # with the mark of `ask`
                self._lifeline.broadcast(["stop", max(self._steps.values()) + 1])
        elif kind == "stop":
            self._decide(rest[0])
        elif kind == "never":
            self._give_up(rest[0])

    def _mourn(self, rank: int) -> None:
        if self._lifeline.rank == 0 and self._steps and not isinstance(self._verdict, str):
            self._lifeline.broadcast(["never", f"rank {rank} is dead"])
        elif self._lifeline.rank != 0 and (self._signal or self._answered):
            self._give_up("rank 0 is dead")

    def _start_clock(self) -> None:
        self._deadline_s = self._deadline_s or time.monotonic() + self.config.grace_s

    def _decide(self, verdict: int | str) -> None:
        with self._changed:
            self._verdict = verdict
            self._changed.notify_all()

    def _give_up(self, reason: str) -> None:
        """Let the signal do what it would have done without us. Handlers belong to the main thread: it is told by the
        signal itself; one that hangs in a collective does not hear it, and is killed."""
        if self._ended or self._lost:
            return
        log.warning("no save for the signal: %s; the newest checkpoint stands as it is", reason)
        self._lost = True
        self._decide(reason)
        if self._signal:
            os.kill(os.getpid(), self._signal)
            self._deadline_s = time.monotonic() + HANG_S
