"""A run's journal: a line for each update, written as it happens, so that a killed process leaves its trajectory.

A run that is resumed, or rolls back, repeats updates: the last line of a step is the one that counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType

JOURNAL = "metrics.jsonl"


class Journal:
    """Appends to `path`, or with None does nothing (ranks other than 0)."""

    def __init__(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = None if path is None else path.open("a", buffering=1)
        if self._file is not None and self._file.tell():
            self._file.write("\n")  # the last process may have been killed inside a line

    def __call__(self, step: int, loss: float) -> None:
        """`step`: updates done before this one."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, "loss": loss}) + "\n")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()


def rows(path: Path) -> list[tuple[int, float]]:
    """Step and loss of each update in the order they were made, repeated ones too; without torn lines."""
    found: list[tuple[int, float]] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # torn by a kill: the step is repeated
        if isinstance(row, dict):
            found.append((row["step"], row["loss"]))
    return found


def trajectory(path: Path) -> dict[int, float]:
    """The loss of each step, as the last one who computed it wrote it down."""
    return dict(rows(path))
