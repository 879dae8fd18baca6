"""Whether what was measured bears a paper's claim out: seed by seed, then together.

A claim holds when it holds on the mean over seeds and in more than half of them; both are shown. NaN on the side of a
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
    """`values` and `references` per seed; `reference` already contains the margin."""

    workload: str
    claim: Claim
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    references: tuple[float, ...]

    @property
    def each(self) -> tuple[bool, ...]:
        return tuple(_holds(self.claim.relation, v, r) for v, r in zip(self.values, self.references))

    @property
    def holds(self) -> bool:
        usable = [(v, r) for v, r in zip(self.values, self.references) if not math.isnan(r)]
        on_mean = not usable or _holds(self.claim.relation, fmean(v for v, _ in usable), fmean(r for _, r in usable))
        return on_mean and 2 * sum(self.each) > len(self.seeds)

    @property
    def word(self) -> str:
        if self.holds:
            return "holds" if self.claim.expected else "holds (unexpected)"
        return "FAILED" if self.claim.expected else "FAILED (as measured before)"


def _holds(relation: str, value: float, reference: float) -> bool:
    if math.isnan(value):
        return False
    if math.isnan(reference):
        return True
    return value >= reference if relation == ">=" else value <= reference


def judge(workload: Workload, preset: str, outcomes: Sequence[Outcome]) -> list[Verdict]:
    """The verdict on every claim that is made at this preset."""
    seeds = tuple(sorted({outcome.seed for outcome in outcomes}))
    found = {(outcome.variant, outcome.seed): outcome for outcome in outcomes}
    verdicts = []
    for claim in workload.claims:
        if preset not in claim.presets:
            continue
        values = tuple(_value(found[claim.variant, seed], claim.metric) for seed in seeds)
        references = tuple(
            claim.margin + (0.0 if claim.baseline is None else _value(found[claim.baseline, seed], claim.metric))
            for seed in seeds
        )
        verdicts.append(Verdict(workload.name, claim, seeds, values, references))
    return verdicts


def alone(workload: Workload, preset: str, outcome: Outcome) -> tuple[list[Verdict], list[Claim]]:
    """The claims about one run's variant: the verdicts on those that need no rival, and the claims that need one."""
    about = [c for c in workload.claims if preset in c.presets and outcome.variant in (c.variant, c.baseline)]
    fixed = tuple(claim for claim in about if claim.baseline is None)
    return judge(replace(workload, claims=fixed), preset, [outcome]), [c for c in about if c.baseline is not None]


def _value(outcome: Outcome, metric: str) -> float:
    return math.nan if outcome.diverged else outcome.metrics[metric]
