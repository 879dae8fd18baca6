"""Reports read back from JSON, refuse what is not theirs, and say on the page what stands in the rows."""

from __future__ import annotations

import json

import pytest

from undertow.benchmarks.intervals import Interval
from undertow.benchmarks.report import COLUMNS, Report, Row, markdown_table
from undertow.dist.errors import UserError


def example(**changes) -> Report:
    rows = (
        Row("1 MiB", "plain", "plain", 2**20, "cpu", 2.0**20, 0, Interval(0.9e-3, 1e-3, 1.2e-3), predicted_s=0.5e-3),
        Row("1 MiB", "plain (A/A)", "again", 2**20, wrong=0, seconds=Interval(1, 1, 1), ratio=Interval(0.95, 1, 1.02)),
        Row(
            *("1 MiB", "ours", "ours", 2**20, "cpu", 2.0**20, 0, Interval(0.4e-3, 0.5e-3, 0.6e-3)),
            ratio=Interval(1.9, 2.0, 2.1),
            hardware_bytes_per_s=2**20 / 0.25e-3,
            inner=3,
            extras={"peak_bytes": 3 * 2**20, "stall_s": 0.002},
            samples_s=(0.4e-3, 0.5e-3),
            said="two pieces (measured)",
        ),
        Row("1 MiB", "broken", "rival", 2**20, wrong=12, note="the answer is wrong"),
        Row("1 MiB", "absent", "rival", 2**20, note="not installed"),
    )
    fields = dict(
        benchmark="demo",
        claim="a claim",
        command="undertow bench demo",
        seed=3,
        rounds=7,
        facts={"hardware": "2 cores"},
    )
    return Report(**{**fields, "rows": rows, **changes})


def test_json_round_trip(tmp_path):
    example().dump(tmp_path / "r.json")
    assert Report.load(tmp_path / "r.json") == example()
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 1}', '{"format": 99, "rows": []}', '{"format": 1, "rows": 3}']
)
def test_other_files_are_refused_in_one_line(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(UserError, match="other.json.*expected a JSON file of format 1") as caught:
        Report.load(path)
    assert "\n" not in str(caught.value)


def test_a_torn_file_is_refused(tmp_path):
    example().dump(tmp_path / "r.json")
    text = (tmp_path / "r.json").read_text()
    (tmp_path / "r.json").write_text(text[: len(text) // 2])
    with pytest.raises(UserError):
        Report.load(tmp_path / "r.json")
    with pytest.raises(UserError):
        Report.load(tmp_path / "absent.json")


def cells(arm: str) -> dict[str, str]:
    row = next(row for row in example().rows if row.arm == arm)
    return dict(zip(COLUMNS, row.cells(), strict=True))


def test_cells_by_hand():
    assert cells("plain") == {
        "case": "1 MiB",
        "arm": "plain",
        "size": "1.0 MiB",
        "time": "1 ms",
        "bandwidth": "1.05 GB/s",
        "of hardware": "",
        "wrong": "0",
        "predicted": "500 µs",
        "of it": "2.00",
        "ratio": "1 (plain)",
        "never slower": "",
    }
    ours = cells("ours")
    assert ours["arm"] == "**ours**" and ours["of hardware"] == "50%"
    assert ours["ratio"] == "2.000 [1.900, 2.100]" and ours["never slower"] == "yes"
    assert cells("broken")["time"] == "not timed" and cells("broken")["wrong"] == "12"


def test_the_page_shows_losses_and_absences():
    page = example().markdown("demo.png")
    assert "![demo](demo.png)" in page and "| broken |" in page
    assert "- not compared: absent (all cases): not installed" in page and "| absent |" not in page
    assert "at most 5.0%" in page  # the noise: the A/A interval reaches down to 0.95
    assert "| 1 MiB | ours | 3.0 MiB | 2 ms |" in page  # the extras, with their units
    assert "- 1 MiB, ours: two pieces (measured)" in page
    assert "![" not in example().markdown()


def test_failure_is_a_wrong_answer_or_an_exception():
    assert example().failed
    fine = tuple(row for row in example().rows if row.arm in ("plain", "ours", "absent"))
    assert not example(rows=fine).failed
    assert example(rows=(*fine, Row("1 MiB", "x", "rival", note="failed: OSError: no"))).failed


def test_table_escapes_bars_and_newlines():
    assert markdown_table(["a"], [["x|y\nz"]]) == ["| a |", "|---|", "| x\\|y z |"]


def test_json_is_plain(tmp_path):
    """Readable without this package: numbers, texts, lists."""
    example().dump(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["rows"][2]["ratio"] == {"low": 1.9, "median": 2.0, "high": 2.1}
    assert data["format"] == 1 and data["rounds"] == 7
