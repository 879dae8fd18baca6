"""Graphs for GraphGPS: the ring transfer task, and the package dependencies of the Debian machine it runs on.

Ring transfer: one node of a ring carries a class, the node opposite must name it. Message passing of L layers sees L
nodes far, so with fewer layers than half the ring it can only guess.

Debian: packages are nodes, dependencies edges, a package's section its class, trigrams of its name its features. Built
from what `apt-cache` knows, never shipped; a fifth of the packages is held out.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...dist.errors import UserError

IGNORED = -100


@dataclass(frozen=True)
class Graph:
    """Directed edges [2, E], both ways; `features` and `classes` are sizes."""

    nodes: int
    edges: np.ndarray
    features: int
    classes: int


class Ring:
    """`classes` one-hot at the source, a mark at the target, a constant everywhere."""

    def __init__(self, nodes: int, classes: int, seed: int) -> None:
        at = np.arange(nodes)
        forth, back = np.stack([at, (at + 1) % nodes]), np.stack([(at + 1) % nodes, at])
        self.graph = Graph(nodes, np.concatenate([forth, back], 1), classes + 2, classes)
        self.seed = seed

    def batch(self, step: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [count, N, F] and labels [count, N], IGNORED except at the targets."""
        nodes, classes = self.graph.nodes, self.graph.classes
        generator = np.random.Generator(np.random.Philox(key=[self.seed, step]))
        label, source = generator.integers(0, classes, count), generator.integers(0, nodes, count)
        row, target = np.arange(count), (source + nodes // 2) % nodes
        x = np.zeros((count, nodes, classes + 2), dtype=np.float32)
        x[row, source, label] = 1
        x[row, target, classes] = 1
        x[:, :, classes + 1] = 1
        labels = np.full((count, nodes), IGNORED)
        labels[row, target] = label
        return torch.from_numpy(x), torch.from_numpy(labels)

    def test(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.batch(10**9, 200)


class Debian:
    """The `nodes` packages nearest to the most needed ones, as one graph; every batch is that graph."""

    TRIGRAMS = 256

    def __init__(self, nodes: int) -> None:
        names, sections, edges = dependencies(nodes)
        known = sorted(set(sections))
        self.graph = Graph(len(names), edges, self.TRIGRAMS, len(known))
        x = np.zeros((1, len(names), self.TRIGRAMS), dtype=np.float32)
        for row, name in enumerate(names):
            for i in range(len(name) - 2):
                x[0, row, zlib.crc32(name[i : i + 3].encode()) % self.TRIGRAMS] = 1
        held_out = np.array([zlib.crc32(name.encode()) % 5 == 0 for name in names])
        label = np.array([known.index(section) for section in sections])
        self.x = torch.from_numpy(x)
        self.train_labels = torch.from_numpy(np.where(held_out, IGNORED, label)[None])
        self.test_labels = torch.from_numpy(np.where(held_out, label, IGNORED)[None])

    def batch(self, step: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x, self.train_labels

    def test(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x, self.test_labels


def dependencies(limit: int) -> tuple[list[str], list[str], np.ndarray]:
    """Names, sections and edges (both ways) of up to `limit` packages, in breadth-first order from the most needed."""
    program = shutil.which("apt-cache")
    text = ""
    if program:
        text = subprocess.run([program, "dumpavail"], capture_output=True, text=True, check=False).stdout
    needs, sections = parse(text)
    if len(needs) < 1000:
        raise UserError(
            f"apt-cache knows {len(needs)} packages here",
            expected="a Debian or Ubuntu machine with its package lists",
            remedy='run apt-get update, or use --set graph="ring"',
        )
    neighbours: dict[str, set[str]] = {name: set() for name in needs}
    for name, others in needs.items():
        for other in others & needs.keys():
            neighbours[name].add(other)
            neighbours[other].add(name)
    hub = max(sorted(neighbours), key=lambda name: len(neighbours[name]))
    order, at = {hub: 0}, 0
    queue = [hub]
    while at < len(queue) and len(order) < limit:
        for other in sorted(neighbours[queue[at]]):
            if other not in order and len(order) < limit:
                order[other] = len(order)
                queue.append(other)
        at += 1
    pairs = [(order[a], order[b]) for a in order for b in sorted(neighbours[a]) if b in order]
    return list(order), [sections[name] for name in order], np.array(pairs, dtype=np.int64).T


def parse(text: str) -> tuple[dict[str, set[str]], dict[str, str]]:
    """What each package needs (of alternatives the first), and its section, from `apt-cache dumpavail`'s output."""
    needs: dict[str, set[str]] = {}
    sections: dict[str, str] = {}
    for stanza in text.split("\n\n"):
        fields: dict[str, Any] = dict(re.findall(r"^(Package|Section|Depends): (.*)$", stanza, re.MULTILINE))
        if "Package" in fields:
            words = (part.split("|")[0].split() for part in fields.get("Depends", "").split(","))
            needs[fields["Package"]] = {word[0].partition(":")[0] for word in words if word}
            sections[fields["Package"]] = fields.get("Section", "none").rpartition("/")[2]
    return needs, sections
