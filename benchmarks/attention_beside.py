"""What attention and a merge cost each other when they share one device, at the shapes of a schedule.

An executor computes the next block in one lane while another merges what the last block left: on CUDA two streams, on
a CPU two threads. The merge reads and writes memory and the attention computes, so both can go on at once; how far is
measured here. A few blocks run in a row, alone and with a merge beside each. What they lose by it, per merge, over the
time of a merge alone is the `drag` that the planner and `comms.simulate` ask for; what the merge loses is `stretch`.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from undertow.comms.actions import Compute
from undertow.comms.schedule import Schedule

BLOCKS = 4
MOST_PAIRS = 3  # of one schedule and phase, those that come up most often
QUEUE_CYCLES = 20_000_000  # about 10 ms: all of a run is queued before its first block begins
ATTEND = ("attend", "attend_backward", "attend_joined", "attend_backward_joined")

Call = Callable[[], object]
Placed = tuple[int, Compute]  # rank, action


@dataclass(frozen=True)
class Pair:
    """A block and a merge; ms. `lost_ms`: how much later a block ends for a merge beside it. `priority` of the merge's
    stream (-1 is the higher one; 0 on a CPU)."""

    heads: str
    length: int
    ranks: int
    wire: str
    schedule: str
    phase: str
    attention: str
    merge: str
    priority: int
    attention_ms: float
    merge_ms: float
    lost_ms: float
    beside_ms: float

    @property
    def drag(self) -> float:
        """The share of a merge's time that the attention beside it loses; below 0 only by noise."""
        return self.lost_ms / self.merge_ms

    @property
    def stretch(self) -> float:
        """How much longer a merge takes, waiting for its turn included."""
        return self.beside_ms / self.merge_ms

    def row(self) -> dict[str, Any]:
        return {**asdict(self), "drag": self.drag, "stretch": self.stretch}


def placed_pairs(plan: Schedule, key: Callable[[Placed], Hashable]) -> list[tuple[Placed, Placed]]:
    """(block, merge) as they meet when a rank's merges are dealt to the blocks after its first; the most frequent
    `MOST_PAIRS` that `key` tells apart."""
    seen, first = Counter[Hashable](), {}
    for rank in range(plan.world):
        mine = [a for r, _, _, a in plan.actions() if r == rank and isinstance(a, Compute)]
        blocks = [a for a in mine if a.op in ATTEND]
        sums = [a for a in mine if a.op in ("merge_lse", "add")]
        for at, total in enumerate(sums if len(blocks) > 1 else ()):
            pair = (rank, blocks[1 + at % (len(blocks) - 1)]), (rank, total)
            name = tuple(map(key, pair))
            seen[name] += 1
            first.setdefault(name, pair)
    return [first[name] for name, _ in seen.most_common(MOST_PAIRS)]


def measure(attend: Call, merge: Call, device: torch.device, repeats: int, priority: int = 0) -> dict[str, float]:
    """The four times of a `Pair`, medians over `repeats` of runs that take turns."""
    run = _Streams(device, priority).run if device.type == "cuda" else _threads

    def nothing() -> None:
        pass

    for _ in range(2):
        run(attend, merge)
    alone, lost, merge_ms, beside = [], [], [], []
    for _ in range(repeats):
        only, _ = run(attend, nothing)
        both, slower = run(attend, merge)
        alone.append(only / BLOCKS)
        lost.append((both - only) / BLOCKS)
        beside += slower
        merge_ms += run(nothing, merge)[1]
    names = "attention_ms", "lost_ms", "merge_ms", "beside_ms"
    return dict(zip(names, map(statistics.median, (alone, lost, merge_ms, beside))))


class _Streams:
    """Blocks on the current stream, merges on another one that each may begin with its block."""

    def __init__(self, device: torch.device, priority: int) -> None:
        self.main, self.side = torch.cuda.current_stream(device), torch.cuda.Stream(device, priority=priority)

    def run(self, attend: Call, merge: Call) -> tuple[float, list[float]]:
        """ms until the last block has ended, and of each merge."""

        def mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
            event = torch.cuda.Event(enable_timing=True)
            event.record(stream)
            return event

        self.side.wait_stream(self.main)
        torch.cuda._sleep(QUEUE_CYCLES)
        begin, merges = mark(self.main), list[tuple[torch.cuda.Event, torch.cuda.Event]]()
        for _ in range(BLOCKS):
            self.side.wait_event(mark(self.main))
            attend()
            with torch.cuda.stream(self.side):
                start = mark(self.side)
                merge()
                merges.append((start, mark(self.side)))
        end = mark(self.main)
        end.synchronize()  # these two events alone
        merges[-1][1].synchronize()
        return begin.elapsed_time(end), [start.elapsed_time(stop) for start, stop in merges]


def _threads(attend: Call, merge: Call) -> tuple[float, list[float]]:
    def timed() -> float:
        start = time.perf_counter()
        merge()
        return (time.perf_counter() - start) * 1e3

    with ThreadPoolExecutor(1) as other:
        start, merges = time.perf_counter(), []
        for _ in range(BLOCKS):
            merges.append(other.submit(timed))
            attend()
        blocks_ms = (time.perf_counter() - start) * 1e3
        return blocks_ms, [done.result() for done in merges]


def table(pairs: Sequence[Pair]) -> Table:
    shown = Table(title="a merge beside attention, on one device (measured)")
    words = "wire", "schedule", "phase", "block", "merge"
    for name in ("heads", "tokens", "P", *words, "priority", "block ms", "merge ms", "lost ms", "drag", "stretch"):
        shown.add_column(name, justify="left" if name in words else "right")
    for p in pairs:
        numbers = f"{p.attention_ms:.3f}", f"{p.merge_ms:.3f}", f"{p.lost_ms:.3f}", f"{p.drag:.2f}", f"{p.stretch:.2f}"
        words = p.heads, str(p.length), str(p.ranks), p.wire, p.schedule, p.phase, p.attention, p.merge
        shown.add_row(*words, str(p.priority), *numbers)
    return shown


def summary(pairs: Sequence[Pair]) -> str:
    drags, stretches = [p.drag for p in pairs], [p.stretch for p in pairs]
    return (
        f"drag: median {statistics.median(drags):.2f}, {min(drags):.2f} to {max(drags):.2f}; merges beside attention "
        f"take {statistics.median(stretches):.1f} times as long, {min(stretches):.1f} to {max(stretches):.1f}"
    )
