"""Mixture-of-Recursions: one shared block applied up to R times, and a router that chooses how often for each token.

After Bae et al. 2025 (arXiv 2507.10524), middle-cycle with expert choice: first layer, R recursions of a shared block,
last layer. Recursion r takes the top k_r of the tokens that are still alive (fractions 1, 2/3, 1/3), in their order and
with their own positions, and adds gate · (block(x) − x) to them. Choosing the top k of a sequence looks at its future,
so an auxiliary head on detached states learns who is chosen; evaluation asks that head alone, a threshold, and is
causal. The table reports that loss (`bits`), beside the one with top-k, which is no language model's (`leaky_bits`).

Two forms of a recursion give the same numbers: gathered (k tokens, less work) and masked (all T tokens, where the keys
of those not chosen are pushed to −∞ through eight further channels of the heads). Streaming needs rows in place and a
length that stays, so it runs the masked one.

The gate is part of what a recursion computes, whoever chose its tokens: the variants that draw lots, or take every
token, have it too, and begin with the same weights. So the table tells the choice from the gate; `ungated` is the
plain recursion without one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dist.errors import UserError
from ...parallel.stream.protocol import Attend, causal_attention, plain_loss
from .. import corpus
from ..lm import Block, LMConfig
from .contract import Claim, Config, Metrics, Place, Variant, Workload

FAR = -1e4  # what the score of a key that is not chosen gains
PAD = 8  # channels that carry it; kernels want a multiple of eight


@dataclass(frozen=True)
class MoRConfig(Config):
    """`router`: learned, random, or none (every token takes every recursion). `gated`: a recursion's change is scaled
    by a sigmoid of each token's score; the learned router chooses by the same score."""

    router: str = "learned"
    gated: bool = True
    recursions: int = 3
    width: int = 48
    heads: int = 4
    length: int = 64
    gate: float = 1.0
    eval_bytes: int = 8192

    def tokens(self, recursion: int) -> int:
        """How many tokens of a row recursion `recursion` computes."""
        if self.router == "none":
            return self.length
        return max(1, round(self.length * (1 - recursion / self.recursions)))

    def work(self) -> float:
        """Token-layers of one row: what a step costs, up to the embedding and head."""
        return 2 * self.length + sum(self.tokens(r) for r in range(self.recursions))


