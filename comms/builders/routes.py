"""How what one rank owns reaches the others: rings, rings of rings and direct messages, as a tree per owner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...dist.errors import UserError


@dataclass(frozen=True)
class Route:
    """What `owner` owns comes to `visitor` from `parent(owner, visitor)`, in step `step(owner, visitor)` ≥ 1.

    `buffers`: how many arrivals are kept at once; 0 keeps all (an all-gather). `narrow` False sends all rows to all.
    """

    parent: Callable[[int, int], int]
    step: Callable[[int, int], int]
    buffers: int = 2
    narrow: bool = True


def ring(world: int, direction: int = 1, *, buffers: int = 2, narrow: bool = True) -> Route:
    """Neighbour to neighbour; `direction` 1 or -1."""
    return Route(lambda o, v: (v - direction) % world, lambda o, v: (v - o) * direction % world, buffers, narrow)


def direct(world: int, *, buffers: int = 2, narrow: bool = True) -> Route:
    """From the owner to each, staggered so that no two send to one rank in one step."""
    return Route(lambda o, v: o, lambda o, v: (v - o) % world, buffers, narrow)


def two_level(world: int, node: int) -> Route:
    """A ring of nodes of `node` ranks, and a ring inside each: one hop between nodes in `node` steps (LoongTrain)."""
    if node < 1 or world % node:
        raise UserError(f"nodes of {node} ranks in a ring of {world}", expected="a divisor of the number of ranks")

    def parent(o: int, v: int) -> int:
        return v // node * node + (v - 1) % node if v % node != o % node else (v - node) % world

    def step(o: int, v: int) -> int:
        return (v // node - o // node) % (world // node) * node + (v - o) % node

    return Route(parent, step, buffers=node + 1)
