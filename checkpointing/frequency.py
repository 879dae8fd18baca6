"""How often to save, from what a save costs and how often something fails.

Young (1974) and Daly (2006) minimise lost time: save every sqrt(2 · cost · mean time between failures) seconds, with
Daly's higher-order terms. What a lazy save costs is the time that training was blocked or, where that is more, by how
much the steps beside the save were longer, not the time until it is durable; but the next save cannot begin before the
last has reached the disk, and a cap says how much of the running time saves may take at most. The longest of these
three intervals counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..dist.errors import UserError
from ..dist.units import format_seconds


@dataclass(frozen=True)
class Frequency:
    """Choose the interval: for failures every `mtbf_s` seconds on average (over the whole job, not per node), and saves
    that cost at most the share `overhead` of the time. The first save comes after `first` steps, to be measured."""

    mtbf_s: float = 6 * 3600.0
    overhead: float = 0.01
    first: int = 5

    def __post_init__(self) -> None:
        if self.mtbf_s <= 0 or not 0 < self.overhead <= 1 or self.first < 1:
            raise UserError(f"{self}", expected="mtbf_s > 0, 0 < overhead ≤ 1 and first ≥ 1")

    def interval_s(self, *, stall_s: float, commit_s: float) -> float:
        """Seconds between the begins of two saves that cost `stall_s` each and are durable after `commit_s`."""
        return max(young_daly(stall_s, self.mtbf_s), commit_s, stall_s / self.overhead)

    def steps(self, *, stall_s: float, commit_s: float, step_s: float) -> int:
        """The interval in steps of `step_s` seconds, at least one."""
        return max(1, math.ceil(self.interval_s(stall_s=stall_s, commit_s=commit_s) / max(step_s, 1e-9)))

    def explain(self, *, stall_s: float, commit_s: float, step_s: float) -> str:
        """Which of the three bounds counts, and the time that failures and saves will cost."""
        bounds = {
            "Young–Daly": young_daly(stall_s, self.mtbf_s),
            "time to commit": commit_s,
            f"overhead cap {self.overhead:.2%}": stall_s / self.overhead,
        }
        name = max(bounds, key=lambda key: bounds[key])
        interval_s = bounds[name]
        lost = interval_s / 2 / self.mtbf_s + stall_s / interval_s if interval_s else 0.0
        return (
            f"every {self.steps(stall_s=stall_s, commit_s=commit_s, step_s=step_s)} steps "
            f"({format_seconds(interval_s)}, by {name}); saves and lost work cost {lost:.2%}"
        )


def young_daly(cost_s: float, mtbf_s: float) -> float:
    """Daly 2006, eq. 37: the optimal seconds between saves; `mtbf_s` where a save costs half of that or more."""
    if cost_s >= mtbf_s / 2:
        return mtbf_s
    ratio = math.sqrt(cost_s / (2 * mtbf_s))
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + ratio / 3 + ratio * ratio / 9) - cost_s
