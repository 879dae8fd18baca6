"""The page's numbers are the simulation's."""

from __future__ import annotations

from pathlib import Path

import pytest

from undertow.comms.t3_paper.hardware import origins
from undertow.comms.t3_paper.paper import CLAIMS
from undertow.comms.t3_paper.table import basis_text, value_text

PAGE = Path(__file__).resolve().parents[3] / "docs" / "t3-simulator.md"


@pytest.fixture(scope="module")
def page() -> list[str]:
    return PAGE.read_text().splitlines()


def test_every_claim_is_on_the_page_as_simulated(rows, page):
    for claim in CLAIMS:
        ours = claim.of(rows)
        values = [value_text(claim, claim.paper), value_text(claim, ours), f"{100 * claim.deviation(ours):+.1f} %"]
        assert f"| {' | '.join([claim.text, *values, basis_text(claim)])} |" in page


def test_every_constant_is_on_the_page(page):
    for name, value, origin, why in origins():
        assert f"| `{name}` | {value:g} | {origin} | {why} |" in page
