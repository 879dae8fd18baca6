"""Shared fixtures: a seed per test, printed when the test fails."""

from __future__ import annotations

import os
import random

import pytest
import torch


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed fixed by the test's name; UNDERTOW_TEST_SEED replaces it. All generators are seeded with it."""
    name = request.node.nodeid
    value = int(os.environ.get("UNDERTOW_TEST_SEED", sum(map(ord, name)) * 7919 % 2**31))
    random.seed(value)
    torch.manual_seed(value)
    request.node.add_report_section("setup", "seed", f"UNDERTOW_TEST_SEED={value}")
    return value
