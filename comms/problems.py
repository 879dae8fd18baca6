"""Faults of a schedule, as data: each with a fixed word for programs, and the place for people.

They are collected, not raised one by one, because the author of a builder wants to see all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..dist.errors import UserError
from .schedule import Schedule


@dataclass(frozen=True)
class Problem:
    """One fault. `kind` is a fixed word for programs; the rest says where (`index` -1: not at an action)."""

    kind: str
    text: str
    rank: int = -1
    lane: str = ""
    index: int = -1
    action: str = ""
    value: str = ""

    def __str__(self) -> str:
        where = [f"rank {self.rank}"] if self.rank >= 0 else []
        where += [f"lane {self.lane}"] if self.lane else []
        where += [f"action {self.index} `{self.action}`"] if self.index >= 0 else []
        where += [f"value {self.value}"] if self.value else []
        return f"{self.kind}: {', '.join(where)}{': ' if where else ''}{self.text}"


class ScheduleError(UserError):
    """A schedule that cannot be run as it stands. `kind` is the first problem's; `problems` holds all."""

    def __init__(self, schedule: Schedule, problems: tuple[Problem, ...]) -> None:
        self.problems, self.kind = problems, problems[0].kind
        shown = "\n  ".join(map(str, problems[:8]))
        rest = f"\n  … and {len(problems) - 8} more" if len(problems) > 8 else ""
        super().__init__(f"schedule {schedule.name} is wrong in {len(problems)} way(s):\n  {shown}{rest}")

    def __reduce__(self):
        return UserError, (self.problem,)