def among(chosen: Tensor | None, attend: Attend = causal_attention) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`attend` to the keys of the tokens that are `chosen` [B, T] alone (None: all)."""

    def among_the_chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if chosen is None:
            return attend(q, k, v)
        scale = q.shape[-1] ** -0.5
        one = torch.zeros(PAD, dtype=q.dtype, device=q.device)
        one[0] = 1 / scale
        far = (chosen.to(k.dtype) - 1)[:, None, :, None] * -FAR * (one != 0)
        q = torch.cat((q, one.expand(*q.shape[:-1], PAD)), -1)
        k = torch.cat((k, far.expand(*k.shape[:-1], PAD)), -1)
        return attend(q, k, v, scale=scale)

    return among_the_chosen


class Recursion(nn.Module):
    """One pass of the shared block. Called with `chosen` (0 or 1 for each token) it is masked, without it plain."""

    def __init__(self, block: Block, width: int, gate: float, gated: bool) -> None:
        super().__init__()
        self.block: nn.Module = block
        self.gate = gate
        self.router = nn.Linear(width, 1) if gated else None

    def weighed(self, x: Tensor, change: Tensor) -> Tensor:
        """`change` [.., C] of rows `x`, scaled by their gates."""
        return change if self.router is None else change * (self.gate * torch.sigmoid(self.router(x)))

    def forward(
        self, x: Tensor, positions: Tensor, chosen: Tensor | None = None, attend: Attend = causal_attention
    ) -> Tensor:
        change = self.weighed(x, self.block(x, positions, among(chosen, attend)) - x)
        return x + change if chosen is None else x + change * chosen.to(x.dtype)[..., None]


# A run of spaces, say, begins with tokens that are alike in all they see. Their scores are equal, and rounding, which
# differs in chunks or on other ranks, would choose among them: so the earlier is preferred, by a little more than that.
TIE = 1e-6


class MoR(nn.Module):
    """Follows `parallel.stream.protocol`: its layers are first, the recursions (which share a block), last."""

    def __init__(self, config: MoRConfig, masked: bool) -> None:
        super().__init__()
        sizes = LMConfig(2, config.width, config.heads, config.heads, 2 * config.width)
        self.mor, self.config, self.masked = config, sizes, masked
        self.embedding = nn.Embedding(sizes.vocab, config.width)
        shared = Block(sizes)
        recursions = [Recursion(shared, config.width, config.gate, config.gated) for _ in range(config.recursions)]
        self.stream_layers = nn.ModuleList([Block(sizes), *recursions, Block(sizes)])
        self.foretell = nn.ModuleList(nn.Linear(config.width, 1) for _ in range(config.recursions))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.head = nn.Linear(config.width, sizes.vocab, bias=False)
        self.head.weight = self.embedding.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02 if parameter.shape[0] == sizes.vocab else config.width**-0.5 / 2)

    def token_logits(self, x_NC: Tensor) -> Tensor:
        return self.head(self.norm(x_NC))

    def loss(self, x_BTC: Tensor, labels_BT: Tensor, num_items: Tensor | int | None = None) -> Tensor:
        return plain_loss(self.token_logits(x_BTC), labels_BT, num_items)

    def choose(
        self, score: Callable[[nn.Module], Tensor], alive: Tensor, recursion: int, lots: Tensor, causal: bool
    ) -> Tensor:
        """Who takes this recursion, [B, T] of 0 and 1, within `alive`.

        `score(head)`: what a head of one output says of each token [B, T]. `lots` [R, B, T] decide for a random router.
        """
        count, learned = self.mor.tokens(recursion), self.mor.router == "learned"
        if count >= alive.shape[1] or self.mor.router == "none":
            return alive
        if causal and learned:
            return alive * (score(self.foretell[recursion]) > 0)
        if causal:  # a random lot needs no look at the others
            return alive * (lots[recursion] < count / self.mor.tokens(recursion - 1))
        layer = self.stream_layers[1 + recursion]
        assert isinstance(layer, Recursion)
        if learned:
            assert layer.router is not None
            wanted = score(layer.router)
            wanted = wanted - TIE * torch.arange(wanted.shape[1], device=wanted.device)
        else:
            wanted = -lots[recursion]
        best = wanted.masked_fill(alive == 0, -torch.inf).topk(count, dim=1).indices
        return torch.zeros_like(alive).scatter_(1, best, 1)

    def recur(self, layer: nn.Module, x: Tensor, positions: Tensor, chosen: Tensor, count: int) -> Tensor:
        """The gathered form: `count` chosen tokens of each row, in order."""
        index = chosen.topk(count, dim=1).indices.sort(1).values
        places = positions.expand_as(chosen).gather(1, index)
        rows = (index + torch.arange(len(x), device=x.device)[:, None] * x.shape[1]).flatten()  # whole rows of C:
        flat = x.flatten(0, 1)  # taken element by element, CUDA's repeatable way would sort B·k·C indices
        taken = layer(flat.index_select(0, rows).unflatten(0, index.shape), places)
        return flat.index_copy(0, rows, taken.flatten(0, 1)).view_as(x)

    def forward(
        self, tokens: Tensor, labels: Tensor | None = None, lots: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Logits, or the loss with the auxiliary head's. `causal`: routed by the threshold."""
        first, *middle, last = self.stream_layers
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        x = first(self.embedding(tokens), positions)
        alive = torch.ones_like(tokens, dtype=x.dtype)
        told = x.new_zeros(())
        lots = torch.zeros(len(middle), *tokens.shape, device=x.device) if lots is None else lots
        for recursion, layer in enumerate(middle):

            def score(head: nn.Module, x: Tensor = x) -> Tensor:
                return head(x.detach())[..., 0]

            chosen = self.choose(score, alive, recursion, lots, causal)
            if self.mor.router == "learned" and self.mor.tokens(recursion) < tokens.shape[1]:
                logits = self.foretell[recursion](x.detach())[..., 0]
                told = told + F.binary_cross_entropy_with_logits(logits, chosen, weight=alive)
            if self.masked or causal:
                x = layer(x, positions, chosen)
            else:
                x = self.recur(layer, x, positions, chosen, self.mor.tokens(recursion))
            alive = chosen
        x = last(x, positions)
        return self.token_logits(x) if labels is None else self.loss(x, labels) + 0.1 * told


