"""Whether what was measured bears a paper's claim out: seed by seed, then together.

A claim holds when it holds on the mean over seeds and in more than half of them; both are shown. While one of the runs
that it needs has not ended, it is open: neither held nor failed. NaN on the side of a
baseline is a loss of that baseline, NaN on the side of the method is a failure of the method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from .contract import Claim, Workload
from .loop import Outcome


@dataclass(frozen=True)
class Verdict:
    """`values` and `references` of the seeds whose runs have ended; a reference already contains the margin.

    `missing`: the runs that have not ended, which leave the claim open.
    """

    workload: str
    claim: Claim
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    references: tuple[float, ...]
    missing: tuple[str, ...] = ()

    @property
    def open(self) -> bool:
        return bool(self.missing)

    @property
    def each(self) -> tuple[bool, ...]:
        return tuple(_holds(self.claim.relation, v, r) for v, r in zip(self.values, self.references))

    @property
    def holds(self) -> bool:
        if self.open:
            return False
        usable = [(v, r) for v, r in zip(self.values, self.references) if not math.isnan(r)]
        on_mean = not usable or _holds(self.claim.relation, fmean(v for v, _ in usable), fmean(r for _, r in usable))
        return on_mean and 2 * sum(self.each) > len(self.seeds)

    @property
    def word(self) -> str:
        if self.open:
            return f"open: waits for {', '.join(self.missing)}"
        if self.holds:
            return "holds" if self.claim.expected else "holds (unexpected)"
        return "FAILED" if self.claim.expected else "FAILED (as measured before)"


def _holds(relation: str, value: float, reference: float) -> bool:
    if math.isnan(value):
        return False
    if math.isnan(reference):
        return True
    return value >= reference if relation == ">=" else value <= reference


def judge(workload: Workload, preset: str, outcomes: Sequence[Outcome], seeds: Sequence[int] = ()) -> list[Verdict]:
    """The verdict on every claim that is made at this preset, over `seeds` and those of the outcomes."""
    wanted = sorted({*seeds, *(outcome.seed for outcome in outcomes)})
    found = {(outcome.variant, outcome.seed): outcome for outcome in outcomes if outcome.ended}
    verdicts = []
    for claim in workload.claims:
        if preset not in claim.presets:
            continue
        names = [claim.variant, *([] if claim.baseline is None else [claim.baseline])]
        missing = [(name, seed) for name in names for seed in wanted if (name, seed) not in found]
        seeds = tuple(seed for seed in wanted if all((name, seed) in found for name in names))
        values = tuple(_value(found[claim.variant, seed], claim.metric) for seed in seeds)
        references = tuple(
            claim.margin + (0.0 if claim.baseline is None else _value(found[claim.baseline, seed], claim.metric))
            for seed in seeds
        )
        absent = {name: [str(seed) for n, seed in missing if n == name] for name in names}
        shown = tuple(f"{name} (seed {', '.join(of)})" for name, of in absent.items() if of)
        verdicts.append(Verdict(workload.name, claim, seeds, values, references, shown))
    return verdicts


def alone(workload: Workload, preset: str, outcome: Outcome) -> tuple[list[Verdict], list[Claim]]:
    """The claims about one run's variant: the verdicts on those that need no rival, and the claims that need one."""
    about = [c for c in workload.claims if preset in c.presets and outcome.variant in (c.variant, c.baseline)]
    fixed = tuple(claim for claim in about if claim.baseline is None)
    return judge(replace(workload, claims=fixed), preset, [outcome]), [c for c in about if c.baseline is not None]


def _value(outcome: Outcome, metric: str) -> float:
    return math.nan if outcome.diverged else outcome.metrics[metric]
