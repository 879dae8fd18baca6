"""The examples of docs/schedules.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from undertow.comms.schedule_text import parse

PAGE = Path(__file__).parents[2] / "docs" / "schedules.md"


def _examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)


def test_the_first_example_runs(capsys):
    exec(_examples()[0], {})
    out = capsys.readouterr().out
    text, title = out.rsplit("\n", 2)[0], out.splitlines()[-1]
    assert str(parse(text)).strip() == text.strip()
    assert title.startswith("ring_reduce_scatter, 4 ranks, modelled on machine 'assumed': ")


def _second(rank, world, source):
    names: dict = {}
    exec(source, names)
    return names["out"].tolist()


@pytest.mark.parametrize("world", [2, 4])
def test_the_second_example_runs(world, ranks):
    total = float(sum(range(world)))
    assert ranks(world, _second, _examples()[1]) == [[[total] * 3] * 2] * world
