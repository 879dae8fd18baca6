"""Continuous chain of thought on graph reachability: a thought that is a set of nodes, not one of them.

After "Reasoning by superposition" (Zhu et al. 2025) and Coconut (Hao et al. 2024): the last hidden state is fed back as
the next input without passing through a token, so that it can hold all nodes of a search front at once. The paper
gives a two-layer construction that solves every depth; `Constructed` is that construction (orthonormal node embeddings;
an attention whose keys are the edges' sources and whose values are their targets; a threshold and a norm as the MLP),
exact for every depth at any size. `Thinker` is the trained one, with Coconut's curriculum: in stage k it learns, after
k − 1 thoughts, to name any node k steps away, at last the answer after D. Its stage is state that a resume must bring
back. It is for a GPU: on two CPU minutes it does not learn. Like the paper's it sees a fixed set of graphs many times,
with nodes renamed and edges shuffled anew each time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dist.errors import UserError
from ..lm import ByteLM, LMConfig
from .contract import Claim, Config, Metrics, Place, Variant, Workload
from .reachability import Problems, a_shortest_path, problems, renamed

SHARPNESS = 150.0  # of the construction's softmax; a member of a set of 32 scores 26 above a stranger


@dataclass(frozen=True)
class ThoughtsConfig(Config):
    """`how`: constructed, path (the construction following one sampled edge), trained or discrete (tokens)."""

    how: str = "constructed"
    nodes: int = 32
    edges: int = 60
    depth: int = 8
    graphs: int = 100  # evaluated for each depth
    width: int = 64
    heads: int = 8
    pool: int = 0  # graphs to train on, used again and again; 0: fresh ones for every batch
    stage_updates: int = 1000
    earlier: float = 0.1  # share of batches of an earlier stage


class Constructed(nn.Module):
    """The construction; `step` is one pass of its second layer over the edge tokens. No parameter trains."""

    embedding: Tensor

    def __init__(self, nodes: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(nodes, nodes, generator=generator, dtype=torch.float64)).Q.float()
        self.register_buffer("embedding", basis)
        self.unused = nn.Parameter(torch.zeros(1))

    def step(self, thought: Tensor, edges: Tensor) -> Tensor:
        """Thoughts [B, d] to those after one more edge."""
        source, target = self.embedding[edges[..., 0]], self.embedding[edges[..., 1]]  # [B, E, d]
        scores = SHARPNESS * (source @ thought[:, :, None])[..., 0]
        moved = thought + (scores.softmax(-1)[:, :, None] * target).sum(1)
        members = (moved @ self.embedding.T) > 0.5 / edges.shape[1]  # an edge of E gives at least 1 / E
        return F.normalize(members.float() @ self.embedding, dim=-1)

    def answer(self, problem: Problems, depth: int) -> np.ndarray:
        """Whether the better of the two candidates is the right one [B]."""
        device = self.embedding.device
        edges = torch.from_numpy(problem.edges).to(device)
        thought = self.embedding[torch.from_numpy(problem.root).to(device)]
        for _ in range(depth):
            thought = self.step(thought, edges)
        candidates = [torch.from_numpy(c).to(device) for c in (problem.target, problem.decoy)]
        score = [(thought * self.embedding[c]).sum(-1) for c in candidates]
        return (score[0] > score[1]).cpu().numpy()


def sampled_path(problem: Problems, depth: int, generator: np.random.Generator) -> np.ndarray:
    """Follow one edge at random `depth` times; right when that ends at the target, else right by a coin's toss."""
    at = problem.root.copy()
    for _ in range(depth):
        leaving = problem.edges[:, :, 0] == at[:, None]
        chosen = np.where(leaving, generator.random(leaving.shape), -1).argmax(1)
        at = np.where(leaving.any(1), problem.edges[np.arange(len(at)), chosen, 1], at)
    return (at == problem.target) | (generator.random(len(at)) < 0.5)


Past = list[tuple[Tensor, Tensor]]  # of each layer, keys and values [B, H, T, D]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal, of the last rows of k. Written out: torch's fused backward on CUDA does not repeat its bits."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + k.shape[2] - q.shape[2])
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


