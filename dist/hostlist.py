"""Slurm's compressed lists: `n[1-4,7],gpu01` as host names, `4(x2),3` as task counts per node.

Read here rather than by `scontrol show hostnames`, which containers often lack.
"""

from __future__ import annotations

import re
from itertools import product

from .errors import UserError

_MOST = 1 << 20  # names; a typing error such as n[1-999999999] must not fill the memory


def expand_hosts(text: str, *, name: str = "the host list") -> list[str]:
    """'n[1-2,07]x[1-2],m' → ['n1x1', 'n1x2', 'n2x1', …, 'n07x2', 'm'], in order; `UserError` for other text."""
    hosts: list[str] = []
    for item in _split(text, name):
        parts = re.split(r"\[([^\[\]]*)\]", item)
        if any("[" in part or "]" in part for part in parts) or not item:
            raise _malformed(text, name)
        choices = [[part] if i % 2 == 0 else _ranges(part, text, name) for i, part in enumerate(parts)]
        count = 1
        for choice in choices:
            count *= len(choice)
        if count + len(hosts) > _MOST:
            raise _malformed(text, name)
        hosts += ["".join(combination) for combination in product(*choices)]
    return hosts


def expand_counts(text: str, *, name: str = "the task counts") -> list[int]:
    """'4(x2),3' → [4, 4, 3]."""
    counts: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d{1,7})(?:\(x(\d{1,7})\))?", item.strip())
        if not match or (repeat := int(match[2] or 1)) + len(counts) > _MOST:
            raise UserError(f"{name} is '{text}'", expected="counts such as 4(x2),3")
        counts += [int(match[1])] * repeat
    return counts


def _split(text: str, name: str) -> list[str]:
    """Split at the commas outside brackets."""
    items, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            raise _malformed(text, name)
        if letter == "," and depth == 0:
            items.append(text[start:i])
            start = i + 1
    if depth:
        raise _malformed(text, name)
    return [*items, text[start:]]


def _ranges(inside: str, text: str, name: str) -> list[str]:
    values: list[str] = []
    for part in inside.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise _malformed(text, name)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last - first >= _MOST:
            raise _malformed(text, name)
        values += [f"{value:0{len(match[1])}d}" for value in range(first, last + 1)]
    return values


def _malformed(text: str, name: str) -> UserError:
    return UserError(f"{name} is '{text}'", expected="a Slurm host list such as n[1-4,7] or gpu01,gpu02")
