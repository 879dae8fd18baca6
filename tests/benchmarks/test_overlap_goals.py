"""The goals of the overlap benchmarks, judged from rows by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from undertow.benchmarks.intervals import Interval
from undertow.benchmarks.overlap_choice import known
from undertow.benchmarks.overlap_goals import cells, main, markdown
from undertow.benchmarks.report import Report, Row


def row(case: str, ratio: tuple[float, float, float] | None, extras: dict[str, float], role: str = "ours") -> Row:
    return Row(case, "auto", role, ratio=None if ratio is None else Interval(*ratio), extras=extras)


ROWS = [
    row("half", (1.3, 1.41, 1.5), known(2, 1e9, 1e6, 1.0, 0.5)),  # ideal 1.5: 0.94 of it
    row("equal", (0.95, 1.0, 1.1), known(2, 1e9, 1e6, 1.0, 1.0)),  # ideal 2: half of it, and perhaps slower
    row("long", (1.2, 1.2, 1.2), known(2, 1e9, 1e6, 1.0, 2.0, set_link=True)),  # ideal 1.5, not judged
    row("no link", (0.9, 0.93, 0.96), known(2, 1e9, 1e6, 1.0, 0.0)),
    row("older", (1.5, 1.8, 1.9), {"copy/gemm": 1.0, "ideal": 2.0}),  # 0.9 of it
    row("not timed", None, known(2, 1e9, 1e6, 1.0, 1.0)),
    row("plain", (1.0, 1.0, 1.0), known(2, 1e9, 1e6, 1.0, 1.0), "rival"),
    row("unknown", (1.0, 1.0, 1.0), {}),
]


def test_goals_by_hand():
    found = cells(ROWS)
    assert [(cell.case, cell.ideal, cell.judged) for cell in found] == [
        *(
            ("half", 1.5, True),
            ("equal", 2.0, True),
            ("long", 1.5, False),
            ("no link", 1.0, False),
            ("older", 2.0, True),
        )
    ]
    assert [cell.of_ideal for cell in found] == pytest.approx([0.94, 0.5, 0.8, 0.93, 0.9])
    text = markdown("x", found)
    assert "x: 0.9 of the ideal reached in 2 of 3 cells with link / product from 0.3 to 1.5" in text
    assert "never slower: 3 yes, 1 open, 1 no" in text
    assert "| equal | 1.00 | 2.00 | 1.000 [0.950, 1.100] | 0.50 | open |" in text
    assert "| no link | 0.00 | 1.00 | 0.930 [0.900, 0.960] | 0.93 (not judged) | no |" in text
    assert "no cell tells" in markdown("x", [])


@pytest.mark.slow  # on the checkout only: a wheel has no results
def test_the_recorded_gpu_table_is_judged(capsys):
    results = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("overlap_cuda_*.json"))
    assert results and main([str(path) for path in results]) == 0
    out = capsys.readouterr().out
    for path in results:
        timed = {row.case for row in Report.load(path).rows if row.role == "ours" and row.ratio is not None}
        assert f"{path.stem}: 0.9 of the ideal reached in " in out and all(f"| {case} |" in out for case in timed)
    with pytest.raises(SystemExit):  # an option, not a file
        main(["--help"])
    assert "usage:" in capsys.readouterr().out
