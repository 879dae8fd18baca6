"""What a run folder tells, read once into one frozen value: configuration, steps, saves, memory, timeline, checkpoints.

Everything is optional but the folder: a run that was killed, or that has just begun, has a report too, and what is
missing is named in it. Times are seconds since the run's first event; ranks that were restarted keep their starts.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpointing.catalogue import Entry, entries
from ..dist.errors import UserError
from ..dist.trace_read import FILE_PATTERN, merge, read_attempts


@dataclass(frozen=True)
class Span:
    """Something a rank did. `lane` is the thread; `killed`: it never ended."""

    name: str
    lane: str
    rank: int
    begin_s: float
    seconds: float
    killed: bool = False
    step: int | None = None


@dataclass(frozen=True)
class RunData:
    """`memory`: name of a series → [(seconds, bytes)], by rank. `stalls`: step → milliseconds that a save blocked
    training on the slowest rank. `starts`: rank → when each of its starts began, in seconds. `missing`: what the
    folder does not hold."""

    folder: Path
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    steps: tuple[Mapping[str, Any], ...]
    evaluations: tuple[Mapping[str, Any], ...]
    spans: tuple[Span, ...]
    stalls: Mapping[int, float]
    failed_saves: tuple[int, ...]
    memory: Mapping[str, tuple[tuple[float, float], ...]]
    checkpoints: tuple[Entry, ...]
    starts: Mapping[int, tuple[float, ...]]
    missing: tuple[str, ...]

    def spans_of_start(self, index: int) -> tuple[Span, ...]:
        """The spans of every rank's start `index`; negative ones count from the last."""

        def within(span: Span) -> bool:
            begins = self.starts.get(span.rank, ())
            at = index % len(begins) if begins else 0
            after = begins[at + 1] if at + 1 < len(begins) else float("inf")
            return not begins or begins[at] <= span.begin_s < after

        return tuple(filter(within, self.spans))

    @property
    def resumed_at(self) -> tuple[int, ...]:
        """The first step of each start after the first, where it came as far as a step."""
        counts = range(1, max(map(len, self.starts.values()), default=0))
        steps = ([s.step for s in self.spans_of_start(k) if s.name == "step" and s.step is not None] for k in counts)
        return tuple(min(found) for found in steps if found)


def read_run(folder: Path) -> RunData:
    """`UserError` when `folder` is no run's."""
    known = ("metrics.jsonl", "config.json", "trace", "checkpoints")
    if not any((folder / name).exists() for name in known):
        inside = sorted(path.parent for path in folder.glob("*/config.json"))
        raise UserError(
            f"{folder} is not a run's folder",
            expected=f"a folder that holds {', '.join(known)}",
            remedy=f"undertow report {inside[0]}" if inside else "",
        )
    missing = [name for name in (*known, "result.json") if not (folder / name).exists()]
    lines = list(_lines(folder / "metrics.jsonl"))
    events = _events(folder / "trace")
    spans = tuple(_spans(events))
    reports = [event for event in events if event["ph"] in "iI" and event["name"] == "report"]
    memory = _memory(events)
    if not memory:
        missing.append("memory (trace counters named 'memory')")
    found = tuple(entries(folder / "checkpoints")) if (folder / "checkpoints").is_dir() else ()
    return RunData(
        folder=folder,
        config=_json(folder / "config.json"),
        result=_json(folder / "result.json"),
        steps=tuple(line for line in lines if "loss" in line),
        evaluations=tuple(line for line in lines if "bits_per_byte" in line),
        spans=spans,
        stalls=_stalls(reports, spans),
        failed_saves=tuple(sorted({event["args"]["step"] for event in reports if not event["args"]["ok"]})),
        memory=memory,
        checkpoints=found,
        starts=_starts(folder / "trace"),
        missing=tuple(missing),
    )


def _json(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error})", expected="the JSON that the run wrote") from error


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines; one torn by a kill is left out."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and "step" in found:
            yield found


def _events(folder: Path) -> list[dict[str, Any]]:
    """All ranks' events on one clock, in microseconds since the first; empty when nothing was traced."""
    if not list(folder.glob(FILE_PATTERN)):
        return []
    with tempfile.TemporaryDirectory(prefix="undertow-report-") as scratch:
        merged = Path(scratch) / "trace.json"
        merge(folder, merged)
        return json.loads(merged.read_text())["traceEvents"]


def _starts(folder: Path) -> dict[int, tuple[float, ...]]:
    """When each start of each rank began, on the clock of `_events`: the first event of the run is 0."""
    began: dict[int, list[float]] = {}
    for path in sorted(folder.glob(FILE_PATTERN)):
        for attempt in read_attempts(path):
            if attempt.events:
                began.setdefault(attempt.rank, []).append(attempt.epoch_s + attempt.events[0]["ts"] / 1e6)
    zero_s = min((min(times) for times in began.values()), default=0.0)
    return {rank: tuple(time_s - zero_s - 1e-6 for time_s in times) for rank, times in sorted(began.items())}


def _spans(events: list[dict[str, Any]]) -> Iterator[Span]:
    lanes = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    opened: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for event in events:
        stack = opened.setdefault((event["pid"], event["tid"], event["name"]), [])
        if event["ph"] == "B":
            stack.append(event)
        elif event["ph"] == "E" and stack:
            begun = stack.pop()
            yield Span(
                name=event["name"],
                lane=lanes.get((event["pid"], event["tid"]), str(event["tid"])),
                rank=event["pid"],
                begin_s=begun["ts"] / 1e6,
                seconds=max(0.0, event["ts"] - begun["ts"]) / 1e6,
                killed=bool(event.get("args", {}).get("killed")),
                step=begun.get("args", {}).get("step"),
            )


def _stalls(reports: list[dict[str, Any]], spans: tuple[Span, ...]) -> dict[int, float]:
    """From the saves' own reports where the run ended well; otherwise from the spans that block training."""
    found: dict[int, float] = {}
    for event in reports:
        step = event["args"]["step"]
        found[step] = max(found.get(step, 0.0), event["args"]["stall_ms"])
    by_rank: dict[tuple[int, int], float] = {}
    for span in spans:
        if span.name in ("snapshot", "fence") and span.step is not None and not span.killed:
            key = (span.step, span.rank)
            by_rank[key] = by_rank.get(key, 0.0) + 1e3 * span.seconds
    for (step, _), stall_ms in by_rank.items():
        if not any(event["args"]["step"] == step for event in reports):
            found[step] = max(found.get(step, 0.0), stall_ms)
    return dict(sorted(found.items()))


def _memory(events: list[dict[str, Any]]) -> dict[str, tuple[tuple[float, float], ...]]:
    series: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "C" and event["name"] == "memory":
            for name, value in event["args"].items():
                series.setdefault(f"rank {event['pid']}: {name}", []).append((event["ts"] / 1e6, float(value)))
    return {name: tuple(points) for name, points in series.items()}
