"""Which checkpoints may go: a pure function of what is committed, used after every save and by `undertow ckpt prune`.

A checkpoint stays when any rule wants it: one of the newest, a multiple of a number of steps, one of the best by a
metric that was saved with it. The newest always stays, whatever the rules say, so that a policy can never leave a run
with nothing to restart from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..dist.errors import UserError

FORM = "rules such as last=3,every=1000,best=2:loss:min"


@dataclass(frozen=True)
class Retention:
    """Keep the `last` newest (None: all), those whose step is a multiple of `every` (0: none), and the `best` by
    `metric`, smallest (`mode` 'min') or largest ('max') first. Prints as text that `parse` reads."""

    last: int | None = 3
    every: int = 0
    best: int = 0
    metric: str = ""
    mode: str = "min"

    def __post_init__(self) -> None:
        if (self.last is not None and self.last < 1) or self.every < 0 or self.best < 0:
            raise UserError(f"retention '{self}'", expected="last ≥ 1 (or all), every ≥ 0 and best ≥ 0")
        if self.mode not in ("min", "max") or (self.best > 0) != bool(self.metric):
            raise UserError(f"retention '{self}'", expected="best=N:METRIC:min or best=N:METRIC:max")

    def __str__(self) -> str:
        parts = [f"last={'all' if self.last is None else self.last}"]
        parts += [f"every={self.every}"] if self.every else []
        parts += [f"best={self.best}:{self.metric}:{self.mode}"] if self.best or self.metric else []
        return ",".join(parts)

    @classmethod
    def parse(cls, text: str) -> Retention:
        """'last=3,every=1000,best=2:loss:min' → Retention; a rule that is not named is off, `last` then 1."""
        fields: dict[str, object] = {"last": 1}
        for rule in filter(None, (part.strip() for part in text.split(","))):
            if match := re.fullmatch(r"last=(\d+|all)", rule):
                fields["last"] = None if match[1] == "all" else int(match[1])
            elif match := re.fullmatch(r"every=(\d+)", rule):
                fields["every"] = int(match[1])
            elif match := re.fullmatch(r"best=(\d+):([^:]+)(?::(min|max))?", rule):
                fields |= {"best": int(match[1]), "metric": match[2], "mode": match[3] or "min"}
            else:
                raise UserError(f"retention rule '{rule}'", expected=FORM)
        if not text.strip():
            raise UserError("retention ''", expected=FORM)
        return cls(**fields)  # type: ignore[arg-type]


def to_keep(steps: Sequence[int], policy: Retention, metrics: Mapping[int, Mapping[str, float]] | None = None) -> set:
    """The steps among `steps` that stay. `metrics`: step → name → value; a value that is missing or NaN is no best."""
    steps = sorted(steps)
    keep = set(steps if policy.last is None else steps[-policy.last :]) | set(steps[-1:])
    if policy.every:
        keep |= {step for step in steps if step % policy.every == 0}
    if policy.best:
        values = {step: (metrics or {}).get(step, {}).get(policy.metric, math.nan) for step in steps}
        sign = 1 if policy.mode == "min" else -1
        ranked = sorted((sign * value, -step) for step, value in values.items() if not math.isnan(value))
        keep |= {-step for _, step in ranked[: policy.best]}  # of equals the newer
    return keep


def to_remove(
    steps: Sequence[int], keep: int | Retention | None, metrics: Mapping[int, Mapping[str, float]] | None = None
) -> list[int]:
    """The steps to remove, oldest first. `keep`: a policy, or a number of newest ones (None: all)."""
    policy = keep if isinstance(keep, Retention) else Retention(last=keep)
    return sorted(set(steps) - to_keep(steps, policy, metrics))
