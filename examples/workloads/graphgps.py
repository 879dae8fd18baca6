"""GraphGPS: local message passing and global attention side by side, on graphs whose nodes may be spread over ranks.

After "Recipe for a general, powerful, scalable graph transformer" (Rampášek et al., NeurIPS 2022): in each layer both
read the same input, h_loc = norm(h + MPNN(h)), h_att = norm(h + MHA(h)), and h = norm(s + FF(s)) of their sum s. The
message passing is gated as in GatedGCN, without edge features. LayerNorm takes BatchNorm's place, whose statistics
would depend on how the nodes are spread.

With `--halo` or `--context-parallel` every rank owns a run of nodes. Sources of edges from elsewhere come by `halo`;
the attention is TokenRing's, not causal, with `--context-parallel`, and otherwise gathers all keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...dist.errors import UserError
from ...parallel import token_ring_attention
from .contract import Claim, Config, Metrics, Place, Variant, Workload
from .graphs import IGNORED, Debian, Ring
from .halo import Ghosts, Gloo, HaloPlan, Mpi, bounds, plan


@dataclass(frozen=True)
class GraphConfig(Config):
    """`graph`: ring or debian (full-batch; `nodes` is then how many packages). `attention` False: message passing."""

    graph: str = "ring"
    nodes: int = 20
    classes: int = 5
    width: int = 32
    heads: int = 4
    layers: int = 3
    attention: bool = True


class Graphs:
    """This rank's part of the data: all nodes of its rows, or its nodes of all rows."""

    def __init__(self, config: GraphConfig, place: Place) -> None:
        if config.graph not in ("ring", "debian"):
            raise UserError(f"graph {config.graph}", expected="ring or debian")
        self.config, self.place = config, place
        self.source = (
            Debian(config.nodes) if config.graph == "debian" else Ring(config.nodes, config.classes, config.seed)
        )
        self.graph = self.source.graph
        self.spread = place.switches.halo != "off" or place.switches.context > 1
        ranks, rank = (place.here.world_size, place.here.rank) if self.spread else (1, 0)
        self.ranks, self.plan = ranks, plan(self.graph.edges, self.graph.nodes, rank, ranks)

    def mine(self, x: Tensor, labels: Tensor) -> dict[str, Any]:
        """Own nodes; `count` scales a sum over them so that the mean over ranks is the mean over all labels."""
        count = (labels != IGNORED).sum().clamp_min(1) / self.ranks
        own = slice(self.plan.start, self.plan.stop)
        return {"x": x[:, own], "labels": labels[:, own], "count": count}

    def batch(self, step: int, rows: slice) -> dict[str, Any]:
        x, labels = self.source.batch(step, self.config.batch)
        return self.mine(x[rows], labels[rows]) if len(x) > 1 else self.mine(x, labels)


class Gather(torch.autograd.Function):
    """Own rows [B, H, n, D] to those of all ranks along dimension 2; backward adds up what all ranks send back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cuts: list[int], rank: int) -> Tensor:
        ctx.own = slice(cuts[rank], cuts[rank + 1])
        most = max(b - a for a, b in zip(cuts, cuts[1:]))
        padded = F.pad(x, (0, 0, 0, most - x.shape[2])).contiguous()
        parts = [torch.empty_like(padded) for _ in cuts[1:]]
        dist.all_gather(parts, padded)
        return torch.cat([part[:, :, : b - a] for part, a, b in zip(parts, cuts, cuts[1:])], 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total[:, :, ctx.own].contiguous(), None, None


class Neighbours:
    """Where a layer gets rows of other nodes from. Alone on a rank, everything is here."""

    def __init__(self, data: Graphs, place: Place) -> None:
        self.plan: HaloPlan = data.plan
        self.place, self.ranks = place, data.ranks
        self.cuts = bounds(data.graph.nodes, data.ranks)
        self.way = Mpi() if place.switches.halo == "mpi" else Gloo()
        if place.switches.halo != "off" and place.device.type != "cpu":
            raise UserError(
                f"--halo {place.switches.halo} on a GPU", expected="--device cpu: rows leave from host memory"
            )
        self.source, self.target = torch.from_numpy(data.plan.edges).to(place.device)

    def with_ghosts(self, x: Tensor) -> Tensor:
        """[B, n, F] to [B, n + ghosts, F]."""
        if self.ranks == 1:
            return x
        batch, nodes, width = x.shape
        flat = x.transpose(0, 1).reshape(nodes, batch * width)
        ghosts = Ghosts.apply(flat, self.plan, self.way, self.place)
        assert isinstance(ghosts, Tensor)
        return torch.cat((x, ghosts.view(-1, batch, width).transpose(0, 1)), 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of own nodes over all, [B, H, n, D]."""
        if self.place.switches.context > 1:
            hops = self.ranks - 1  # a forward pass sends its queries on, and results home, once for each other rank
            self.place.count("ring", calls=1, hops=2 * hops, bytes=2 * hops * q.numel() * q.element_size())
            parts = (part.transpose(1, 2) for part in (q, k, v))
            lengths = (self.cuts[-1], self.cuts[-1])
            return token_ring_attention(
                *parts, causal=False, layout="contiguous", lengths=lengths, schedule="token_ring"
            ).transpose(1, 2)
        if self.ranks > 1:
            both = Gather.apply(torch.cat((k, v), -1), self.cuts, self.place.here.rank)
            assert isinstance(both, Tensor)
            k, v = both.chunk(2, -1)
        return F.scaled_dot_product_attention(q, k, v)


