"""Graph reachability problems: edges, a root, and two candidates, one of which the root reaches in exactly D steps.

The other candidate cannot be reached at all, so the answer takes following edges, not counting them. Problems are
generated from (seed, step) and found by Boolean matrix products over many graphs at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...dist.errors import UserError


@dataclass(frozen=True)
class Problems:
    """B problems: `edges` [B, E, 2], `root`, `target`, `decoy` [B], `distance` [B, N] from the root (N: never)."""

    edges: np.ndarray
    root: np.ndarray
    target: np.ndarray
    decoy: np.ndarray
    distance: np.ndarray

    def rows(self, rows: slice | np.ndarray) -> Problems:
        return Problems(*(part[rows] for part in (self.edges, self.root, self.target, self.decoy, self.distance)))


def distances(edges: np.ndarray, root: np.ndarray, nodes: int) -> np.ndarray:
    """Steps from the root to every node [B, N]; `nodes` for those out of reach."""
    count = len(root)
    adjacent = np.zeros((count, nodes, nodes), dtype=np.float32)
    adjacent[np.arange(count)[:, None], edges[:, :, 0], edges[:, :, 1]] = 1
    found = np.full((count, nodes), nodes)
    found[np.arange(count), root] = 0
    frontier = (found == 0).astype(np.float32)
    for step in range(1, nodes):
        fresh = ((frontier[:, None] @ adjacent)[:, 0] > 0) & (found == nodes)
        if not fresh.any():
            break
        found[fresh] = step
        frontier = fresh.astype(np.float32)
    return found


def problems(*, seed: int, step: int, count: int, nodes: int, edges: int, depth: int) -> Problems:
    """`count` problems whose target is `depth` steps from the root."""
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    parts: list[Problems] = []
    have = 0
    for _ in range(200):
        draw = generator.integers(0, nodes, (4 * count, edges, 2))
        root = generator.integers(0, nodes, 4 * count)
        distance = distances(draw, root, nodes)
        usable = (distance == depth).any(1) & (distance == nodes).any(1)
        pick = generator.random(distance.shape)
        target = np.where(distance == depth, pick, -1).argmax(1)
        decoy = np.where(distance == nodes, pick, -1).argmax(1)
        whole = Problems(draw, root, target, decoy, distance)
        parts.append(Problems(*(getattr(whole, name)[usable] for name in whole.__dataclass_fields__)))
        have += int(usable.sum())
        if have >= count:
            break
    else:
        raise UserError(f"graphs of {nodes} nodes and {edges} edges are hardly ever {depth} deep", remedy="more nodes")
    names = Problems.__dataclass_fields__
    return Problems(*(np.concatenate([getattr(part, name) for part in parts])[:count] for name in names))


def renamed(problem: Problems, generator: np.random.Generator) -> Problems:
    """The same problems with nodes renamed and edges in another order, of each row by itself."""
    count, nodes = problem.distance.shape
    name = generator.random((count, nodes)).argsort(1)  # node i becomes name[i]
    order = generator.random(problem.edges.shape[:2]).argsort(1)
    edges = np.take_along_axis(problem.edges, order[:, :, None], 1)
    edges = np.take_along_axis(name, edges.reshape(count, -1), 1).reshape(edges.shape)
    distance = np.empty_like(problem.distance)
    np.put_along_axis(distance, name, problem.distance, 1)
    row = np.arange(count)
    return Problems(edges, name[row, problem.root], name[row, problem.target], name[row, problem.decoy], distance)


def a_shortest_path(problem: Problems, depth: int, generator: np.random.Generator) -> np.ndarray:
    """For each problem the nodes after the root on one shortest path to its target [B, depth]."""
    path = np.empty((len(problem.root), depth), dtype=np.int64)
    path[:, -1] = problem.target
    for at in range(depth - 1, 0, -1):
        source, target = problem.edges[:, :, 0], problem.edges[:, :, 1]
        near = np.take_along_axis(problem.distance, source, 1) == at
        usable = near & (target == path[:, at, None])
        chosen = np.where(usable, generator.random(usable.shape), -1).argmax(1)
        path[:, at - 1] = source[np.arange(len(path)), chosen]
    return path
