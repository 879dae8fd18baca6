"""Runs by name: a recipe is a function that returns a frozen configuration, and a new run is a small edit of one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..dist.errors import UserError
from .lm import LMConfig


@dataclass(frozen=True)
class TrainConfig:
    """One run. `batch` counts rows over all ranks and over the `accumulate` backward passes of an update, so that the
    trajectory depends on neither. `precision` is one of `precision.PRECISIONS`."""

    model: LMConfig
    steps: int
    batch: int
    length: int
    accumulate: int = 1
    precision: str = "auto"
    lr: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 20
    keep: int = 3
    eval_every: int = 0
    eval_bytes: int = 262_144
    log_every: int = 1

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then linear decay to a tenth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (1 - 0.9 * min(1.0, done))


def tiny() -> TrainConfig:
    """For tests: seconds on one core."""
    model = LMConfig(layers=2, width=64, heads=4, kv_heads=2, hidden=128)
    return TrainConfig(model, steps=30, batch=4, length=64, warmup=5, checkpoint_every=5, eval_bytes=8192)


def demo() -> TrainConfig:
    """About a minute on two cores."""
    model = LMConfig(layers=4, width=256, heads=4, kv_heads=2, hidden=704)
    return TrainConfig(model, steps=100, batch=8, length=192, lr=2e-3, checkpoint_every=10, eval_bytes=65_536)


def small() -> TrainConfig:
    """An hour on two cores, minutes on a GPU."""
    return TrainConfig(LMConfig(), steps=2000, batch=32, length=512, checkpoint_every=100, eval_every=500, log_every=5)


def gpu() -> TrainConfig:
    """85 M parameters, for one GPU."""
    model = LMConfig(layers=12, width=768, heads=12, kv_heads=4, hidden=2048, tied=False)
    return TrainConfig(
        model,
        steps=2000,
        batch=64,
        length=1024,
        lr=6e-4,
        warmup=100,
        checkpoint_every=100,
        eval_every=500,
        log_every=10,
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {recipe.__name__: recipe for recipe in (tiny, demo, small, gpu)}


def describe() -> str:
    """'tiny (for tests: seconds on one core), …': the recipes, each with what its docstring says."""

    def says(make: Callable[[], TrainConfig]) -> str:
        text = (make.__doc__ or "").strip().rstrip(".")
        return text[:1].lower() + text[1:]

    return ", ".join(f"{name} ({says(make)})" for name, make in RECIPES.items())


def recipe(name: str, **changes: object) -> TrainConfig:
    """The configuration called `name` with `changes` that are not None."""
    if name not in RECIPES:
        raise UserError(f"there is no recipe '{name}'", expected=f"one of {', '.join(RECIPES)}")
    config = replace(RECIPES[name](), **{key: value for key, value in changes.items() if value is not None})  # type: ignore[arg-type]
    for field in ("steps", "batch", "accumulate", "length", "log_every"):
        if getattr(config, field) < 1:
            raise UserError(f"{field} is {getattr(config, field)}", expected="at least 1")
    for field in ("checkpoint_every", "eval_every"):
        if getattr(config, field) < 0:
            raise UserError(f"{field} is {getattr(config, field)}", expected="at least 1, or 0 for never")
    if config.keep < 1:
        raise UserError(f"keep is {config.keep}", expected="at least 1")
    if not 0 < config.lr < math.inf:
        raise UserError(f"lr is {config.lr}", expected="a positive, finite number")
    return config
