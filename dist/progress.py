"""A progress bar that also reads well in a log file.

On a terminal: one live line with bar, count, rate, time left and free-form fields (rich). Anywhere else (a Slurm log, a
pipe): one plain line about every ten seconds and one at the end, so that a log of a day stays short. Lines are written
from `update` itself; there is no thread, and a disabled bar (every rank but 0) costs one test.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, Task, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from .units import format_bytes, format_count, format_seconds

_WINDOW_S = 60.0  # the rate and the time left follow the last minute
_SHORT_S = 1.0  # what takes less needs no bar


class Progress:
    """`with Progress(total, "train", enabled=rank == 0) as bar: bar.update(loss=2.31, checkpoint="saved 12")`.

    `total` None: the length is not known. `initial`: where a resumed run begins (not counted in the rate). `unit` names
    what is counted; 'B' formats it as bytes. `file` defaults to stderr. Fields given to `update` stay until replaced;
    None removes one; a name that ends in `_per_s` is shown as a rate. `patient`: of what is over within a second (on a
    terminal) or `interval_s` (elsewhere) nothing is shown.
    """

    def __init__(
        self,
        total: int | None,
        description: str = "",
        enabled: bool = True,
        *,
        unit: str = "step",
        initial: int = 0,
        interval_s: float = 10.0,
        patient: bool = False,
        file: IO[str] | None = None,
    ) -> None:
        self.total, self.description, self.unit, self.done = total, description, unit, initial
        self.fields: dict[str, Any] = {}
        self._enabled, self._interval_s, self._patient = enabled, interval_s, patient
        self._file: IO[str] = sys.stderr if file is None else file
        self._marks: deque[tuple[float, int]] = deque()
        self._rich: RichProgress | None = None
        self._task = TaskID(0)
        self._printed_s = self._started_s = time.monotonic()

    def __enter__(self) -> Progress:
        self._printed_s = self._started_s = time.monotonic()
        self._marks.append((self._started_s, self.done))
        if self._enabled and self._file.isatty() and os.environ.get("TERM", "") != "dumb":
            console = Console(file=self._file)
            self._rich = RichProgress(
                TextColumn("{task.description}", markup=False, table_column=Column(min_width=len(self.description))),
                BarColumn(bar_width=24 if console.width > 120 else 10),
                _TailColumn(self),
                console=console,
            )
            self._task = self._rich.add_task(self.description, total=self.total, completed=self.done)
            if not self._patient:
                self._rich.start()
        return self

    def update(self, advance: int = 1, **fields: Any) -> None:
        """Count `advance` more, and show `fields` (plain numbers or text)."""
        if not self._enabled:
            return
        self.done += advance
        self.fields.update(fields)
        now_s = time.monotonic()
        if not self._marks or now_s - self._marks[-1][0] > 0.5:
            self._marks.append((now_s, self.done))
        while len(self._marks) > 2 and now_s - self._marks[0][0] > _WINDOW_S:
            self._marks.popleft()
        if self._rich is not None:
            self._rich.update(self._task, completed=self.done)
            if now_s - self._started_s > _SHORT_S:
                self._rich.start()
        elif now_s - self._printed_s >= self._interval_s:
            self._printed_s = now_s
            self._print(self.line())

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if not self._enabled:
            return
        if self._rich is not None:
            self._rich.stop()
            self._rich = None
        elif not self._patient or self._printed_s > self._started_s:
            took = format_seconds(time.monotonic() - self._started_s)
            ended = "stopped" if kind or (self.total is not None and self.done < self.total) else "done"
            self._print(f"{self.line(eta=False)}  {ended} after {took}")

    def rate(self) -> float:
        """Units per second over the last minute; 0 before anything is known."""
        if not self._marks:
            return 0.0
        then_s, before = self._marks[0]
        elapsed_s = time.monotonic() - then_s
        return (self.done - before) / elapsed_s if elapsed_s > 0 else 0.0

    def line(self, *, eta: bool = True) -> str:
        """The plain line: description, count, rate, time left, fields."""
        return f"{self.description}  {self.tail(eta=eta)}".strip()

    def tail(self, *, eta: bool = True) -> str:
        rate = self.rate()
        parts = [self._count()]
        if self.total:
            parts.append(f"{100 * self.done / self.total:.0f}%")
        if rate > 0:
            parts.append(f"{format_bytes(rate)}/s" if self.unit == "B" else format_count(rate, f"{self.unit}/s"))
            if eta and self.total and self.done < self.total:
                parts.append(f"ETA {format_seconds(round((self.total - self.done) / rate))}")
        parts += [_field(name, value) for name, value in self.fields.items() if value is not None]
        return "  ".join(parts)

    def _count(self) -> str:
        show = format_bytes if self.unit == "B" else str
        return show(self.done) if self.total is None else f"{show(self.done)}/{show(self.total)}"

    def _print(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()


class _TailColumn(TextColumn):
    """Everything right of the bar, recomputed at each refresh."""

    def __init__(self, progress: Progress) -> None:
        super().__init__("")
        self._progress = progress

    def render(self, task: Task) -> Text:
        return Text(self._progress.tail())


def _field(name: str, value: Any) -> str:
    """loss=2.3456 → 'loss 2.346'; tokens_per_s=12345.0 → '12.3k tokens/s'; checkpoint='saved 12' → as it is."""
    if name.endswith("_per_s") and isinstance(value, (int, float)):
        return format_count(value, f"{name.removesuffix('_per_s')}/s")
    label = name.replace("_", " ")
    return f"{label} {value:.4g}" if isinstance(value, float) else f"{label} {value}"
