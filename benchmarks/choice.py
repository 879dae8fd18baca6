"""How well an automatic arm chooses: beside the best of the arms that it chooses from, cell by cell.

Its regret in a cell is the median over the rounds of (its time / the best arm's time) - 1, where the best arm has the
least median time; it is right where the regret is at most 3 %, or where the interval of the ratio does not exclude it.
A gate that is always off is right wherever nothing can be won, so the cells that each arm wins are counted too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Protocol

from undertow.benchmarks.intervals import Interval, ratio_interval

RIGHT = 0.03


class Row(Protocol):
    """What is needed of a `report.Row`."""

    @property
    def case(self) -> str: ...
    @property
    def arm(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def seconds(self) -> Interval | None: ...
    @property
    def samples_s(self) -> Sequence[float]: ...


@dataclass(frozen=True)
class Verdict:
    """One cell: the best arm, the automatic one's regret, and whether that counts as right."""

    case: str
    best: str
    regret: float
    right: bool


def verdicts(rows: Sequence[Row], choices: Sequence[str]) -> list[Verdict]:
    """For each case in which the automatic arm ('ours') and at least two of `choices` were timed."""
    found = []
    for case in dict.fromkeys(row.case for row in rows):
        timed = [row for row in rows if row.case == case and row.seconds is not None]
        ours = next((row for row in timed if row.role == "ours"), None)
        arms = [row for row in timed if row.arm in choices]
        if ours is None or len(arms) < 2:
            continue
        best = min(arms, key=lambda row: row.seconds.median if row.seconds else 0.0)
        ratio = ratio_interval(ours.samples_s, best.samples_s)
        found.append(Verdict(case, best.arm, ratio.median - 1, ratio.low - 1 <= RIGHT))
    return found


def summary(rows: Sequence[Row], choices: Sequence[str]) -> list[str]:
    """The verdicts in a few lines of Markdown; none without `choices`."""
    judged = verdicts(rows, choices)
    if not judged:
        return []
    right = sum(verdict.right for verdict in judged)
    worst = max(judged, key=lambda verdict: verdict.regret)
    wins = Counter(verdict.best for verdict in judged)
    return [
        f"The automatic arm is within {RIGHT:.0%} of the best of the {len(choices)} arms it chooses from in {right} of "
        f"{len(judged)} cells; mean regret {mean(verdict.regret for verdict in judged):.1%}, worst {worst.regret:.1%} "
        f"({worst.case}: {worst.best} was best). Fastest arm, cells: "
        + ", ".join(f"{name} {wins[name]}" for name in choices)
        + ".",
        "",
    ]
