"""Which process plays which vertex, on machines that are only described: hosts, sockets and memory nodes."""

from __future__ import annotations

import ctypes
import itertools
import random
from collections.abc import Sequence

import pytest

from undertow.mpi_interpose import core

COST = (100, 21, 12, 10)  # between hosts, sockets, memory nodes of a socket, within one
Edge = tuple[int, int, int]


def mapped(
    edges: Sequence[Edge], levels: Sequence[Sequence[int]], player: Sequence[int] | None = None
) -> tuple[int, list[int]]:
    """(cost, process of each vertex), as assigned or, with `player`, as given."""
    n = len(levels[0])
    ints = lambda values: (ctypes.c_int * len(values))(*values)  # noqa: E731
    longs = lambda values: (ctypes.c_int64 * len(values))(*values)  # noqa: E731
    found = ints(player if player else [0] * n)
    function = core.load().undertow_core_assign
    function.restype = ctypes.c_int64
    cost = function(
        len(edges), ints([e[0] for e in edges]), ints([e[1] for e in edges]), longs([e[2] for e in edges]), n,
        len(levels), ints([place for level in levels for place in level]), longs(COST[: len(levels)] + COST[3:]),
        int(player is not None), found,
    )  # fmt: skip
    return cost, list(found)


def cluster(hosts: int, sockets: int, nodes: int, each: int, seed: int | None = None) -> list[list[int]]:
    """The places of all processes on three levels, one after the other or in a random order."""
    paths = [
        (h, h * sockets + s, (h * sockets + s) * nodes + m)
        for h in range(hosts)
        for s in range(sockets)
        for m in range(nodes)
        for _ in range(each)
    ]
    if seed is not None:
        random.Random(seed).shuffle(paths)
    return [list(level) for level in zip(*paths, strict=True)]


def ways(vertex: int, n: int, weights: dict[int, int]) -> list[Edge]:
    return [(vertex, vertex ^ bit, weight) for bit, weight in weights.items() if vertex ^ bit < n]


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_what_belongs_together_is_put_together_on_every_level(seed: int | None) -> None:
    # Sixteen ranks, whose strongest partner is eight away: on one memory node; the next on one socket, then one host.
    edges = [edge for v in range(16) for edge in ways(v, 16, {8: 1000, 4: 100, 2: 10, 1: 1})]
    cost, player = mapped(edges, cluster(2, 2, 2, 2, seed))
    assert sorted(player) == list(range(16))
    assert cost == 16 * (1000 * 10 + 100 * 12 + 10 * 21 + 1 * 100)


def ring(n: int) -> list[Edge]:
    return [(v, (v + step) % n, 1) for v in range(n) for step in (1, n - 1)]


def torus(rows: int, columns: int) -> list[Edge]:
    edges = []
    for r, c in itertools.product(range(rows), range(columns)):
        for dr, dc, weight in ((1, 0, 3), (0, 1, 1)):
            there = (r + dr) % rows * columns + (c + dc) % columns
            edges += [(r * columns + c, there, weight), (there, r * columns + c, weight)]
    return edges


@pytest.mark.parametrize("edges", [ring(7), torus(2, 3), torus(3, 2)], ids=["ring", "2x3", "3x2"])
@pytest.mark.parametrize("seed", range(4))
def test_small_graphs_get_the_best_assignment(edges: list[Edge], seed: int) -> None:
    n = max(max(edge[:2]) for edge in edges) + 1
    levels = [level[:n] for level in cluster(2, 2, 1, 2, seed)]
    best = min(mapped(edges, levels, order)[0] for order in itertools.permutations(range(n)))
    cost, player = mapped(edges, levels)
    assert cost == mapped(edges, levels, player)[0]
    assert cost <= 1.05 * best, (cost, best)  # a search that may end beside the best


@pytest.mark.parametrize("seed", range(6))
def test_it_never_costs_more_than_the_order_that_was(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.choice([5, 12, 40, 300])
    edges = [(rng.randrange(n), rng.randrange(n), rng.randrange(1, 1 << 30)) for _ in range(4 * n)]
    levels = [level[:n] for level in cluster(3, 2, 2, n // 12 + 1, seed)]
    cost, player = mapped(edges, levels)
    assert sorted(player) == list(range(n))
    assert cost <= mapped(edges, levels, range(n))[0]
    assert (cost, player) == mapped(edges, levels)


def test_a_place_for_all_keeps_the_order() -> None:
    assert mapped(torus(3, 4), [[0] * 12])[1] == list(range(12))
    # The order that is best already stays, too: blocks of four on one socket each.
    blocks = [(a, b, 5) for k in range(0, 16, 4) for a in range(k, k + 4) for b in range(k, k + 4) if a != b]
    assert mapped(blocks, cluster(2, 2, 1, 4))[1] == list(range(16))
