"""Progress: a live line on a terminal, a plain line now and then elsewhere, nothing on other ranks."""

from __future__ import annotations

import io

import pytest

from undertow.dist import progress
from undertow.dist.progress import Progress


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_plain_lines_come_every_interval_and_at_the_end(clock):
    out = io.StringIO()
    with Progress(100, "train", file=out, initial=20) as bar:
        for step in range(80):
            clock.now += 0.5
            bar.update(loss=2.5 - step / 100, tokens_per_s=12345.0, checkpoint=f"saved {step // 10}")
    lines = out.getvalue().splitlines()
    assert len(lines) == 4 + 1  # 40 s: at 10, 20, 30, 40, and the end
    assert lines[0] == "train  40/100  40%  2 step/s  ETA 30 s  loss 2.31  12.3k tokens/s  checkpoint saved 1"
    assert lines[-1].startswith("train  100/100  100%  2 step/s  loss 1.71")
    assert lines[-1].endswith("done after 40 s")


def test_the_rate_follows_the_last_minute(clock):
    bar = Progress(None, "x", file=io.StringIO()).__enter__()
    for _ in range(200):
        clock.now += 1
        bar.update(advance=10)
    for _ in range(120):
        clock.now += 1
        bar.update(advance=1)
    assert bar.rate() == pytest.approx(1.0, rel=0.05)
    assert "ETA" not in bar.line()


def test_an_exception_says_stopped(clock):
    out = io.StringIO()
    with pytest.raises(RuntimeError), Progress(10, "train", file=out) as bar:
        bar.update()
        raise RuntimeError
    assert out.getvalue() == "train  1/10  10%  stopped after 0 s\n"


def test_a_field_can_be_removed_and_bytes_are_formatted(clock):
    bar = Progress(4 << 20, "copy", unit="B", file=io.StringIO())
    with bar:
        clock.now += 2
        bar.update(1 << 20, state="busy")
        assert bar.line() == "copy  1.0 MiB/4.0 MiB  25%  512.0 KiB/s  ETA 6 s  state busy"
        bar.update(0, state=None)
        assert "state" not in bar.line()


def test_disabled_prints_nothing(clock):
    out = io.StringIO()
    with Progress(2, "x", enabled=False, file=out) as bar:
        clock.now += 100
        bar.update(2)
    assert out.getvalue() == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_live_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    out = Terminal()
    with Progress(3, "train [red]", file=out) as bar:
        for _ in range(3):
            bar.update(loss=1.5)
    text = out.getvalue()
    assert "train [red]" in text and "3/3" in text and "loss 1.5" in text and "\x1b[" in text
    assert text.endswith("\n\x1b[?25h")  # the cursor is back and the line is ended


@pytest.mark.parametrize("terminal", [False, True])
def test_a_patient_bar_shows_only_what_takes_long(clock, monkeypatch, terminal):
    monkeypatch.setenv("TERM", "xterm")
    for seconds in (0.5, 25.0):
        out = Terminal() if terminal else io.StringIO()
        with Progress(2, "restore", patient=True, file=out) as bar:
            clock.now += seconds / 2
            bar.update()
            clock.now += seconds / 2
            bar.update()
        assert ("2/2" in out.getvalue()) == (seconds > 1)
        assert terminal or seconds < 1 or out.getvalue().count("\n") == 3  # at 12.5 s, 25 s, and the end


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    out = Terminal()
    with Progress(1, "x", file=out) as bar:
        bar.update()
    assert "\x1b" not in out.getvalue() and "1/1" in out.getvalue()