class Thinker(nn.Module):
    """A two-layer decoder over [s t |]…, [Q] c1 c2 [R] root, thoughts or path tokens, [A]."""

    def __init__(self, config: ThoughtsConfig) -> None:
        super().__init__()
        self.reply, self.discrete = config.nodes + 3, config.how == "discrete"  # before it: bar, ask, begin
        sizes = LMConfig(2, config.width, config.heads, config.heads, 4 * config.width, config.nodes + 4, False)
        self.lm = ByteLM(sizes)

    def hidden(self, x_BTC: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """The normed last hidden states of `x_BTC`, which follows what `past` holds; and the past for what follows.

        With a past, one token at a time: it sees everything before it.
        """
        assert past is None or x_BTC.shape[1] == 1
        start = past[0][0].shape[2] if past else 0
        positions = torch.arange(start, start + x_BTC.shape[1], device=x_BTC.device)[None]
        grown: Past = []

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if past is not None:
                before = past[len(grown)]
                k, v = torch.cat((before[0], k), 2), torch.cat((before[1], v), 2)
            grown.append((k, v))
            return attention(q, k, v)

        for block in self.lm.blocks:
            x_BTC = block(x_BTC, positions, attend)
        return self.lm.norm(x_BTC), grown

    def think(self, prompt_BT: Tensor, thoughts: int) -> tuple[Tensor, Past]:
        """The last hidden state [B, 1, C] after the prompt and `thoughts` thoughts, each the hidden state before it."""
        h_BTC, past = self.hidden(self.lm.embedding(prompt_BT))
        h_B1C = h_BTC[:, -1:]
        for _ in range(thoughts):
            h_B1C, past = self.hidden(h_B1C, past)
        return h_B1C, past

    def say(self, prompt_BT: Tensor, tokens: int) -> Past:
        """The past after the prompt and `tokens` tokens, each the likeliest."""
        h_BTC, past = self.hidden(self.lm.embedding(prompt_BT))
        for _ in range(tokens):
            token_B1 = self.lm.head(h_BTC[:, -1:]).argmax(-1)
            h_BTC, past = self.hidden(self.lm.embedding(token_B1), past)
        return past

    def answer(self, past: Past) -> Tensor:
        """Logits [B, V] after the token that asks for the answer."""
        token_B1 = torch.full((past[0][0].shape[0], 1), self.reply, device=past[0][0].device)
        return self.lm.head(self.hidden(self.lm.embedding(token_B1), past)[0][:, -1])


@dataclass
class Batch:
    """Tokens of the prompt [B, T], then what is asked: after `thoughts` thoughts, or after the path's tokens."""

    prompt: Tensor
    path: Tensor
    label: Tensor
    thoughts: int
    final: bool


class Reachability:
    """Problems on request; the curriculum's stage is its state."""

    def __init__(self, config: ThoughtsConfig, place: Place) -> None:
        self.config, self.device, self.stage = config, place.device, 1
        self.pool = self.problems(10**9, config.pool, config.depth) if config.pool else None

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.stage}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stage = state["stage"]

    def problems(self, step: int, count: int, depth: int) -> Problems:
        c = self.config
        return problems(seed=c.seed, step=step, count=count, nodes=c.nodes, edges=c.edges, depth=depth)

    def training(self, step: int, generator: np.random.Generator) -> Problems:
        """A batch to train on: fresh problems, or some of the pool under other names and in another order."""
        config = self.config
        if self.pool is None:
            return self.problems(step, config.batch, config.depth)
        return renamed(self.pool.rows(generator.integers(0, config.pool, config.batch)), generator)

    def prompt(self, problem: Problems, generator: np.random.Generator) -> Tensor:
        config, count = self.config, len(problem.root)
        bar, ask, begin = (np.full((count, 1), config.nodes + i) for i in range(3))
        listed = np.concatenate([problem.edges, np.broadcast_to(bar[:, None], (count, config.edges, 1))], 2)
        swap = generator.random(count) < 0.5
        first = np.where(swap, problem.decoy, problem.target)[:, None]
        second = np.where(swap, problem.target, problem.decoy)[:, None]
        parts = [listed.reshape(count, -1), ask, first, second, begin, problem.root[:, None]]
        return torch.from_numpy(np.concatenate(parts, 1)).to(self.device)

    def batch(self, step: int, rows: slice) -> Batch:
        config = self.config
        generator = np.random.Generator(np.random.Philox(key=[config.seed + 1, step]))
        stage = self.stage
        if stage > 1 and generator.random() < config.earlier:
            stage = int(generator.integers(1, stage))
        final = stage > config.depth or config.how == "discrete"
        whole = self.training(step, generator)
        prompt, path = self.prompt(whole, generator), a_shortest_path(whole, config.depth, generator)
        front = np.where(whole.distance == stage, generator.random(whole.distance.shape), -1).argmax(1)
        label = torch.from_numpy(whole.target if final else front)
        path_tokens = torch.from_numpy(path)
        thoughts = config.depth if final else stage - 1
        parts = [part[rows].to(self.device) for part in (prompt, path_tokens, label)]
        return Batch(*parts, thoughts=thoughts, final=final)


