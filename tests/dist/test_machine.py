"""The Machine file: what is written reads back, what is not one is refused, and the fit is the best line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from undertow.dist.errors import UserError
from undertow.dist.machine import Link, Machine

MACHINE = Machine(
    "box",
    links={"gloo": Link.fit([(8, 1e-5), (1 << 20, 1e-3)], duplex=False)},
    copies={"host": 1e10},
    disks={"write_direct": 1.5e9},
    flops={"gemm/float32": 1e11},
    facts={"cpu": "ä"},
)


def test_round_trip(tmp_path):
    path = tmp_path / "machine.json"
    MACHINE.dump(path)
    assert Machine.load(path) == MACHINE
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["cut", "format", "absent", "list", "field"])
def test_other_files_are_refused(tmp_path, damage):
    path = tmp_path / "machine.json"
    if damage != "absent":
        MACHINE.dump(path)
        text = path.read_text()
        data = json.loads(text)
        damaged = {
            "cut": text[: len(text) // 2],
            "format": json.dumps({**data, "format": 99}),
            "list": "[]",
            "field": json.dumps({**data, "color": "red"}),
        }
        path.write_text(damaged[damage])
    with pytest.raises(UserError, match="cannot read the machine file.*undertow probe --output"):
        Machine.load(path)


def test_a_folder_that_forbids_writing_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot write the machine file"):
        MACHINE.dump(tmp_path / "absent" / "machine.json")


def test_newer_numbers_replace_older_and_others_stay():
    newer = Machine("box2", copies={"host": 2e10}, facts={"torch": "x"})
    updated = MACHINE.updated(newer)
    assert updated.name == "box2" and updated.copies == {"host": 2e10}
    assert updated.links == MACHINE.links and updated.facts == {"cpu": "ä", "torch": "x"}


@given(st.floats(1e-7, 1e-2), st.floats(1e6, 1e12), st.lists(st.integers(1, 1 << 28), min_size=2, unique=True))
@settings(deadline=None)
def test_an_exact_line_is_found(latency_s, rate, sizes):
    link = Link.fit([(n, latency_s + n / rate) for n in sizes])
    for n, seconds in link.samples:
        # float64: the normal equations lose as many digits as the sizes lie close together
        assert link.seconds(n) == pytest.approx(seconds, rel=1e-6)


@given(st.lists(st.tuples(st.integers(1, 1 << 24), st.floats(1e-6, 1.0)), min_size=2, max_size=12))
@settings(deadline=None)
def test_the_fit_is_the_best_nonnegative_line(samples):
    assume(len({n for n, _ in samples}) > 1)
    link = Link.fit(samples)
    assert link.latency_s >= 0 and link.bytes_per_s > 0

    def cost(latency_s: float, per_byte: float) -> float:
        return sum(((latency_s + n * per_byte) / t - 1) ** 2 for n, t in samples)

    per_byte = 1 / link.bytes_per_s
    ours = cost(link.latency_s, per_byte)
    rows = np.array([[1 / t, n / t] for n, t in samples])
    free, *_ = np.linalg.lstsq(rows, np.ones(len(samples)), rcond=None)
    if (free >= 0).all():
        assert ours <= cost(*free) * (1 + 1e-6) + 1e-9
    for change in (0.99, 1.01):
        assert ours <= cost(link.latency_s * change, per_byte) + 1e-9
        assert ours <= cost(link.latency_s, per_byte * change) + 1e-9


@pytest.mark.parametrize("samples", [[], [(8, 1.0)], [(8, 1.0), (8, 2.0)], [(8, 0.0), (16, 1.0)]])
def test_no_line_through_too_little(samples):
    with pytest.raises(ValueError):
        Link.fit(samples)


def test_the_default_path_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Machine.default_path() == tmp_path / "undertow" / "machine.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(Machine.default_path()) == "/home/me/.cache/undertow/machine.json"