class GPSLayer(nn.Module):
    def __init__(self, config: GraphConfig, neighbours: Neighbours) -> None:
        super().__init__()
        width = config.width
        self.heads, self.neighbours, self.attention = config.heads, neighbours, config.attention
        self.gate_target, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.gate_source = nn.Linear(width, width, bias=False)
        self.local_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        if config.attention:
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.global_norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def messages(self, h: Tensor) -> Tensor:
        """Σ σ(gate) · value over incoming edges, divided by Σ σ(gate)."""
        source, target = self.neighbours.source, self.neighbours.target
        seen = self.neighbours.with_ghosts(torch.cat((self.gate_source(h), self.value(h)), -1))
        gate_source, value = seen[:, source].chunk(2, -1)
        gate = torch.sigmoid(self.gate_target(h)[:, target] + gate_source)
        total = torch.zeros_like(h).index_add(1, target, gate * value)
        return F.relu(total / torch.zeros_like(h).index_add(1, target, gate).add(1e-6))

    def forward(self, h: Tensor) -> Tensor:
        both = self.local_norm(h + self.messages(h))
        if self.attention:
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(h).chunk(3, -1))
            mixed = self.neighbours.attend(q, k, v).transpose(1, 2).flatten(2)
            both = both + self.global_norm(h + self.out(mixed))
        return self.norm(both + self.down(F.relu(self.up(both))))


class GPS(nn.Module):
    """Features [B, n, F] to logits [B, n, classes] of this rank's nodes."""

    def __init__(self, config: GraphConfig, data: Graphs, place: Place) -> None:
        super().__init__()
        neighbours = Neighbours(data, place)
        self.encode = nn.Linear(data.graph.features, config.width)
        self.layers = nn.ModuleList(GPSLayer(config, neighbours) for _ in range(config.layers))
        self.head = nn.Linear(config.width, data.graph.classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encode(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


def loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    logits = model(batch["x"]).flatten(0, 1)
    total = F.cross_entropy(logits, batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum")
    return total / batch["count"]


@torch.no_grad()
def evaluate(model: GPS, data: Graphs, config: GraphConfig) -> Metrics:
    batch = data.mine(*data.source.test())
    labels = batch["labels"].to(data.place.device)
    right = (model(batch["x"].to(data.place.device)).argmax(-1) == labels) & (labels != IGNORED)
    found = torch.stack([right.sum(), (labels != IGNORED).sum()]).double()
    if data.spread:
        dist.all_reduce(found)
    return {"accuracy": (found[0] / found[1]).item(), "nodes": float(data.graph.nodes)}


BASE = GraphConfig(steps=160, batch=32, lr=3e-3, checkpoint_every=40)
WORKLOAD = Workload(
    name="graphgps",
    title="GraphGPS: message passing and global attention, nodes spread over ranks",
    paper="Rampášek et al., NeurIPS 2022 (arXiv 2205.12454)",
    presets={
        "ci": BASE,
        "small": replace(BASE, steps=500, nodes=40),
        "gpu": replace(BASE, steps=3000, nodes=200, width=128, heads=8, batch=64),
    },
    data=Graphs,
    model=GPS,
    loss=loss,
    evaluate=evaluate,
    variants={
        "gps": Variant("the method: both"),
        "message passing": Variant("no attention", {"attention": False}),
        "message passing, 6 layers": Variant(
            "no attention, twice the layers: about as much work", {"attention": False, "layers": 6}, ("small", "gpu")
        ),
    },
    claims=(
        Claim("attention carries a class across the ring", "accuracy", "gps", None, 0.9),
        Claim("message passing of three layers cannot", "accuracy", "message passing", None, 0.35, "<="),
        Claim("both together beat message passing", "accuracy", "gps", "message passing", 0.4),
        Claim(
            "also at equal work",
            "accuracy",
            "gps",
            "message passing, 6 layers",
            0.4,
            presets=("small", "gpu"),
        ),
    ),
    exercises=frozenset({"checkpoint", "ring", "halo"}),
    equal="updates and layers",
)
