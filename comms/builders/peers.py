"""What other projects send when, written by the same builder: to compare schedules, with the same kernels on one model.

None of this is a project's code, and no time of it is a measurement of one. Sources: Liu et al. 2023 (ring), Zhu's
ring-flash-attention (zigzag), torch's `context_parallel` (its default gathers), Jacobs et al. 2023 (Ulysses), Fang et
al. 2024 (USP), TokenRing's repository (forward; the backward is the ring that xDiT's class inherits), FCP (each pair's
rows, point to point), MagiAttention's group cast (all needed rows under way at once). All merge between blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...dist.errors import UserError
from ..schedule import Schedule
from .attention import attention
from .attention_named import best_routes, even_needs, moves_of
from .attention_shape import Heads, Shape
from .routes import Route, direct, ring


@dataclass(frozen=True)
class Peer:
    """A way of the field as (forward schedule, backward schedule). `whole`: it sends whole shards, needed or not;
    `at_once`: it keeps everything that arrives, and holds nothing back for want of a buffer."""

    names: tuple[str, str]
    layout: str = "zigzag"
    whole: bool = False
    at_once: bool = False
    about: str = ""


PEERS = {
    "ring (Liu et al.)": Peer(("ring_kv", "ring_kv"), "contiguous", whole=True, about="one run of tokens per rank"),
    "zigzag ring (ring-flash-attention)": Peer(("ring_kv", "ring_kv"), whole=True, about="whole shards round a ring"),
    "all-gather (torch CP)": Peer(("all_gather_kv", "all_gather_kv"), about="all keys and values to all at once"),
    "Ulysses": Peer(("ulysses", "ulysses"), about="all-to-all of heads"),
    "USP": Peer(("ulysses_ring", "ulysses_ring"), whole=True, about="heads within teams, a ring of teams"),
    "TokenRing as published": Peer(("token_ring", "ring_kv"), whole=True, about="queries forward, keys backward"),
    "need-only (FCP-like)": Peer(("need_only_kv", "need_only_kv"), about="needed rows, straight, two at a time"),
    "group cast (MagiAttention-like)": Peer(
        ("need_only_kv", "need_only_kv"), at_once=True, about="needed rows, straight, all at once"
    ),
}
NAMES = dict(zip(("ring", "zigzag_ring", "torch_cp", "ulysses", "usp", "token_ring", "fcp", "magi"), PEERS))


def peer_schedule(
    peer: Peer, shape: Shape, *, causal: bool, backward: bool, goals: bool = True, title: str = ""
) -> Schedule:
    """What the peer would run on these needs; called `title`, or as the schedule of ours that it is most like."""
    name = peer.names[backward]
    moves, size = moves_of(name), len(shape.q_rows) // shape.inner
    routes: list[Route]
    if peer.whole:
        routes = [ring(size, narrow=moves == "q")]  # TokenRing narrows its queries as it goes
    elif peer.at_once:
        routes = [direct(size, buffers=0)]
    else:
        routes, _ = best_routes(name, shape, causal=causal, backward=backward)
    return attention(title or name, shape, routes, moves=moves, backward=backward, goals=goals, beside=False)


def even_peer(way: str, world: int, rows: int, heads: Heads, *, backward: bool = False) -> Schedule:
    """The way called `way` under a causal mask over `world` equal shards of `rows` (even)."""
    if way not in PEERS:
        raise UserError(f"no way of the field is called '{way}'", expected=f"one of {', '.join(PEERS)}")
    peer = PEERS[way]
    inner = exchanging(peer.names[backward], world, heads)
    needs = even_needs(world // inner, rows * inner, causal=True, layout=peer.layout)
    shape = Shape((rows,) * world, (rows,) * world, heads, needs, inner)
    title = next(f"peer_{short}" for short, long in NAMES.items() if long == way)
    return peer_schedule(peer, shape, causal=True, backward=backward, title=title)


def exchanging(name: str, world: int, heads: Heads) -> int:
    """How many ranks exchange heads: all of them in Ulysses, as many as divide both in its mixtures, else one."""
    if not name.startswith("ulysses"):
        return 1
    fitting = [n for n in range(1, world + 1) if world % n == 0 and heads.q_heads % n == 0 and heads.kv_heads % n == 0]
    if name != "ulysses":
        return max((n for n in fitting if n < world), default=1)
    if max(fitting) < world:
        raise UserError(
            f"{heads.q_heads} query and {heads.kv_heads} key heads cannot be dealt to {world} ranks",
            expected="both divisible by the number of ranks",
            remedy="choose ulysses_ring (USP)",
        )
    return world
