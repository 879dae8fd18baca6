"""Nsight Compute's table is read as it is printed, and refused where it says nothing."""

from __future__ import annotations

import pytest

from undertow.benchmarks.overlap_traffic import READ, WAYS, WRITTEN, claimed, least, markdown, measure, parsed
from undertow.dist.errors import UserError

HEAD = '"ID","Process ID","Kernel Name","Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"\n'


def line(at, metric, value, unit="byte"):
    return f'"{at}","71","range","0","9.0","Command line profiler metrics","{metric}","{unit}","{value}"\n'


def test_bytes_of_each_range_in_order():
    text = "==PROF== Connected to process 71\n" + HEAD
    text += line(1, READ, "500") + line(1, WRITTEN, "7") + line(0, READ, "1,200,000") + line(0, WRITTEN, "3,400.0")
    assert parsed(text) == [(1_200_000, 3400), (500, 7)]


@pytest.mark.parametrize(
    "text, says",
    [
        ("==ERROR== ERR_NVGPUCTRPERM - no permission\n", "ERR_NVGPUCTRPERM"),
        ("", "measured nothing"),
        (HEAD + line(0, READ, "1", "Mbyte"), "Mbyte"),
        (HEAD + line(0, READ, "1"), "lack a metric"),
    ],
)
def test_what_cannot_be_read_is_refused(text, says):
    with pytest.raises(UserError, match=says):
        parsed(text)


def test_least_by_hand_and_the_table():
    # world 2: A 4×3 and B 3×5 in bf16: 54 bytes; y 40, chunk 20: copies out read 20, the sum reads 2·20 and writes 20
    assert least(4, 5, 3, world=2) == (54 + 20 + 40, 40 + 20 + 20)
    # a ring of 2, in chunks: written 2 + 2 and read 3; T3: written 1 + 1 and read 0
    assert claimed("sequential", 4, 5, 3, world=2) == (54 + 3 * 20, 4 * 20)
    assert claimed("t3", 4, 5, 3, world=2) == (54, 2 * 20)
    text = markdown((4096, 8192, 16384), [(100, 100), (110, 100), (90, 90)] * 2)
    rows = [[cell.strip() for cell in row.split("|")] for row in text.splitlines()[5:11]]
    assert [row[4] for row in rows] == ["1.000", "1.050", "0.900"] * 2
    a, b = 2 * 4096 * 16384 / 1e9, 2 * 16384 * 8192 / 1e9  # GB of the operands
    wanted = [a + 8 * b, a + 16 * b, (4 * 7 + 1) / 8 * a + 2 * b, (8 * 7 + 1) / 8 * a + 2 * b]
    assert [row[5] for row in rows] == ["", *(f"{gigabytes:.3f}" for gigabytes in wanted), ""]
    with pytest.raises(UserError, match=f"{len(WAYS) - 1} ranges"):
        markdown((1, 1, 1), [(1, 1)] * (len(WAYS) - 1))


def test_without_ncu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no ncu"):
        measure((1, 1, 1), 1.0)
