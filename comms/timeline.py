"""What happened when, on which lane: the frozen result of a simulation, and its table and JSON.

Times are seconds from the start of the schedule. A `Timeline` says itself that it is modelled, and on which machine, so
that none of its numbers can be taken for a measurement.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from ..dist.units import format_bytes, format_seconds


@dataclass(frozen=True)
class Span:
    """One action: `label` in full, `brief` for a table.

    `reached_s`: its turn in the lane came; `start_s`: it began to compute or to move bytes.
    """

    rank: int
    lane: str
    index: int
    kind: str
    label: str
    brief: str
    reached_s: float
    start_s: float
    finish_s: float
    nbytes: int = 0

    @property
    def seconds(self) -> float:
        return self.finish_s - self.start_s


@dataclass(frozen=True)
class Use:
    """How much one resource of the network carried, and for how long it was not idle."""

    resource: str
    nbytes: float
    busy_s: float


@dataclass(frozen=True)
class Timeline:
    """A modelled run of a schedule. `spans` are ordered by rank, lane and index."""

    schedule: str
    world: int
    machine: str
    makespan_s: float
    spans: tuple[Span, ...]
    uses: tuple[Use, ...]

    def lanes(self) -> dict[tuple[int, str], list[Span]]:
        """Spans by (rank, lane)."""
        found: dict[tuple[int, str], list[Span]] = {}
        for span in self.spans:
            found.setdefault((span.rank, span.lane), []).append(span)
        return found

    def dump(self, path: Path) -> None:
        """Write all of it as JSON, with `"modelled": true`."""
        path.write_text(json.dumps({"modelled": True, **asdict(self)}, indent=1) + "\n")

    def title(self) -> str:
        where = f"modelled on machine '{self.machine}'"
        return f"{self.schedule}, {self.world} ranks, {where}: {format_seconds(self.makespan_s)}"


def span_table(timeline: Timeline, ranks: Iterable[int]) -> Table:
    """Every action of the given ranks, in the order of time."""
    table = Table(title=timeline.title(), title_justify="left")
    for name in ("rank", "lane", "action"):
        table.add_column(name, justify="right" if name == "rank" else "left", no_wrap=True)
    for name in ("bytes", "start", "end", "takes", "waited"):
        table.add_column(name, justify="right", no_wrap=True)
    chosen = set(ranks)
    for span in sorted((s for s in timeline.spans if s.rank in chosen), key=lambda s: (s.rank, s.start_s, s.finish_s)):
        table.add_row(
            str(span.rank),
            span.lane,
            span.brief,
            format_bytes(span.nbytes) if span.kind in ("send", "recv") else "",
            *(format_seconds(t) for t in (span.start_s, span.finish_s, span.seconds, span.start_s - span.reached_s)),
        )
    return table


def lane_table(timeline: Timeline) -> Table:
    """One row per lane: how long it works, and how much it moves."""
    table = Table(title="lanes (modelled)", title_justify="left")
    for name in ("rank", "lane", "actions", "bytes", "busy", "share of the whole"):
        table.add_column(name, justify="left" if name == "lane" else "right")
    for (rank, lane), spans in timeline.lanes().items():
        busy_s = sum(span.seconds for span in spans)
        moved = sum(span.nbytes for span in spans)
        share = f"{busy_s / timeline.makespan_s:.0%}" if timeline.makespan_s else ""
        table.add_row(
            str(rank), lane, str(len(spans)), format_bytes(moved) if moved else "", format_seconds(busy_s), share
        )
    return table
