"""What a learning method must say of itself to be run, judged and repeated with any of the systems on or off.

A `Workload` names its data, model, loss and claims; it never opens a checkpoint of its run, streams, or talks to other
ranks by itself, because the same code must run with every system on and off and give the same numbers. The loss takes
the model *and* the batch (not predictions and labels), since routers, contrastive and recurrent methods need both.

A batch is a pure function of (seed, step, rows): any rank, any world size and any restart can compute the one it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...dist.errors import UserError
from ...dist.launch import Launch
from .switches import PLAIN, Switches
from .tensor_ranks import TensorRanks

PRESETS = ("ci", "small", "gpu")


@dataclass(frozen=True)
class Config:
    """What every run has; workloads add their own fields. `batch` counts rows over all ranks."""

    steps: int = 100
    batch: int = 64
    lr: float = 1e-2
    seed: int = 0
    optimizer: str = "adamw"  # or "sgd", with momentum 0.9
    weight_decay: float = 0.0
    clip: float = 1.0  # 0: off
    warmup: int = 10
    checkpoint_every: int = 50

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then linear decay to a tenth."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.lr * (1 - 0.9 * (step - self.warmup) / max(1, self.steps - self.warmup))

    def but(self, **changes: Any) -> Config:
        """A copy with `changes`, whose names must be fields."""
        known = {item.name: type(getattr(self, item.name)) for item in fields(self)}
        for name, value in changes.items():
            if name not in known:
                raise UserError(f"no option '{name}'", expected=f"one of {', '.join(known)}")
            if known[name] is not type(value) and not (known[name] is float and type(value) is int):
                raise UserError(f"{name} = {value!r}", expected=f"a value like {getattr(self, name)!r}")
        return replace(self, **changes)


@dataclass
class Place:
    """Where a run happens: its rank, device and switches; `shared` is a folder that variants of one seed share.

    `tensor`: the ranks that share each matrix product, while `--overlap` is on and the run lasts.
    `evidence` is where code that moves bytes counts them: system → what → number.
    """

    here: Launch
    folder: Path
    shared: Path
    switches: Switches = PLAIN
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    evidence: dict[str, dict[str, float]] = field(default_factory=dict)
    tensor: TensorRanks | None = None

    def count(self, system: str, **amounts: float) -> None:
        """Add to the evidence that a system ran."""
        counts = self.evidence.setdefault(system, {})
        for name, amount in amounts.items():
            counts[name] = counts.get(name, 0) + amount


class Data(Protocol):
    """Deterministic and seekable."""

    def batch(self, step: int, rows: slice) -> Any:
        """Rows `rows` of global batch `step`: tensors, or a tuple or mapping of them, with the rows first."""
        ...


Metrics = dict[str, float]


@dataclass(frozen=True)
class Variant:
    """One way to run a workload: the method itself, or a baseline at equal cost. `changes` edits the config; `steps`
    is its share of the preset's updates, where its updates cost more."""

    note: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    presets: tuple[str, ...] = PRESETS  # at which it is compared
    steps: float = 1.0


@dataclass(frozen=True)
class Claim:
    """`metric` of `variant` is at least (or at most) that of `baseline` plus `margin`; without a baseline, `margin`.

    `expected`: whether our measurements let us expect it at this size; the table shows claims that fail as failed,
    expected or not. A baseline that diverged (NaN) has lost.
    """

    text: str
    metric: str
    variant: str
    baseline: str | None
    margin: float = 0.0
    relation: str = ">="
    presets: tuple[str, ...] = PRESETS
    expected: bool = True


@dataclass(frozen=True)
class Workload:
    """A learning method. The first of the `variants` that are compared at a preset is there the method itself; `equal`
    says in what the variants cost the same. A model that streams brings its chunked loss along: see
    `parallel.stream.protocol`.

    `after(model, data, step)` is told of each update (`step` are done) and may change what a checkpoint holds.
    `roll_back(model, data, step)` is told too and returns None, or an earlier step to go back to and what to change
    once there; a run that may roll back keeps all its checkpoints. `state(data, model)` gives further objects that a
    resume needs.
    """

    name: str
    title: str
    paper: str
    presets: Mapping[str, Config]
    data: Callable[[Any, Place], Any]
    model: Callable[[Any, Any, Place], nn.Module]
    loss: Callable[[Any, Any], Tensor]
    evaluate: Callable[[Any, Any, Any], Metrics]
    variants: Mapping[str, Variant]
    claims: tuple[Claim, ...]
    exercises: frozenset[str]
    equal: str
    needs: tuple[str, ...] = ()  # optional packages
    state: Callable[[Any, nn.Module], dict[str, Any]] | None = None
    after: Callable[[Any, Any, int], None] | None = None
    roll_back: Callable[[Any, Any, int], tuple[int, Callable[[], None]] | None] | None = None

    def config(self, preset: str, variant: str, **changes: Any) -> Config:
        """The config of `variant` at `preset`; `changes` win over both."""
        if preset not in self.presets:
            raise UserError(f"no preset '{preset}' of {self.name}", expected=f"one of {', '.join(self.presets)}")
        if variant not in self.variants:
            raise UserError(f"no variant '{variant}' of {self.name}", expected=f"one of {', '.join(self.variants)}")
        base, chosen = self.presets[preset], self.variants[variant]
        base = replace(base, steps=round(base.steps * chosen.steps))
        return base.but(**{**chosen.changes, **changes})

    def compared(self, preset: str) -> list[str]:
        """The variants that a comparison at `preset` runs."""
        return [name for name, variant in self.variants.items() if preset in variant.presets]

    def method(self, preset: str) -> str:
        """The variant that is the paper's method at `preset`."""
        return next(iter(self.compared(preset)))