def build(config: ThoughtsConfig, data: Reachability, place: Place) -> nn.Module:
    if config.how not in ("constructed", "path", "trained", "discrete"):
        raise UserError(f"how {config.how}", expected="constructed, path, trained or discrete")
    return Thinker(config) if config.how in ("trained", "discrete") else Constructed(config.nodes, config.seed)


def loss(model: Thinker, batch: Batch) -> Tensor:
    """CE of the continuation alone: a node of the front, or the answer; for the discrete one also the path."""
    if model.discrete:
        reply = torch.full_like(batch.path[:, :1], model.reply)
        tokens = torch.cat((batch.prompt, batch.path, reply), 1)
        labels = torch.cat((batch.path, reply, batch.label[:, None]), 1)
        logits = model.lm.head(model.hidden(model.lm.embedding(tokens))[0][:, -labels.shape[1] :])
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    h_B1C, past = model.think(batch.prompt, batch.thoughts)
    return F.cross_entropy(model.answer(past) if batch.final else model.lm.head(h_B1C[:, 0]), batch.label)


def move_on(model: nn.Module, data: Reachability, step: int) -> None:
    """The curriculum's next stage, when it is time."""
    data.stage = min(1 + step // data.config.stage_updates, data.config.depth + 1)


@torch.no_grad()
def answers(model: nn.Module, data: Reachability, problem: Problems, depth: int) -> np.ndarray:
    """Whether each problem is answered rightly [B]."""
    generator = np.random.Generator(np.random.Philox(key=[data.config.seed + 2, depth]))
    if isinstance(model, Constructed):
        if data.config.how == "path":
            return sampled_path(problem, depth, generator)
        return model.answer(problem, depth)
    assert isinstance(model, Thinker)
    prompt = data.prompt(problem, generator)
    logits = model.answer(model.say(prompt, depth) if model.discrete else model.think(prompt, depth)[1])
    right, wrong = (torch.from_numpy(c).to(logits.device)[:, None] for c in (problem.target, problem.decoy))
    return (logits.gather(1, right) > logits.gather(1, wrong))[:, 0].cpu().numpy()


def evaluate(model: nn.Module, data: Reachability, config: ThoughtsConfig) -> Metrics:
    """Two-way accuracy; of what is constructed for each depth up to `depth`, of what is trained at its own."""
    depths = range(1, config.depth + 1) if isinstance(model, Constructed) else [config.depth]
    found = [
        float(answers(model.eval(), data, data.problems(10**6 + depth, config.graphs, depth), depth).mean())
        for depth in depths
    ]
    return {"mean": fmean(found), "worst": min(found), "deepest": found[-1]}


CONSTRUCTED = ThoughtsConfig(steps=0, checkpoint_every=0)
TRAINED = {"how": "trained", "steps": 10_000, "depth": 4, "nodes": 24, "edges": 40, "width": 512, "lr": 3e-4}
TRAINED |= {"warmup": 500, "pool": 16_384}
WORKLOAD = Workload(
    name="thoughts",
    title="Continuous chain of thought: a thought holds a whole search front",
    paper="Zhu et al. 2025 (arXiv 2505.12514)",
    presets={
        "ci": CONSTRUCTED,
        "small": replace(CONSTRUCTED, graphs=300),
        "gpu": replace(CONSTRUCTED, graphs=500, batch=128, stage_updates=1500, checkpoint_every=1000),
    },
    data=Reachability,
    model=build,
    loss=loss,
    evaluate=evaluate,
    variants={
        "trained": Variant("continuous thoughts, trained by curriculum", TRAINED, presets=("gpu",)),
        "constructed": Variant("the paper's two-layer solution, not trained"),
        "one path": Variant("the same graphs, one sampled edge a step", {"how": "path"}),
        "discrete": Variant("path tokens, trained", {**TRAINED, "how": "discrete"}, presets=("gpu",)),
    },
    claims=(
        Claim("two layers and D thoughts solve every depth", "worst", "constructed", None, 1.0),
        Claim("one path is no substitute", "worst", "one path", "constructed", -0.3, "<="),
        Claim("trained thoughts beat tokens", "deepest", "trained", "discrete", presets=("gpu",), expected=False),
    ),
    exercises=frozenset({"checkpoint"}),
    equal="updates and graphs",
    state=lambda data, model: {"curriculum": data},
    after=move_on,
)
