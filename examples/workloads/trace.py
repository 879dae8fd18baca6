"""Continual learning over a sequence of tasks, with worked steps in the targets, replay, and rolling back.

After TRACE (Wang et al. 2023): tasks are learned one after another; R[i, j] is the accuracy on task j after task i,
overall performance OP = mean_j R[N, j], backward transfer BWT = mean_{j<N} (R[N, j] − R[j, j]). Its remedy, RCL,
trains on worked steps as well as answers and replays some of the past. Our tasks are small enough for a processor:
task t maps two digits x, y to (a_t·x + b_t·y) mod 10, and its worked steps are a_t·x and b_t·y. As a pretrained model
would, ours first learns what all tasks share, to add two digits; working in the open lets them use it. A fifth of the
pairs is held out of every task (not out of the addition), and "sums" is how much of that general ability is left.

`guarded` starts without replay. When a task has cost the earlier ones more than `tolerance`, the run goes back to the
checkpoint from before that task and learns it again with replay. Its updates are counted in full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dist.errors import UserError
from .contract import Claim, Config, Metrics, Place, Variant, Workload

TASKS = ((1, 1), (3, 1), (7, 3), (9, 7))  # (a, b): each multiplies by a unit of Z/10
BEGINNING = 3  # spans of updates for the addition, before one span for each task
SUM = len(TASKS)  # the cue of the addition; task t has cue t
CUE, X, Y, U, V, ANSWER = range(6)  # the slots of a row
ABSENT = 10  # a slot that is not there; digits are 0 … 9


@dataclass(frozen=True)
class TraceConfig(Config):
    """`worked`: targets are u, v, answer instead of the answer alone. `replay`: share of rows from earlier tasks."""

    worked: bool = True
    replay: float = 0.2
    guard: bool = False
    tolerance: float = 0.1
    width: int = 128

    @property
    def span(self) -> int:
        """Updates of one task."""
        return self.steps // (len(TASKS) + BEGINNING)


class Tasks:
    """Rows [cue, x, y, u, v, answer], slots that a row does not have ABSENT, and the record of scores R."""

    def __init__(self, config: TraceConfig, place: Place) -> None:
        self.config, self.device = config, place.device
        order = np.random.default_rng(7).permutation(100)
        self.train, self.test = order[:80], order[80:]
        self.scores: list[list[float]] = []
        self.replaying = [config.replay > 0 and not config.guard] * len(TASKS)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": [list(row) for row in self.scores], "replaying": list(self.replaying)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores = [list(row) for row in state["scores"]]
        self.replaying = list(state["replaying"])

    def rows(self, task: np.ndarray, pair: np.ndarray) -> Tensor:
        x, y = pair // 10, pair % 10
        a, b = np.array(TASKS)[task].T
        u, v = a * x % 10, b * y % 10
        if not self.config.worked:
            u, v, answer = np.full_like(u, ABSENT), np.full_like(v, ABSENT), (u + v) % 10
        else:
            answer = (u + v) % 10
        return torch.from_numpy(np.stack([task, x, y, u, v, answer], 1).astype(np.int64))

    def batch(self, step: int, rows: slice) -> Tensor:
        config, current = self.config, min(step // max(1, self.config.span) - BEGINNING, len(TASKS) - 1)
        generator = np.random.Generator(np.random.Philox(key=[config.seed, step]))
        if current < 0:
            return self.sums(generator.integers(0, 100, config.batch))[rows]
        task = np.full(config.batch, current)
        earlier = generator.integers(0, max(1, current), config.batch)
        chosen = generator.random(config.batch) < config.replay
        if current and self.replaying[current]:
            task = np.where(chosen, earlier, task)
        return self.rows(task, self.train[generator.integers(0, 80, config.batch)])[rows]

    def sums(self, pair: np.ndarray) -> Tensor:
        """Rows of the addition: cue, u, v and answer."""
        u, v = pair // 10, pair % 10
        none = np.full_like(u, ABSENT)
        return torch.from_numpy(np.stack([np.full_like(u, SUM), none, none, u, v, (u + v) % 10], 1).astype(np.int64))

    @torch.no_grad()
    def accuracy(self, model: SlotLM, task: int) -> float:
        """Of the answers to the held-out pairs (task -1: of the sums), decoding greedily what comes before them."""
        rows = self.sums(np.arange(100)) if task < 0 else self.rows(np.full(len(self.test), task), self.test)
        rows = rows.to(self.device)
        known = rows.clone()
        for slot in (U, V, ANSWER):
            asked = (rows[:, slot] != ABSENT) & ((slot == ANSWER) | (task >= 0))
            known[:, slot] = torch.where(asked, model(known, slot).argmax(-1), known[:, slot])
        return (known[:, ANSWER] == rows[:, ANSWER]).double().mean().item()


class SlotLM(nn.Module):
    """The distribution of a slot, given the slots before it: an MLP over the sum of their embeddings (Bengio 2003)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(ANSWER, ABSENT + 1, width) * 0.5)
        self.target = nn.Parameter(torch.randn(ANSWER + 1, width) * 0.5)
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, 10)

    def forward(self, rows: Tensor, slot: int) -> Tensor:
        """Logits [B, 10] of slot `slot` of `rows` [B, 6]; later slots are not looked at."""
        before = torch.arange(slot, device=rows.device)
        x = self.slots[before, rows[:, :slot]].sum(1) + self.target[slot]
        return self.out(F.relu(self.hidden(F.relu(x))))


