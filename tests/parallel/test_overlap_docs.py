"""The example of docs/overlap.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "overlap.md"


def _run(rank: int, world: int) -> list[float]:
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)[0], names)
    return names["out"].flatten().unique().tolist()


def test_the_example_runs(ranks):
    assert ranks(2, _run) == [[2 * 6 * 8.0]] * 2
