"""The paper's rows, simulated once for all tests here."""

from __future__ import annotations

import pytest

from undertow.comms.t3_paper.hardware import Hardware
from undertow.comms.t3_paper.paper import Row, evaluate_paper


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    return evaluate_paper(Hardware())