def build(config: TraceConfig, data: Tasks, place: Place) -> SlotLM:
    if config.guard and (not config.checkpoint_every or config.span % config.checkpoint_every):
        raise UserError(
            f"a checkpoint every {config.checkpoint_every} updates, and {config.span} updates a task",
            expected="a checkpoint at the start of every task, for the guarded run to go back to",
        )
    return SlotLM(config.width)


def loss(model: SlotLM, rows: Tensor) -> Tensor:
    """Of the answers, and of the worked steps where x is there (in the addition u and v are the question)."""
    total = F.cross_entropy(model(rows, ANSWER), rows[:, ANSWER])
    if bool((rows[:, X] != ABSENT).all() & (rows[:, U] != ABSENT).all()):
        total = total + F.cross_entropy(model(rows, U), rows[:, U]) + F.cross_entropy(model(rows, V), rows[:, V])
    return total


def roll_back(model: SlotLM, data: Tasks, step: int) -> tuple[int, Callable[[], None]] | None:
    """After the last update of a task: note the scores; with `guard`, go back when earlier tasks have suffered."""
    config = data.config
    span = config.span
    if not span or step % span or not BEGINNING < step // span <= BEGINNING + len(TASKS):
        return None
    task = step // span - BEGINNING - 1
    scores = [data.accuracy(model, earlier) for earlier in range(len(TASKS))]
    before = data.scores[-1][:task] if data.scores else []
    data.scores.append(scores)
    lost = fmean(b - s for b, s in zip(before, scores)) if before else 0.0
    if not config.guard or data.replaying[task] or lost <= config.tolerance:
        return None

    def then() -> None:
        data.replaying = [replaying or number >= task for number, replaying in enumerate(data.replaying)]

    return (BEGINNING + task) * span, then


def evaluate(model: SlotLM, data: Tasks, config: TraceConfig) -> Metrics:
    last = [data.accuracy(model, task) for task in range(len(TASKS))]
    right_after = [row[number] for number, row in enumerate(data.scores[: len(TASKS) - 1])]
    backward = fmean(now - then for now, then in zip(last, right_after)) if right_after else 0.0
    return {"OP": fmean(last), "BWT": backward, "sums": data.accuracy(model, -1)}


DIRECT = {"worked": False}
BASE = TraceConfig(steps=700, batch=64, lr=2e-2, weight_decay=0.02, checkpoint_every=100)
WORKLOAD = Workload(
    name="trace",
    title="TRACE-mini: continual learning with worked steps, replay and rolling back",
    paper="Wang et al. 2023 (arXiv 2310.06762)",
    presets={
        "ci": BASE,
        "small": replace(BASE, steps=2100, checkpoint_every=300),
        "gpu": replace(BASE, steps=7000, checkpoint_every=1000),
    },
    data=Tasks,
    model=build,
    loss=loss,
    evaluate=evaluate,
    variants={
        "worked, replay": Variant("the method: worked steps, a fifth of the rows from the past"),
        "worked": Variant("worked steps, no replay", {"replay": 0.0}),
        "direct, replay": Variant("answers alone, replay", DIRECT),
        "direct": Variant("answers alone, no replay", {**DIRECT, "replay": 0.0}),
        "direct, replay, x3": Variant("as many predictions as with worked steps", DIRECT, ("small", "gpu"), steps=3),
        "worked, guarded": Variant("replay from the first task that hurts, which is learned again", {"guard": True}),
    },
    claims=(
        Claim("replay keeps what was learned", "OP", "worked, replay", "worked", 0.1),
        Claim("replay: less is forgotten", "BWT", "worked, replay", "worked", 0.1),
        Claim("worked steps beat answers alone", "OP", "worked, replay", "direct, replay", 0.1),
        Claim("worked steps keep the general ability", "sums", "worked, replay", "direct, replay", 0.05),
        Claim(
            "worked steps beat three times the updates",
            "OP",
            "worked, replay",
            "direct, replay, x3",
            0.1,
            presets=("small", "gpu"),
        ),
        Claim("rolling back to replay beats going on without", "OP", "worked, guarded", "worked", 0.1),
    ),
    exercises=frozenset({"checkpoint"}),
    equal="updates (the guarded run repeats some; x3 has as many predictions)",
    state=lambda data, model: {"tasks": data},
    roll_back=roll_back,
)
