"""Task-vector composition with a learned coefficient for each parameter block of each task.

After aTLAS (Zhang et al., "Knowledge composition using task vectors with learned anisotropic scaling", NeurIPS 2024).
Six models are fine-tuned from one base, each for its domain; τ_t = θ_t − θ_0. One model for all domains is
θ_0 + Σ_t c[t, k] · τ_t[k], with c trained from zero on validation data by the mean of the domains' losses. The
baselines are the base, one coefficient for all (chosen on a grid), and one learned coefficient per task.

The score of a domain is the accuracy on it as a share of its own expert's. For the toolkit: T + 1 checkpoints serve as
the task vectors and are read block by block (`task_vectors`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ...checkpointing.manifest import COMMIT
from ...dist.errors import UserError
from . import digits
from .contract import Claim, Config, Metrics, Place, Variant, Workload
from .keeper import Checkpoints
from .task_vectors import Compose, Source

DOMAINS = digits.DOMAINS[1:]
GRID = [i / 20 for i in range(21)]


@dataclass(frozen=True)
class AtlasConfig(Config):
    """`scaling`: blocks (aTLAS), tasks, isotropic or none. `tune` updates make an expert, `base` the base model."""

    scaling: str = "blocks"
    base: int = 300
    tune: int = 150
    width: int = 64


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, 10),
    )


def tune(model: nn.Module, split: digits.Split, steps: int, seed: int, lr: float) -> nn.Module:
    """A plain fine-tuning; every rank does the same one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        x, y = split.batch(seed=seed, step=step, rows=slice(None), batch=128)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


class Domains:
    """The base and the experts as sources of blocks, and the domains' validation and test data."""

    def __init__(self, config: AtlasConfig, place: Place) -> None:
        self.config, self.place = config, place
        train, validation, test = digits.load()
        self.validation = [digits.moved(validation, domain) for domain in DOMAINS]
        self.test = [digits.moved(test, domain) for domain in DOMAINS]
        torch.manual_seed(config.seed)
        base = mlp(config.width)
        self.base = self._kept("base", base, train, config.base, 3e-3)
        self.experts, self.ceiling = [], []
        for domain, split in zip(DOMAINS, self.test):
            expert = mlp(config.width)
            expert.load_state_dict(base.state_dict())
            self.experts.append(self._kept(domain, expert, digits.moved(train, domain), config.tune, 1e-3))
            with torch.no_grad():
                self.ceiling.append(digits.accuracy(expert(split.x), split.y))

    def _kept(self, name: str, model: nn.Module, split: digits.Split, steps: int, lr: float) -> Source:
        """Tune `model`, or load it where a variant of this seed has; then read it from where it was saved."""
        seed = self.config.seed
        if self.place.switches.checkpoint == "off":
            tune(model, split, steps, seed, lr)
            return Source(self.place, state={key: value.detach() for key, value in model.state_dict().items()})
        root = self.place.shared / "experts" / name
        path = root / "step-000000000"
        if (path / COMMIT).is_file():
            source = Source(self.place, path=path)
            model.load_state_dict({key: source.block(key) for key in model.state_dict()})
            return source
        tune(model, split, steps, seed, lr)
        saved = Checkpoints(self.place, root, 0, 1, {"model": model})
        saved.save(0)
        saved.close()
        return Source(self.place, path=path)

    def batch(self, step: int, rows: slice) -> tuple[Tensor, Tensor]:
        """[rows, domains, 64] images and labels [rows, domains]: every domain in every batch."""
        seed, size = self.config.seed, self.config.batch
        generator = np.random.Generator(np.random.Philox(key=[seed, step]))
        picked = torch.from_numpy(generator.integers(0, len(self.validation[0].y), size=(size, len(DOMAINS)))[rows])
        x = torch.stack([split.x[picked[:, d]] for d, split in enumerate(self.validation)], 1)
        return x, torch.stack([split.y[picked[:, d]] for d, split in enumerate(self.validation)], 1)


class Composed(nn.Module):
    """The base model with blocks composed anew in each forward. Only `coefficients` [tasks, blocks or 1] trains."""

    def __init__(self, config: AtlasConfig, data: Domains) -> None:
        super().__init__()
        self.skeleton = mlp(config.width).requires_grad_(False)
        self.names = [name for name, _ in self.skeleton.named_parameters()]
        self.sources, self.scaling = data, config.scaling
        columns = len(self.names) if config.scaling == "blocks" else 1
        self.coefficients = nn.Parameter(torch.zeros(len(DOMAINS), columns))

    def forward(self, x: Tensor) -> Tensor:
        columns = self.coefficients.expand(-1, len(self.names))
        blocks = {
            name: Compose.apply(columns[:, k], name, self.sources.base, self.sources.experts)
            for k, name in enumerate(self.names)
        }
        return functional_call(self.skeleton, blocks, (x,))  # type: ignore[arg-type]


def build(config: AtlasConfig, data: Domains, place: Place) -> Composed:
    if config.scaling not in ("blocks", "tasks", "isotropic", "none"):
        raise UserError(f"scaling {config.scaling}", expected="blocks, tasks, isotropic or none")
    return Composed(config, data)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x.flatten(0, 1)), y.flatten())


@torch.no_grad()
def evaluate(model: Composed, data: Domains, config: AtlasConfig) -> Metrics:
    def score(splits: list[digits.Split]) -> float:
        """The mean over domains of accuracy / the expert's accuracy."""
        splits = [split.to(model.coefficients.device) for split in splits]
        logits = model(torch.cat([split.x for split in splits])).split([len(split.y) for split in splits])
        found = [digits.accuracy(part, split.y) for part, split in zip(logits, splits)]
        return fmean(value / ceiling for value, ceiling in zip(found, data.ceiling))

    if config.scaling == "isotropic":

        def at(scale: float) -> float:
            model.coefficients.fill_(scale)
            return score(data.validation)

        model.coefficients.fill_(max(GRID, key=at))
    return {"score": score(data.test), "coefficients": float(model.coefficients.numel())}


NO_TRAINING = {"steps": 0}
BASE = AtlasConfig(steps=150, batch=32, lr=0.05, weight_decay=0.0, checkpoint_every=50)
WORKLOAD = Workload(
    name="atlas",
    title="aTLAS: one coefficient per block of each task vector",
    paper="Zhang et al., NeurIPS 2024 (arXiv 2407.02880)",
    presets={"ci": BASE, "small": replace(BASE, steps=400, base=600, tune=300), "gpu": replace(BASE, steps=2000)},
    data=Domains,
    model=build,
    loss=loss,
    evaluate=evaluate,
    variants={
        "blocks": Variant("the method: a coefficient per block and task"),
        "tasks": Variant("one learned coefficient per task", {"scaling": "tasks"}),
        "isotropic": Variant(
            "one coefficient, best of a grid on validation data", {"scaling": "isotropic"} | NO_TRAINING
        ),
        "base": Variant("the base model", {"scaling": "none"} | NO_TRAINING),
    },
    claims=(
        Claim("beats isotropic arithmetic", "score", "blocks", "isotropic"),
        Claim("beats one coefficient per task", "score", "blocks", "tasks"),
        Claim("composition beats the base", "score", "blocks", "base", 0.02),
    ),
    exercises=frozenset({"checkpoint"}),
    equal="validation data and experts",
    needs=("scikit-learn",),
)