@cache
def text() -> corpus.Corpus:
    return corpus.load()


class Text:
    """Windows of the standard library's source, and the lots of the random router."""

    def __init__(self, config: MoRConfig, place: Place) -> None:
        self.config, self.corpus = config, text()

    def batch(self, step: int, rows: slice) -> tuple[Tensor, Tensor]:
        c = self.config
        window = self.corpus.batch(seed=c.seed, step=step, rows=rows, batch=c.batch, length=c.length)
        return window, self.lots(step, c.batch)[:, rows]

    def lots(self, step: int, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        return torch.rand(self.config.recursions, batch, self.config.length, generator=generator)


def build(config: MoRConfig, data: Text, place: Place) -> MoR:
    if config.router not in ("learned", "random", "none"):
        raise UserError(f"router {config.router}", expected="learned, random or none")
    if config.router == "learned" and not config.gated:
        raise UserError("a learned router without a gate", expected="gated=true: the choice learns through it")
    if place.tensor is None:
        return MoR(config, masked=place.switches.stream)
    from .mor_parallel import ParallelMoR

    return ParallelMoR(config, place.tensor)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    window, lots = batch
    return model(window[:, :-1], window[:, 1:], lots)


@torch.no_grad()
def evaluate(model: MoR, data: Text, config: MoRConfig) -> Metrics:
    """Bits per held-out byte, routed causally and (leaky) by the top k, and the share of work that routing left."""
    totals: dict[bool, float] = {}
    device = model.embedding.weight.device
    batches = data.corpus.evaluation(batch=32, length=config.length, limit_bytes=config.eval_bytes)
    for causal in (True, False):
        summed, count = 0.0, 0
        for number, window in enumerate(batches):
            window, lots = window.to(device), data.lots(10**7 + number, len(window)).to(device)
            logits = model(window[:, :-1], lots=lots, causal=causal)
            summed += F.cross_entropy(logits.flatten(0, 1).double(), window[:, 1:].flatten(), reduction="sum").item()
            count += window[:, 1:].numel()
        totals[causal] = summed / count / math.log(2)
    plain = replace(config, router="none").work()
    return {"bits": totals[True], "leaky_bits": totals[False], "work": config.work() / plain}


CLAIM = "lower loss than recursion at equal work"
BASE = MoRConfig(steps=100, batch=8, lr=4e-3, weight_decay=0.01, warmup=20, checkpoint_every=50)
WORKLOAD = Workload(
    name="mor",
    title="Mixture-of-Recursions: a byte-level model that chooses how deep each byte goes",
    paper="Bae et al. 2025 (arXiv 2507.10524)",
    presets={
        "ci": BASE,
        "small": replace(BASE, steps=300, width=64, eval_bytes=32_768, checkpoint_every=100),
        "gpu": replace(BASE, steps=4000, width=512, heads=8, length=512, batch=32, lr=1e-3).but(
            warmup=200, eval_bytes=2**20, checkpoint_every=1000
        ),
    },
    data=Text,
    model=build,
    loss=loss,
    evaluate=evaluate,
    variants={
        "learned router": Variant("the method: who recurs is learned"),
        "random router": Variant("as many bytes recur, drawn by lot; gated alike", {"router": "random"}),
        "recursion": Variant("every byte takes all recursions; gated alike", {"router": "none"}, steps=0.8),
        "ungated": Variant(
            "every byte takes all recursions, no gate", {"router": "none", "gated": False}, ("small", "gpu"), steps=0.8
        ),
    },
    claims=(
        Claim(CLAIM, "bits", "learned router", "recursion", 0.0, "<=", presets=("ci", "small")),
        Claim(CLAIM, "bits", "learned router", "recursion", 0.0, "<=", presets=("gpu",), expected=False),
        Claim(
            "the router matters: better than by lot",
            "bits",
            "learned router",
            "random router",
            -0.01,
            "<=",
            expected=False,
        ),
    ),
    exercises=frozenset({"checkpoint", "stream", "overlap"}),
    equal="work (token-layers)",
)
