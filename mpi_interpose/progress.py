"""A bar for work that turns out to take long: nothing is shown in the first two seconds, or without a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

AFTER_S = 2.0


@contextmanager
def units_done(title: str, after_s: float = AFTER_S) -> Iterator[Callable[[int, int], None]]:
    """Gives a function to call with (ready, total); on stderr a bar with the time left, from `after_s` on."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(title, total=None)
    began = time.monotonic()

    def done(ready: int, total: int) -> None:
        bar.update(task, completed=ready, total=total)
        if console.is_terminal and not bar.live.is_started and time.monotonic() - began >= after_s:
            bar.start()

    try:
        yield done
    finally:
        bar.stop()
