"""Whether overlap pays, measured on the calls themselves.

For each product (operation, shapes, dtype) the first calls take the arms in turn; then the slowest rank's median
decides, alike on all ranks, and the sequential arm wins ties within 3 %. A model of the machine could guess before the
first call; a measurement cannot be wrong about the machine that it runs on. All arms add in the same order, but a BLAS
may round a product otherwise when it gets fewer rows at a time: where a resumed run must repeat every bit, fix the arm.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch

ROUNDS = 4  # timed calls of each arm; one more before them warms it up
TIE = 0.97


@dataclass
class _Trial:
    """One product: its samples so far, and the verdict."""

    seconds: list[list[float]]
    calls: int = 0
    chosen: int | None = None
    medians: list[float] = field(default_factory=list)


class Gate:
    """`arms`: names, the sequential one first. `gather(tensor)` brings every rank's tensor, in rank order.

    `fixed`: an arm to use always.
    """

    def __init__(
        self, arms: Sequence[str], gather: Callable[[torch.Tensor], list[torch.Tensor]], *, fixed: int | None = None
    ) -> None:
        self.arms, self._gather, self._fixed = tuple(arms), gather, fixed
        self._trials: dict[Hashable, _Trial] = {}

    def choose(self, key: Hashable) -> int:
        """The arm for this call; collective at the call that decides. Followed by `took`."""
        trial = self._trials.setdefault(key, _Trial([[] for _ in self.arms]))
        if self._fixed is not None:
            return self._fixed
        if trial.chosen is None and trial.calls == (ROUNDS + 1) * len(self.arms):
            mine = torch.tensor([statistics.median(seconds[1:]) for seconds in trial.seconds], dtype=torch.float64)
            trial.medians = torch.stack(self._gather(mine)).max(0).values.tolist()
            best = min(range(len(self.arms)), key=lambda arm: trial.medians[arm])
            trial.chosen = best if trial.medians[best] < TIE * trial.medians[0] else 0
        return trial.calls % len(self.arms) if trial.chosen is None else trial.chosen

    def chosen(self, key: Hashable) -> int | None:
        """The arm that was chosen; None before that."""
        trial = self._trials.get(key)
        return self._fixed if self._fixed is not None else trial.chosen if trial else None

    def took(self, key: Hashable, arm: int, seconds: float) -> None:
        trial = self._trials[key]
        trial.calls += 1
        if trial.chosen is None and self._fixed is None:
            trial.seconds[arm].append(seconds)

    def explain(self) -> str:
        """A line for each product: what was chosen, and each arm's time against the sequential one."""
        lines = []
        for key, trial in self._trials.items():
            if self._fixed is not None:
                text = f"{self.arms[self._fixed]}, as asked for"
            elif trial.chosen is None:
                text = f"still measuring, {trial.calls} calls so far"
            else:
                ratios = [f"{name} {trial.medians[0] / s:.2f}×" for name, s in zip(self.arms[1:], trial.medians[1:])]
                text = f"{self.arms[trial.chosen]} (measured: {', '.join(ratios)} of {self.arms[0]})"
            lines.append(f"{key}: {text}")
        return "\n".join(lines) or "nothing has run yet"
