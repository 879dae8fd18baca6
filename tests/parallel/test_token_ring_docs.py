"""The examples of docs/token-ring.md run as they stand, on two ranks."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "token-ring.md"


def _run(rank, world, blocks):
    for block in blocks:
        names: dict = {}
        exec(block, names)  # the page's own text
        if "whole" in names:
            return list(names["whole"].shape)
    return None


def test_examples_run(ranks):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 2
    assert ranks(2, _run, blocks) == [[1, 1001, 8, 64]] * 2
