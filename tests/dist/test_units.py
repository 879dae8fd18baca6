"""Units: reading is exact, writing keeps three digits, and both agree."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undertow.dist.errors import UserError
from undertow.dist.units import (
    format_bytes,
    format_count,
    format_flops,
    format_rate,
    format_seconds,
    parse_bytes,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16MiB", 16 << 20),
        ("16M", 16 << 20),
        ("16 mb", 16_000_000),
        ("0.5KiB", 512),
        ("1.5GB", 1_500_000_000),
        ("0", 0),
        ("7 B", 7),
        (123, 123),
        ("9007199254740993", 9007199254740993),  # beyond the integers of a double
        ("3EiB", 3 << 60),
    ],
)
def test_bytes_are_read_exactly(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1.5B", "0.3KiB", "1 MiBit", "1e9", "1,5GB", "nan", "0x10", "16 Mi"])
def test_other_text_is_a_user_error_that_names_the_value(text):
    with pytest.raises(UserError, match="limit '") as caught:
        parse_bytes(text, name="limit")
    assert f"'{text}'" in str(caught.value) and "16MiB" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("200ms", 0.2), ("1.5 min", 90), ("1h30m", 5400), ("2d", 172800), ("15us", 15e-6), (0.25, 0.25)],
)
def test_seconds(text, expected):
    assert parse_seconds(text) == expected


@pytest.mark.parametrize("text", ["", "abc", "5 parsecs", "-3s", "1h30", "inf", "1:30"])
def test_bad_seconds(text):
    with pytest.raises(UserError, match="is not a time"):
        parse_seconds(text)


def test_formats():
    assert [format_bytes(n) for n in (0, 1023, 1024, 1536, (1 << 20) - 1, 1 << 30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "1.0 MiB",
        "1.0 GiB",
    ]
    assert format_rate(5.02e10) == "50.2 GB/s"
    assert format_flops(7.874e14) == "787 TFLOP/s"
    assert [format_count(v, "tokens/s") for v in (0, 0.1234, 5, 999.7, 12345)] == [
        "0 tokens/s",
        "0.123 tokens/s",
        "5 tokens/s",
        "1k tokens/s",
        "12.3k tokens/s",
    ]
    assert [format_seconds(s) for s in (0, 1.5e-8, 1.2e-5, 1.23e-3, 0.99999, 59.99, 75, 7300, 90000)] == [
        "0 s",
        "15 ns",
        "12 µs",
        "1.23 ms",
        "1 s",
        "1 min 00 s",
        "1 min 15 s",
        "2 h 01 min",
        "1 d 01 h",
    ]
    assert format_seconds(float("inf")) == "inf s" and format_seconds(-75) == "-1 min 15 s"


@settings(deadline=None)
@given(st.integers(0, 1 << 62))
def test_formatted_bytes_read_back_within_the_shown_digit(nbytes):
    text = format_bytes(nbytes)
    unit = parse_bytes("1" + text.split()[1])
    tenths = round(float(text.split()[0]) * 10)
    assert abs(tenths * unit - 10 * nbytes) <= unit // 2 + 1 + nbytes // (1 << 50)


@settings(deadline=None)
@given(st.floats(0, 1e9))
def test_formatted_seconds_never_fail(seconds):
    assert format_seconds(seconds).split()[-1] in ("ns", "µs", "ms", "s", "min", "h")
