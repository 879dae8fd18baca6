"""What the benchmark between GPUs predicts of the ways that a closed form exists for, against numbers by hand."""

from __future__ import annotations

import pytest

from undertow.benchmarks.overlap_choice import known
from undertow.benchmarks.overlap_gpus import GATHER, PLAIN, SCATTER, SUM, predicted
from undertow.parallel.overlap_arms import ROW_ARMS
from undertow.parallel.overlap_queueing import Queueing

NONE = Queueing()
FACTS = known(2, 1e12, 1e9, 10.0, 8.0)  # a product of 10 s, a collective of 8
QUEUED = {**FACTS, "product_host_s": 3.0, "link_host_s": 2.0}  # of which the host takes so much before they begin


def _pieces(found: dict[str, float]) -> list[float]:
    return [found[arm.name] for arm in ROW_ARMS]


def test_without_a_host_a_product_and_its_collective_follow_each_other():
    found = predicted(SCATTER, 2, FACTS, NONE)
    assert found[PLAIN] == found["sequential"] == pytest.approx(18.0)
    assert _pieces(found) == pytest.approx([5 + 8, 2.5 + 8, 10.0 if 1.25 + 8 < 10 else 0])
    assert _pieces(predicted(SUM, 2, FACTS, NONE)) == pytest.approx([10 + 4, 10 + 4, 10 + 4])  # half of it is shown


def test_the_second_of_two_calls_is_queued_while_the_first_runs():
    assert predicted(SCATTER, 2, QUEUED, NONE)[PLAIN] == pytest.approx(10 + (8 - 2))
    assert predicted(GATHER, 2, QUEUED, NONE)[PLAIN] == pytest.approx(8 + (10 - 3))
    slow = {**FACTS, "product_host_s": 9.0, "link_host_s": 7.0}  # the host is not done with the second by then
    assert predicted(SCATTER, 2, slow, NONE)[PLAIN] == pytest.approx(9 + 7 + (8 - 7))
    assert _pieces(predicted(SCATTER, 2, QUEUED, NONE)) == pytest.approx([5 + 6, 10.0, 10.0])


def test_pieces_take_what_the_host_needs_to_queue_them():
    found = predicted(SCATTER, 2, QUEUED, Queueing(4.0, 2.0))
    assert _pieces(found) == pytest.approx([5 + 6, 4 + 4 * 2, 4 + 8 * 2]) and found[PLAIN] == pytest.approx(16.0)


def test_without_a_collective_there_is_nothing_to_add():
    assert predicted(SCATTER, 1, known(1, 1e12, 0.0, 10.0, 0.0), NONE)[PLAIN] == pytest.approx(10.0)
