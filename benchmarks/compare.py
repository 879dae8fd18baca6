"""What changed between two results of one benchmark, with verdicts that know the noise.

Between two runs everything may have drifted (another kernel, a warmer chip, a neighbour), which no interval of one run
can see. So the verdict rests on each arm's ratio to the plain arm of its own run, in which such drift cancels: 'faster'
or 'slower' only when the two intervals lie apart, and by more than the A/A rows of either run strayed from 1. Times are
shown beside it, and compared for the plain arm alone, where a difference is called drift.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from undertow.benchmarks.intervals import Interval
from undertow.benchmarks.report import Report, Row, markdown_table
from undertow.dist.units import format_seconds

COLUMNS = ("case", "arm", "time before", "time now", "ratio before", "ratio now", "verdict")


@dataclass(frozen=True)
class Change:
    """One arm in one case, before and now; None where only the other report has it."""

    before: Row | None
    now: Row | None
    verdict: str

    @property
    def worse(self) -> bool:
        return self.verdict in ("slower", "WRONG now", "no longer runs")

    def cells(self) -> tuple[str, ...]:
        row = self.now or self.before
        assert row is not None
        old, new = self.before, self.now
        return (
            *(row.case, row.arm, _time(old), _time(new)),
            *(f"{r.ratio.median:.3f}" if r and r.ratio else "" for r in (old, new)),
            self.verdict,
        )


def compare(before: Report, now: Report) -> list[Change]:
    """Changes in the order of `now`; rows that only `before` has come last."""
    noise = max(aa_noise(before.rows), aa_noise(now.rows))
    old = {(row.case, row.arm): row for row in before.rows}
    new = {(row.case, row.arm): row for row in now.rows}
    changes = [Change(old.get(key), row, _verdict(old.get(key), row, noise)) for key, row in new.items()]
    return changes + [Change(row, None, "gone") for key, row in old.items() if key not in new]


def aa_noise(rows: Iterable[Row]) -> float:
    """How far the A/A rows' medians strayed from 1, at most: the shift that the method shows where there is none."""
    return max((abs(row.ratio.median - 1) for row in rows if row.role == "again" and row.ratio), default=0.0)


def apart(old: Interval, new: Interval, noise: float) -> int:
    """1 when `new` lies above `old` by more than `noise` (a fraction of the old median), -1 below, 0 otherwise."""
    if old.overlaps(new) or abs(new.median / old.median - 1) <= noise:
        return 0
    return 1 if new.median > old.median else -1


def comparison(before: Report, now: Report) -> str:
    """The comparison as Markdown."""
    lines = [f"## {now.benchmark}: now against {before.facts.get('undertow')} of {before.facts.get('date')}", ""]
    pairs = [(name, before.facts.get(name), now.facts.get(name)) for name in ("hardware", "torch", "python")]
    lines += [f"- {name} differs: {old} → {new}" for name, old, new in pairs if old != new]
    changes = compare(before, now)
    lines += ["", *markdown_table(COLUMNS, (change.cells() for change in changes)), ""]
    worse = sum(change.worse for change in changes)
    better = sum(change.verdict == "faster" for change in changes)
    lines.append(f"{better} faster, {worse} worse, {len(changes) - better - worse} others. Verdicts rest on ratios.")
    return "\n".join(lines) + "\n"


def _verdict(old: Row | None, new: Row, noise: float) -> str:
    if new.wrong:
        return "WRONG now" if old is None or not old.wrong else "still wrong"
    if old is None:
        return "new"
    if new.seconds is None or old.seconds is None:
        if new.seconds is None:
            return "not compared" if old.seconds is None else "no longer runs"
        return "right now" if old.wrong else "runs now"
    if new.role == "again":
        return "noise"
    if new.role == "plain":
        return "drift" if apart(old.seconds, new.seconds, noise) else "same"
    if new.ratio is None or old.ratio is None:
        return "no plain arm to compare by"
    return {1: "faster", -1: "slower", 0: "within noise"}[apart(old.ratio, new.ratio, noise)]


def _time(row: Row | None) -> str:
    return format_seconds(row.seconds.median) if row and row.seconds else ""
