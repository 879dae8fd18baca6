"""The definition of an IR in numpy, and a seeded generator of nested random ones.

An IR here is a tuple: ('bytes', n), ('loop', count, stride, child), ('seq', [(off, child), …]), ('runs', [(off, len),
…]). `indices` expands it to the byte offsets in packed order, which is all that packing means.
"""

from __future__ import annotations

import random

import numpy as np


def text(ir: tuple) -> str:
    kind = ir[0]
    if kind == "bytes":
        return f"(bytes {ir[1]})"
    if kind == "loop":
        return f"(loop {ir[1]} {ir[2]} {text(ir[3])})"
    if kind == "seq":
        return "(seq" + "".join(f" {off} {text(child)}" for off, child in ir[1]) + ")"
    return "(runs" + "".join(f" {off} {length}" for off, length in ir[1]) + ")"


def indices(ir: tuple) -> np.ndarray:
    kind = ir[0]
    if kind == "bytes":
        return np.arange(ir[1], dtype=np.int64)
    if kind == "loop":
        child = indices(ir[3])
        return (np.arange(ir[1], dtype=np.int64)[:, None] * ir[2] + child[None, :]).reshape(-1)
    pieces = [off + (indices(child) if kind == "seq" else np.arange(child, dtype=np.int64)) for off, child in ir[1]]
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def size(ir: tuple) -> int:
    kind = ir[0]
    if kind == "bytes":
        return ir[1]
    if kind == "loop":
        return ir[1] * size(ir[3])
    return sum(size(child) if kind == "seq" else child for _, child in ir[1])


def random_ir(rng: random.Random, depth: int = 3, limit: int = 20000, disjoint: bool = False) -> tuple:
    """A random IR of at most `limit` bytes; `disjoint` ones touch no byte twice (they can be unpacked)."""
    while True:
        ir = _random(rng, depth)
        if size(ir) <= limit:
            if not disjoint:
                return ir
            touched = indices(ir)
            if len(np.unique(touched)) == len(touched):
                return ir


def _block(rng: random.Random) -> int:
    return rng.choice([0, 1, 2, 3, 4, 4, 5, 7, 8, 8, 12, 13, 16, 16, 20, 24, 31, 32, 33, 48, 63, 64, 65, 100, 257])


def _random(rng: random.Random, depth: int) -> tuple:
    kind = rng.choice(["bytes", "loop", "loop", "loop", "seq", "runs"]) if depth else "bytes"
    if kind == "bytes":
        return ("bytes", _block(rng))
    if kind == "loop":
        child = _random(rng, depth - 1)
        reach = _span(child)
        stride = rng.choice([reach, reach + rng.choice([0, 1, 4, 8, 16, 100]), -reach - rng.choice([0, 4]), 0, 4, 512])
        count = rng.choice([0, 1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 64, 130])
        if depth > 1 and rng.random() < 0.3:  # crossed loops: a row loop inside a column loop
            n, m, unit = rng.randint(1, 40), rng.randint(1, 40), rng.choice([1, 2, 4, 8, 16, 12])
            return ("loop", n, unit, ("loop", m, unit * n, ("bytes", unit)))
        return ("loop", count, stride, child)
    if kind == "seq":
        parts, off = [], rng.randint(-64, 64)
        same = _random(rng, depth - 1) if rng.random() < 0.3 else None
        for _ in range(rng.randint(0, 6)):
            child = same or _random(rng, depth - 1)
            parts.append((off, child))
            off += rng.choice([_span(child), _span(child) + rng.choice([1, 4, 8]), rng.randint(-200, 200)])
        return ("seq", parts)
    many, constant, runs, off = rng.random() < 0.5, rng.choice([None, _block(rng)]), [], 0
    for _ in range(rng.randint(17, 90) if many else rng.randint(0, 16)):
        length = _block(rng) if constant is None else constant
        runs.append((off, length))
        off += length + rng.choice([0, 0, 1, 4, 9, rng.randint(-300, 300)])
    return ("runs", runs)


def _span(ir: tuple) -> int:
    touched = indices(ir)
    return int(touched.max() - touched.min() + 1) if len(touched) else 0
