"""`undertow bench t3_paper`: answers checked against algebra, predictions that no arm beats."""

from __future__ import annotations

import pytest

from undertow.benchmarks.case import Context
from undertow.benchmarks.harness import run_case
from undertow.benchmarks.t3_paper import cases


@pytest.mark.parametrize("case", cases(Context(quick=True))[:2], ids=lambda case: case.name)
def test_rows_of_a_case(case):
    rows = run_case(case, rounds=6, seed=0)
    assert [row.wrong for row in rows] == [0] * 5
    times = {row.arm: row.samples_s[0] for row in rows}
    predicted = {row.arm: row.predicted_s for row in rows}
    for exact in ("Sequential", "Ideal-GEMM-RS-Overlap"):
        assert times[exact] == pytest.approx(predicted[exact], rel=1e-9)
    for fused in ("T3", "T3-MCA"):
        # Contention only costs; the closed form may leave out the last piece's read and update.
        assert times[fused] >= predicted[fused] * (1 - 1e-9)
    assert times["T3-MCA"] <= times["T3"] < times["Sequential"]
