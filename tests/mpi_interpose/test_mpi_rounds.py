"""What the calls of a halo cost: medians of differences within a turn, and a verdict that says whether it is enough."""

from __future__ import annotations

import pytest

from undertow.benchmarks.mpi_rounds import Cell, markdown, read


def test_a_slow_turn_of_all_arms_is_no_cost_of_one() -> None:
    start = read("4000 4010 4050\n9000 8990 9052\n4100 4100 4149\n")
    assert (start.library, start.again, start.preload) == (4100, 0, 50)
    with pytest.raises(ValueError, match="expected a line of three times"):
        read("")


@pytest.mark.parametrize(("preload", "met"), [(600, "yes"), (700, "no")])
def test_the_page_says_whether_a_call_costs_too_much(preload: int, met: str) -> None:
    starts = tuple(read(f"4000 {4000 + k} {4000 + preload + k}") for k in range(3))
    page = markdown([Cell("some-1.0", 1, 16, starts)], {"hardware": "two cores"})
    assert f"| {met} |" in page and f"{preload + 1} [{preload}, {preload + 2}]" in page
