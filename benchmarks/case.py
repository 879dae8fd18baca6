"""The nouns of a benchmark: a `Benchmark` lists `Case`s, a `Case` builds a `Trial`, a `Trial` holds the `Arm`s.

A case knows its name and size before its buffers exist, so that cases can be listed, filtered and counted for the time
left without allocating anything; `build` is called just before the case runs and its buffers die after it. The arms of
one case get the same inputs in the same process, and each must give the reference's answer before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from undertow.benchmarks.answers import count_wrong
from undertow.dist.machine import Machine


@dataclass(frozen=True)
class Context:
    """What the command line gives to a benchmark. `seed` makes inputs; `machine` feeds predictions where given;
    `limit_s` is the time of --minutes, for a case that searches while it is built."""

    quick: bool = False
    seed: int = 0
    machine: Machine | None = None
    rank: int = 0
    world_size: int = 1
    limit_s: float | None = None


@dataclass(frozen=True)
class Measured:
    """What an arm returns when it has more to tell than its answer.

    `seconds`: its time, when it times itself because it starts processes of its own (the slowest rank's time); None
    leaves the timing to the harness. `extras` become columns ('peak_bytes', 'stall_s').
    """

    answer: Any
    seconds: float | None = None
    extras: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One way to do the work of a case.

    `run` does the work once and returns its answer (a `Measured` when it has more to tell). It is called many times, so
    it must not change its inputs, or `prepare` must restore them; `prepare` runs before each timed sample, outside the
    time. On device 'cuda' the time is taken between events on the current stream: work that `run` puts on other
    streams must be joined to it; with `ahead` the stream sleeps until the host has queued the run, as on a busy device.
    `predicted_s` is a model's time for one run, computed before anything is timed. A non-empty `unavailable` says why
    this arm cannot run here; it is then listed as not compared. `reference` replaces the trial's for this arm, where
    arms compute different things. `said`: a line of text that its row keeps, such as
    why an automatic arm chose as it did; `facts`: numbers that it keeps, beside the extras that were measured.
    """

    name: str
    run: Callable[[], Any]
    prepare: Callable[[], object] | None = None
    predicted_s: float | None = None
    device: str = "cpu"
    ahead: bool = False
    reference: Callable[[], Any] | None = None
    unavailable: str = ""
    said: str = ""
    facts: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def missing(cls, name: str, reason: str) -> Arm:
        """An arm that cannot run here; `reason` is shown to the reader."""
        return cls(name, lambda: None, unavailable=reason)


@dataclass(frozen=True)
class Trial:
    """A case with its buffers made: the arms, and the reference that computes the right answer independently."""

    arms: Sequence[Arm]
    reference: Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One cell of a benchmark.

    `nbytes` are the bytes one run has to move (bandwidth is nbytes / time); None where bandwidth means nothing. `plain`
    names the arm that the user had before, `ours` the package's own. Bandwidth against hardware is taken from the arm
    named `hardware`, measured in the same rounds, or from the constant `hardware_bytes_per_s`. Cases of one `group`
    share a panel of the plot, along `x` (default nbytes). `warm_ups`: untimed samples per arm after its answer has been
    checked; a case of seconds needs none.
    """

    name: str
    build: Callable[[], Trial]
    plain: str
    ours: str
    nbytes: int | None = None
    hardware: str = ""
    hardware_bytes_per_s: float | None = None
    group: str = ""
    x: float | None = None
    wrong: Callable[[Any, Any], int] = count_wrong
    warm_ups: int = 2


@dataclass(frozen=True)
class Benchmark:
    """A named benchmark: `BENCHMARK = Benchmark(…)` at the top level of a module in benchmarks/ makes it known.

    `claim` is one sentence that the numbers support or refute. `packages` are the distributions whose versions matter.
    `program`, where given, takes the place of the harness: a benchmark whose timing loop cannot be Python's measures
    and reports by itself. It is called with quick, rounds (None: its own default), the filter and the output folder,
    and returns the exit status. `choices`: the arms among which each case's `ours` chooses by itself, so that the
    report can say how well.
    """

    name: str
    claim: str
    cases: Callable[[Context], Sequence[Case]]
    rounds: int = 31
    packages: tuple[str, ...] = ()
    x_label: str = "size (bytes)"
    program: Callable[[bool, int | None, str, Path], int] | None = None
    choices: tuple[str, ...] = ()
