"""Parameter sharing, stable version: all weights of a model live in one vector of m floats.

After "In defense of parameter sharing for model compression" (Desai & Shrivastava, ICLR 2024). Weight i of the
flattened model is λ(layer) · g(i) · ψ[h(i)], with g = ±1. ROAST hashes each chunk by itself, so weights collide even
where m = n; STABLE hashes the flattened model as a whole: each run of m weights is a permutation of ψ, so at m = n
nothing collides, and below every entry has the same number of sharers. The gradient of an entry is divided by Σ λ² of
its sharers, which makes a step independent of ψ's scale. The paper's exact scaler was not at hand; this one follows
from asking that a step on ψ moves the weights as a step on the weights would.

Rivals at the same number of floats: magnitude pruning (train, keep the largest, train on; or without the last part),
SNIP (Lee et al. 2019: by |w · ∂loss/∂w| before training), a random subset, and a narrow dense network. Where a pruned
weight sits is not counted as storage, in their favour, and the learning rate is the best of four for pruning.

For the toolkit: what is checkpointed and reduced is m floats, not n, and an entry's gradient is complete only after
the last layer that shares it, which `--gradients tracked` waits for entry by entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dist.errors import UserError
from . import digits
from .contract import Claim, Config, Metrics, Place, Variant, Workload
from .tracked import TrackedVector

SIZES = (64, 64, 48, 10)
NARROW = (64, 2, 10)  # 148 weights, about a fiftieth
KINDS = ("full", "stable", "roast", "prune", "snip", "random", "dense")
CHUNK = 16  # ROAST's chunk of consecutive weights


@dataclass(frozen=True)
class SharingConfig(Config):
    """`sharing`: one of KINDS. `prune_at`: the share of the updates after which weights are dropped."""

    sharing: str = "stable"
    compression: int = 50
    prune_at: float = 0.5
    init: float = 0.05  # standard deviation of ψ


class SharedMLP(nn.Module):
    """An MLP whose matrices are views into one vector; biases are left out, as they would not be shared."""

    index: Tensor
    factor: Tensor
    scaler: Tensor
    mask: Tensor

    def __init__(self, config: SharingConfig) -> None:
        super().__init__()
        sizes = NARROW if config.sharing == "dense" else SIZES
        shapes = [(out, into) for into, out in zip(sizes, sizes[1:])]
        counts = [out * into for out, into in shapes]
        weights = sum(counts)
        memory = max(1, weights // config.compression)
        generator = torch.Generator().manual_seed(config.seed)
        stds = torch.cat([torch.full((c,), (2 / into) ** 0.5) for c, (_, into) in zip(counts, shapes)])
        sign = torch.randint(0, 2, (weights,), generator=generator) * 2.0 - 1
        if config.sharing == "stable":
            runs = [torch.randperm(memory, generator=generator) for _ in range(-(-weights // memory))]
            index = torch.cat(runs)[:weights]
        elif config.sharing == "roast":
            starts = torch.randint(0, max(1, memory - CHUNK), (-(-weights // CHUNK),), generator=generator)
            index = (starts[:, None] + torch.arange(CHUNK)).flatten()[:weights] % memory
        else:
            memory, index = weights, torch.arange(weights)
        lam = stds / config.init
        squares = torch.zeros(memory).index_add_(0, index, lam**2)
        scaler = 1 / squares.clamp_min(1e-12) if config.sharing != "roast" else torch.ones(memory)
        self.kept = max(1, weights // config.compression)
        mask = torch.ones(weights)
        if config.sharing == "random":  # a random subset of the weights, chosen before training
            mask[torch.randperm(weights, generator=generator)[self.kept :]] = 0
        self.shapes, self.counts = shapes, counts
        self.tracked: TrackedVector | None = None
        self.psi = nn.Parameter(torch.randn(memory, generator=generator) * config.init)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("factor", lam * sign, persistent=False)
        self.register_buffer("scaler", scaler, persistent=False)
        self.register_buffer("mask", mask, persistent=config.sharing in ("prune", "snip"))  # a resume needs it
        self._scaling = self.psi.register_hook(lambda gradient: gradient * self.scaler)

    def track(self, place: Place) -> None:
        """Let the gradient of ψ leave by pieces. With few entries every layer shares each, and all leave at the end."""
        if place.device.type != "cpu":
            raise UserError("--gradients tracked on a GPU", expected="--device cpu: messages leave from host memory")
        self._scaling.remove()  # autograd gets no gradient of ψ any more
        uses = list(self.index.split(self.counts))
        self.tracked = TrackedVector(self.psi, uses, self.scaler, place)

    def parts(self) -> Sequence[Tensor]:
        """The weights of each layer, flat."""
        if self.tracked is None or not torch.is_grad_enabled():
            return self.weights().split(self.counts)
        factors = (self.factor * self.mask).split(self.counts)
        return [self.tracked.read(number, factor) for number, factor in enumerate(factors)]

    def weights(self) -> Tensor:
        """All weights of the model, flat [n]."""
        return self.factor * self.mask * self.psi[self.index]

    @torch.no_grad()
    def keep_best(self, score: Tensor) -> None:
        """Drop all weights but the `kept` of the highest score [n]."""
        self.mask.zero_()[score.topk(self.kept).indices] = 1

    def forward(self, x: Tensor) -> Tensor:
        for number, (part, shape) in enumerate(zip(self.parts(), self.shapes)):
            x = F.linear(x if number == 0 else F.relu(x), part.view(shape))
        return x


class Digits:
    def __init__(self, config: SharingConfig) -> None:
        self.config = config
        self.train, _, self.test = digits.load()

    def batch(self, step: int, rows: slice) -> tuple[Tensor, Tensor]:
        return self.train.batch(seed=self.config.seed, step=step, rows=rows, batch=self.config.batch)


def build(config: SharingConfig, data: Digits, place: Place) -> SharedMLP:
    if config.sharing not in KINDS:
        raise UserError(f"sharing {config.sharing}", expected=f"one of {', '.join(KINDS)}")
    model = SharedMLP(config)
    if config.sharing == "snip":
        (gradient,) = torch.autograd.grad(loss(model, data.batch(0, slice(None))), model.psi)
        model.keep_best((gradient * model.psi).abs())  # a common factor of gradient and weight cancels
    if place.switches.gradients == "tracked":
        model.track(place)
    return model


def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def prune(model: SharedMLP, data: Digits, step: int) -> None:
    """Drop all but the largest weights, once, when it is time."""
    config = data.config
    if config.sharing == "prune" and step == round(config.prune_at * config.steps):
        model.keep_best(model.weights().abs())


@torch.no_grad()
def evaluate(model: SharedMLP, data: Digits, config: SharingConfig) -> Metrics:
    flat = model.weights()
    stored = model.psi.numel() if config.sharing in ("stable", "roast", "full", "dense") else model.kept
    test = data.test.to(flat.device)
    score = digits.accuracy(model(test.x), test.y) if bool(flat.isfinite().all()) else float("nan")
    return {"accuracy": score, "stored": float(stored), "weights": float(len(flat))}


BASE = SharingConfig(steps=300, batch=128, lr=0.15, optimizer="sgd", clip=0.0, checkpoint_every=100)
WORKLOAD = Workload(
    name="stable-rps",
    title="STABLE-RPS: all weights of a model in one small vector",
    paper="Desai & Shrivastava, ICLR 2024",
    presets={"ci": BASE, "small": BASE.but(steps=600), "gpu": BASE.but(steps=2000)},
    data=lambda config, place: Digits(config),
    model=build,
    loss=loss,
    evaluate=evaluate,
    variants={
        "stable x50": Variant("the method at a fiftieth of the weights"),
        "full": Variant("no sharing", {"sharing": "full", "compression": 1}),
        "stable x1": Variant("as many floats as weights", {"compression": 1}),
        "stable x1, init 1": Variant("the same from another scale", {"compression": 1, "init": 1.0}),
        "roast x1": Variant("chunk-wise hashing, no scaler", {"sharing": "roast", "compression": 1}),
        "roast x50, init 1": Variant("its best scale here", {"sharing": "roast", "init": 1.0}),
        "prune x50": Variant("largest weights after half of the updates, trained on", {"sharing": "prune"}),
        "prune x50, at the end": Variant("largest weights of the trained model", {"sharing": "prune", "prune_at": 1.0}),
        "snip x50": Variant("weights that matter most before training", {"sharing": "snip"}),
        "random x50": Variant("random weights kept, then trained", {"sharing": "random"}),
        "dense x50": Variant("two hidden units, no sharing", {"sharing": "dense", "compression": 1}),
    },
    claims=(
        Claim("continuity: nothing lost at m = n", "accuracy", "stable x1", "full", -0.02),
        Claim("stability: ψ's scale does not matter", "accuracy", "stable x1, init 1", "stable x1", -0.02),
        Claim("beats pruning at 50×", "accuracy", "stable x50", "prune x50", 0.1),
        Claim("beats SNIP at 50×", "accuracy", "stable x50", "snip x50", 0.1),
        Claim("beats a narrow network at 50×", "accuracy", "stable x50", "dense x50", 0.1),
        Claim("beats ROAST at 50×", "accuracy", "stable x50", "roast x50, init 1", 0.0, expected=False),
    ),
    exercises=frozenset({"checkpoint", "gradients"}),
    equal="updates",
    needs=("scikit-learn",),
    after=prune,
)
