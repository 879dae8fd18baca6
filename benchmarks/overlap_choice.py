"""Replay the gate on recorded rounds, and judge its choices by rounds that it has not seen.

    python -m undertow.benchmarks.overlap_choice benchmarks/results/overlap_*.json

The gate decides by measured calls, not by a table of shapes, so every recorded cell is a shape that nothing was fitted
to. The gate itself (`parallel.overlap_gate`) gets a cell's first rounds as its measured calls, without a model of the
machine. The later rounds say which arm was best and what the choice costs: right within 3 %, or where the 95 % interval
of the ratio does not exclude that. Rounds are interleaved, so both halves saw the same machine. What the automatic arm
costs beside the arm it chose is not part of this: that is in the benchmark's own report.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from undertow.benchmarks.choice import RIGHT
from undertow.benchmarks.intervals import LEAST_SAMPLES, ratio_interval
from undertow.dist.errors import UserError
from undertow.parallel.overlap_gate import CUDA_ARMS, ROUNDS, SEQUENTIAL, Gate

SHARE, REGRET = 0.95, 0.02  # wanted: cells in which the choice is right at least, mean regret at most
SEEN = ROUNDS + 1  # rounds that the gate gets; it leaves the first out, as a warm-up


@dataclass(frozen=True)
class Replayed:
    """One cell: what the gate chose, the best arm of the unseen rounds, what the choice costs beside it."""

    case: str
    chosen: str
    best: str
    regret: float
    right: bool


def replay(case: str, samples_s: Mapping[str, Sequence[float]]) -> Replayed | None:
    """`samples_s`: seconds of each arm, round by round; None where too few arms or rounds were timed."""
    arms = [arm for arm in CUDA_ARMS if len(samples_s.get(arm.name, ())) >= SEEN + LEAST_SAMPLES]
    if len(arms) < 2 or arms[0] != SEQUENTIAL:
        return None
    gate = Gate(arms, lambda mine: [mine])
    for call in range(SEEN * len(arms)):
        at = gate.choose(case)
        gate.took(case, at, samples_s[arms[at].name][call // len(arms)])
    chosen = arms[gate.choose(case)].name
    unseen = {arm.name: samples_s[arm.name][SEEN:] for arm in arms}
    best = min(unseen, key=lambda name: median(unseen[name]))
    ratio = ratio_interval(unseen[chosen], unseen[best])
    return Replayed(case, chosen, best, ratio.median - 1, ratio.low - 1 <= RIGHT)


def replay_all(report: Mapping) -> list[Replayed]:
    """`report`: a benchmark's JSON."""
    found = []
    for case in dict.fromkeys(row["case"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["case"] == case]
        cell = replay(case, {row["arm"]: row["samples_s"] for row in rows if row["seconds"]})
        found += [] if cell is None else [cell]
    return found


def markdown(name: str, cells: Sequence[Replayed]) -> str:
    """The share of right choices, the mean regret, and by arm in how many cells it was chosen and was best."""
    if not cells:
        return f"{name}: no cell has {SEEN + LEAST_SAMPLES} rounds of two arms, the sequential one among them\n"
    right, regret = mean(cell.right for cell in cells), mean(cell.regret for cell in cells)
    verdict = "reached" if right >= SHARE and regret <= REGRET else "missed"
    chosen, best = Counter(cell.chosen for cell in cells), Counter(cell.best for cell in cells)
    lines = [
        f"{name}: right in {sum(cell.right for cell in cells)} of {len(cells)} cells, mean regret {regret:.1%} "
        f"(wanted: {SHARE:.0%} and {REGRET:.0%}; {verdict})",
        "",
        "| arm | chosen in | best in |",
        "|---|---:|---:|",
    ]
    lines += [
        f"| {arm.name} | {chosen[arm.name] / len(cells):.0%} | {best[arm.name] / len(cells):.0%} |"
        for arm in CUDA_ARMS
        if chosen[arm.name] or best[arm.name]
    ]
    wrong = [f"- {c.case}: chose {c.chosen}, {c.best} was best ({c.regret:+.1%})" for c in cells if not c.right]
    return "\n".join([*lines, *([""] if wrong else []), *wrong, ""])


def main(paths: Sequence[str]) -> int:
    if not paths:
        raise UserError("no results", expected="JSON files of `undertow bench overlap…` as arguments")
    for path in map(Path, paths):
        print(markdown(path.stem, replay_all(json.loads(path.read_text()))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
