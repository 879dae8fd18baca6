"""Reading traces back: join the files of all ranks into one, and find the spans that a kill left open.

A file may end in half a line (its process was killed), and may hold several *attempts* one after another (its rank was
restarted). Each attempt begins with a start event and has its own clock, so everything here works attempt by attempt:
times move to rank 0's wall clock by the last `epoch_s` the attempt recorded, and a span that its attempt never ended
is closed at the attempt's last event, marked `killed`, so that the next attempt does not appear inside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError

FILE_PATTERN = "trace-*.json"
START, CLOCK = "undertow_start", "undertow_clock"  # names of the two metadata events that `Trace` adds

Event = dict[str, Any]


@dataclass(frozen=True)
class OpenSpan:
    """A span that began and never ended. `begin_s` is rank 0's wall clock; `attempt` counts from 0 within the file."""

    name: str
    lane: str
    rank: int
    begin_s: float
    attempt: int
    args: dict[str, Any]


@dataclass
class Attempt:
    """The events of one process in a trace file; `epoch_s` moves its monotonic clock to rank 0's wall clock."""

    rank: int = 0
    epoch_s: float = 0.0
    os_pid: int = 0
    lanes: dict[int, str] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    @property
    def last_us(self) -> float:
        return max((event["ts"] for event in self.events), default=0.0)

    def unended(self) -> list[Event]:
        """The `B` events without an `E`, by begin time; an `E` ends the newest `B` of its lane and name."""
        stacks: dict[tuple[int, str], list[Event]] = {}
        for event in self.events:
            stack = stacks.setdefault((event["tid"], event["name"]), [])
            if event["ph"] == "B":
                stack.append(event)
            elif event["ph"] == "E" and stack:
                stack.pop()
        return sorted((event for stack in stacks.values() for event in stack), key=lambda event: event["ts"])


def read_attempts(path: Path | str) -> list[Attempt]:
    """All attempts in a rank's file, in order. Lines that are not whole events are left out."""
    attempts: list[Attempt] = []
    for event in _lines(Path(path)):
        if event["ph"] == "M" and event["name"] == START:
            attempts.append(Attempt(rank=event["pid"], os_pid=event["args"]["os_pid"]))
        elif not attempts:
            attempts.append(Attempt(rank=event["pid"]))  # the start event itself was torn
        attempt = attempts[-1]
        if event["ph"] != "M":
            attempt.events.append(event)
        elif event["name"] == CLOCK:
            attempt.epoch_s = event["args"]["epoch_s"]
        elif event["name"] == "thread_name":
            attempt.lanes[event["tid"]] = event["args"]["name"]
    return attempts


def open_spans(path: Path | str) -> list[OpenSpan]:
    """Spans of a rank's file that were begun and never ended, of all attempts, in order."""
    return [
        OpenSpan(
            name=event["name"],
            lane=attempt.lanes.get(event["tid"], str(event["tid"])),
            rank=attempt.rank,
            begin_s=attempt.epoch_s + event["ts"] / 1e6,
            attempt=index,
            args=event.get("args", {}),
        )
        for index, attempt in enumerate(read_attempts(path))
        for event in attempt.unended()
    ]


def merge(source: Path | str | Iterable[Path | str], output: Path | str) -> int:
    """Join trace files (a folder, or the files themselves) into one valid JSON file; return the number of events.

    Time 0 is the first event of the run. The file appears whole or not at all. `UserError` when there is no trace.
    """
    files = _files(source)
    attempts = [attempt for path in files for attempt in read_attempts(path)]
    zero_us = min((a.epoch_s * 1e6 + event["ts"] for a in attempts for event in a.events[:1]), default=0.0)
    tids: dict[str, int] = {}
    merged: list[Event] = []
    for rank in sorted({attempt.rank for attempt in attempts}):
        merged.append({"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}})
        merged.append({"ph": "M", "name": "process_sort_index", "pid": rank, "tid": 0, "args": {"sort_index": rank}})
        mine = [attempt for attempt in attempts if attempt.rank == rank]
        for lane in dict.fromkeys(lane for attempt in mine for lane in attempt.lanes.values()):
            tid = tids.setdefault(lane, len(tids) + 1)
            merged.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": tid, "args": {"name": lane}})
        for attempt in mine:
            shift_us = attempt.epoch_s * 1e6 - zero_us
            merged.extend(_moved(attempt, shift_us, tids))
    output = Path(output)
    scratch = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("w") as file:
            file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
            file.write(",\n".join(json.dumps(event) for event in merged))
            file.write("\n]}\n")
        scratch.replace(output)
    finally:
        scratch.unlink(missing_ok=True)
    return len(merged)


def _moved(attempt: Attempt, shift_us: float, tids: dict[str, int]) -> Iterator[Event]:
    def move(event: Event, **changes: Any) -> Event:
        lane = attempt.lanes.get(event["tid"])
        tid = event["tid"] if lane is None else tids[lane]
        return {**event, "tid": tid, "ts": round(event["ts"] + shift_us, 3), **changes}

    for event in attempt.events:
        yield move(event)
    end_us = round(attempt.last_us + shift_us, 3)
    for event in reversed(attempt.unended()):
        yield move(event, ph="E", ts=end_us, args={"killed": True})


def _files(source: Path | str | Iterable[Path | str]) -> list[Path]:
    if isinstance(source, (str, Path)):
        folder = Path(source)
        files = sorted(folder.glob(FILE_PATTERN)) if folder.is_dir() else [folder]
    else:
        files = [Path(path) for path in source]
    missing = [str(path) for path in files if not path.is_file()]
    if missing or not files:
        raise UserError(
            f"no trace at {', '.join(missing) or source}",
            expected=f"a folder with files named {FILE_PATTERN}, or such files",
        )
    return files


def _lines(path: Path) -> Iterator[Event]:
    with path.open("rb") as file:
        for line in file:
            try:
                event = json.loads(line.strip().rstrip(b","))
            except ValueError:  # the opening bracket, or a line that a kill tore
                continue
            if isinstance(event, dict) and {"ph", "name", "pid", "tid", "ts"} <= event.keys():
                yield event
