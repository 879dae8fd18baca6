"""Shared fixtures: a seed per test, printed when the test fails; and a word to pytest about the root folder.

The root folder has an __init__.py, because it is the package `undertow`. pytest would import it a second time under the
clone's own name, and fail where that name is no identifier ('my-clone').
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from undertow.integrations.pytest_plugin import run_ranks

ROOT = Path(__file__).resolve().parents[1]


class RootIsAFolder:
    """Registered as a plugin, because hooks of this file itself are not asked about folders above it."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Dir | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


# The files that take longest, begun first: where several run beside each other, none of them is left over at the end.
LONGEST = (
    "test_cluster",
    "test_commands",
    "test_doc_commands",
    "test_torchrun",
    "test_sanitizers",
    "test_mpi4py_suite",
    "test_claims",
    "test_elastic",
    "test_gpu_programs",
    "test_kill",
    "test_train",
    "test_programs",
    "test_gpu",
    "test_deepspeed_plugin",
    "test_stream_families",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(RootIsAFolder())


@pytest.fixture(autouse=True)
def no_inherited_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that a test starts choose gloo's interface for themselves: a group that was made in this process has chosen
    one for it, which may lead nowhere from another network namespace."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


@pytest.fixture
def ranks() -> Callable[..., list[Any]]:
    """The plugin's `ranks` with the patience for a slow machine under load; it costs nothing when they answer."""
    return functools.partial(run_ranks, timeout_s=280.0)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed fixed by the test's name; UNDERTOW_TEST_SEED replaces it. All generators are seeded with it."""
    name = request.node.nodeid
    value = int(os.environ.get("UNDERTOW_TEST_SEED", sum(map(ord, name)) * 7919 % 2**31))
    random.seed(value)
    torch.manual_seed(value)
    request.node.add_report_section("setup", "seed", f"UNDERTOW_TEST_SEED={value}")
    return value
