"""Whether overlap pays: a model of the machine proposes, measured calls decide.

For each product (operation, shapes, dtype) the model predicts every arm. Of what pieces cost it knows the bytes that
they read again and a GPU's host that queues them, so it is an upper bound: an arm with which even it finds nothing to
hide is never tried. The others take turns with the sequential one on the first calls; then the slowest rank's times,
round by round, decide alike on all ranks. An arm must win by 3 % and in all rounds but one, so that noise does not
switch it on. On a GPU, where there are many arms, the best ones are measured again unless a product is long: new calls
decide, because the best of many was lucky in the old ones. Of short products, whose times the host's noise moves by
more than 3 %, one is taken only where its win is sure, of single calls and of some in a row: one after the other a call
waits for what the host queues, in a row perhaps for the call before it. What was chosen so is measured beside the
sequential way once more after 200 calls, after 1,600 more, and so on, because calls that follow one another have the
host's state in common: where it does not win then, the product is sequential for good. Without a measured Machine all
arms are tried.

All arms add in the same order, but a BLAS may round a product otherwise when it gets fewer rows at a time: where a
resumed run must repeat every bit, fix the arm.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch

from ..comms.chunk_plan import panels
from ..comms.cost import overlapped_columns_seconds, overlapped_scatter_seconds
from ..dist.machine import Machine
from .overlap_arms import Arm
from .overlap_queueing import Queueing

ROUNDS = 5  # timed calls of each arm; one more before them warms it up
WIN = 1.03  # least median of sequential / arm, over the rounds
SHORT_S = 4e-3  # on a GPU; a product that takes less has noisy calls
AGAIN_S = 20e-3  # on a GPU; one that takes less is measured again, because its calls are cheap
AGAIN, FINALISTS = 20, 2  # timed calls of each, and how many arms beside the sequential one
ROW, ROW_S = 8, 2e-3  # of a short product's calls in a row: how many at most, and about how long
SURE = 1.01  # least lower end of the 95 % interval of that median
CHECK, RARER = (
    200,
    8,
)  # calls before an arm that was measured again is checked, and how many times more before each next
HOPE = 1.02  # least predicted speed-up with which an arm is tried


@dataclass(frozen=True)
class Rates:
    """What the model needs: floating-point operations and bytes per second of one rank while all are busy, and the
    seconds that one message costs. `memory_bytes_per_s`: at which a product reads its operands, where that is known.
    `queueing`: what pieces cost the host of a GPU."""

    flops: float
    bytes_per_s: float
    latency_s: float
    memory_bytes_per_s: float = float("inf")
    queueing: Queueing = Queueing()

    @classmethod
    def of(cls, machine: Machine, dtype: str, device: str, link: str = "") -> Rates | None:
        """From a measured machine; None where it lacks a rate. `link`: its name there, found by `device` if empty."""
        names = [link] if link else ["gloo_ring", "gloo"] if device == "cpu" else ["nccl_ring", "nccl"]
        found = next((machine.links[name] for name in names if name in machine.links), None)
        flops = machine.flops.get(f"gemm/{dtype}")
        if found is None or flops is None:
            return None
        memory = 2 * machine.copies.get("d2d", float("inf")) if device != "cpu" else float("inf")  # it reads and writes
        return cls(flops, found.bytes_per_s, found.latency_s, memory)

    def seconds(self, arm: Arm, world: int, flops: float, nbytes: float, reads: float = 0.0) -> float:
        """One product of `flops` whose collective moves `nbytes` out of this rank; its pieces read `reads` bytes."""
        gemm_s, link_s = max(flops / self.flops, reads / self.memory_bytes_per_s), nbytes / self.bytes_per_s
        messages_s = (world - 1) * arm.subchunks * self.latency_s
        if not arm.overlap:
            return gemm_s + link_s + messages_s
        hidden_s = hidden_seconds(arm, world, gemm_s, link_s) + messages_s
        return max(hidden_s, self.queueing.seconds(arm, world))


def hidden_seconds(arm: Arm, world: int, gemm_s: float, link_s: float) -> float:
    """A product and its collective as an arm overlaps them, without what pieces cost."""
    if not arm.columns:
        return overlapped_scatter_seconds(world, gemm_s, link_s, arm.subchunks)
    if arm.whole:
        return overlapped_columns_seconds(world, gemm_s, link_s, [1 / arm.subchunks] * arm.subchunks, whole=True)
    many = 1 << 20  # of so many columns, as if they could be cut anywhere
    shares = [(right - left) / many for left, right in panels(many, arm.subchunks, world)]
    return overlapped_columns_seconds(world, gemm_s, link_s, shares)


def trial_calls(arms: int) -> int:
    """After so many calls at most a product has settled on one of `arms` arms."""
    return (ROUNDS + 1) * arms + (AGAIN + 1) * (FINALISTS + 1) + 1


def checked_calls(arms: int) -> int:
    """After so many it has been checked once."""
    return trial_calls(arms) + CHECK + 2 * (AGAIN + 1)


def surely(ratios: Sequence[float]) -> float:
    """What the median exceeds with 95 %, from at least 5 samples: by order statistics, whatever their distribution."""
    below, rank = 2.0 ** -len(ratios), 0  # P(at most `rank` samples lie below the median)
    while below <= 0.05:
        rank += 1
        below += math.comb(len(ratios), rank) / 2 ** len(ratios)
    return sorted(ratios)[rank - 1]


@dataclass
class _Trial:
    """One product: the arms that are tried (by number), their samples so far, and the verdict."""

    arms: list[int]
    predicted: dict[int, float]
    seconds: list[list[float]] = field(default_factory=list)
    calls: int = 0
    chosen: int | None = None
    ratios: dict[int, float] = field(default_factory=dict)
    least: dict[int, float] = field(default_factory=dict)  # what the ratios of those measured again surely exceed
    began: int = 0  # calls before those whose samples count
    again: bool = False
    row: int = 0  # calls in a row that are timed beside each single one
    rows: list[list[float]] = field(default_factory=list)  # seconds for each of them
    held: int | None = None  # what was chosen, while it is checked
    checks: int = 0
    why: str = ""

    @property
    def complete(self) -> bool:
        return self.calls - self.began == ((AGAIN if self.again else ROUNDS) + 1) * len(self.arms)


class Gate:
    """`arms`: the sequential one first. `gather(tensor)` brings every rank's tensor, in rank order.

    `fixed`: an arm to use always, because of `why`. `again_s`: products that take less are measured again; `short_s`:
    those that take less want a sure win then.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        gather: Callable[[torch.Tensor], list[torch.Tensor]],
        *,
        fixed: int | None = None,
        why: str = "as asked for",
        short_s: float = 0.0,
        again_s: float = 0.0,
    ) -> None:
        self.arms, self._gather, self._fixed, self._why = tuple(arms), gather, fixed, why
        self._short_s, self._again_s = short_s, max(short_s, again_s)
        self._trials: dict[Hashable, _Trial] = {}

    def choose(
        self,
        key: Hashable,
        predict: Callable[[Arm], float] | None = None,
        can: Callable[[Arm], bool] = lambda arm: True,
    ) -> int:
        """The arm for this call; collective at calls that decide. Followed by `took` while `measuring`.

        `predict`: seconds of an arm by the model, equal on all ranks; None when there is no model. `can`: whether an
        arm can run this product, equal on all ranks; the sequential one always can.
        """
        trial = self._trials.get(key) or self._trials.setdefault(key, self._trial(predict, can))
        if trial.chosen is None and trial.complete:
            self._decide(trial)
        if trial.chosen is not None:
            return trial.chosen
        turn, at = divmod(trial.calls - trial.began, len(trial.arms))  # back and forth, for callers that take turns
        return trial.arms[len(trial.arms) - 1 - at if turn % 2 else at]

    def _trial(self, predict: Callable[[Arm], float] | None, can: Callable[[Arm], bool]) -> _Trial:
        everyone = [at for at, arm in enumerate(self.arms) if at == 0 or can(arm)]
        predicted = {} if predict is None else {arm: predict(self.arms[arm]) for arm in everyone}
        if self._fixed is not None:
            return _Trial([self._fixed], predicted, chosen=self._fixed, why=self._why)
        if predicted:
            everyone = [0, *(arm for arm in everyone[1:] if predicted[0] >= HOPE * predicted[arm])]
            if everyone == [0]:
                return _Trial([0], predicted, chosen=0, why="nothing to hide, by the model")
        return _Trial(everyone, predicted, [[] for _ in everyone])

    def _decide(self, trial: _Trial) -> None:
        timings = [trial.seconds, trial.rows] if trial.row else [trial.seconds]
        mine = torch.tensor(timings, dtype=torch.float64)[:, :, 1:]
        slowest = torch.stack(self._gather(mine)).max(0).values  # [single calls, in a row; arms; rounds]
        plain_s = float(slowest[0, 0].median())
        rounds = {arm: (slowest[:, 0] / slowest[:, at]).tolist() for at, arm in enumerate(trial.arms) if at}
        trial.ratios |= {arm: min(map(statistics.median, ratios)) for arm, ratios in rounds.items()}
        best_first = sorted(rounds, key=lambda arm: -trial.ratios[arm])
        if trial.again:
            trial.least = {arm: min(map(surely, ratios)) for arm, ratios in rounds.items()}
        if trial.held is not None:
            kept = trial.ratios[trial.held] > 1
            trial.chosen, trial.held = trial.held if kept else 0, None
            trial.why = f"measured, and {'again' if kept else 'no gain'} in a later check"
            return
        if trial.again:
            sure = SURE if plain_s < self._short_s else 0.0
            winners = [arm for arm in best_first if trial.ratios[arm] >= WIN and trial.least[arm] >= sure]
        elif plain_s >= self._again_s:
            often = [arm for arm in best_first if sum(ratio > 1 for ratio in rounds[arm][0]) >= ROUNDS - 1]
            winners = [arm for arm in often if trial.ratios[arm] >= WIN]
        else:
            winners = []
            if finalists := [arm for arm in best_first if trial.ratios[arm] > 1][:FINALISTS]:
                row = min(ROW, int(ROW_S / max(plain_s, 1e-9))) if plain_s < self._short_s else 0
                trial.row = row if row > 1 else 0
                self._anew(trial, finalists)
                return
        trial.chosen, trial.why = winners[0] if winners else 0, "measured"

    def _anew(self, trial: _Trial, arms: list[int]) -> None:
        """Measure these arms beside the sequential one in new calls."""
        trial.arms, trial.began, trial.again = [0, *arms], trial.calls, True
        trial.seconds, trial.rows = ([[] for _ in trial.arms] for _ in range(2))

    def lasts(self, key: Hashable) -> int | None:
        """For how many calls a choice holds before `check`; None: for good."""
        trial = self._trials[key]
        return CHECK * RARER**trial.checks if trial.again and trial.chosen else None

    def check(self, key: Hashable) -> None:
        """The next calls measure what was chosen beside the sequential way, if it is another one."""
        trial = self._trials[key]
        if trial.chosen:
            self._anew(trial, [trial.chosen])
            trial.held, trial.chosen, trial.checks = trial.chosen, None, trial.checks + 1

    def standing(self, key: Hashable) -> int:
        """The arm of a call that cannot be measured: what is or was chosen or fixed, else the sequential one."""
        trial = self._trials.get(key)
        return (self._fixed if trial is None else trial.chosen or trial.held) or 0

    def chosen(self) -> Arm | None:
        """What was chosen for the only product so far; None while it is measured, or with several products."""
        trials = list(self._trials.values())
        return None if len(trials) != 1 or trials[0].chosen is None else self.arms[trials[0].chosen]

    def measuring(self, key: Hashable) -> bool:
        """Whether this product's calls are being timed."""
        return self._trials[key].chosen is None

    def again(self, key: Hashable) -> bool:
        """Whether the arms that may be chosen are measured again."""
        return self._trials[key].again

    def row(self, key: Hashable) -> int:
        """How many calls in a row are to be timed beside each single one that is measured now; 0: none."""
        return self._trials[key].row

    def took(self, key: Hashable, arm: int, seconds: float, in_a_row: float = 0.0) -> None:
        """`in_a_row`: seconds for each of `row` calls."""
        trial = self._trials[key]
        trial.calls += 1
        trial.seconds[trial.arms.index(arm)].append(seconds)
        if trial.row:
            trial.rows[trial.arms.index(arm)].append(in_a_row)

    def explain(self, key: Hashable = None) -> str:
        """A line for each product, or for one: what was chosen and why, with predicted and measured speed-ups over
        sequential."""
        trials = {key: self._trials[key]} if key is not None else self._trials
        return "\n".join(f"{key}: {self._line(trial)}" for key, trial in trials.items()) or "nothing has run yet"

    def _line(self, trial: _Trial) -> str:
        parts = []
        for arm, seconds in list(trial.predicted.items())[1:]:
            if arm in trial.arms or arm in trial.ratios or (trial.chosen == 0 and not trial.ratios):
                parts.append(f"{self.arms[arm].name}: predicted {trial.predicted[0] / max(seconds, 1e-12):.2f}×")
        for arm, ratio in trial.ratios.items():
            least = f" (surely {trial.least[arm]:.2f}×)" if arm in trial.least else ""
            parts.append(f"{self.arms[arm].name}: measured {ratio:.2f}×{least}")
        if trial.chosen is None and trial.held is None:
            return f"still measuring, {trial.calls} calls so far"
        head = self.arms[trial.chosen or trial.held or 0].name + (", being checked" if trial.chosen is None else "")
        return f"{head} ({'; '.join([trial.why, *parts])})"
