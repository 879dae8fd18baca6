"""What a save will cost, before it is made: blocked time, time to durable, and how often the disk can take one.

The copy of the lazy bytes hides beneath the time from the call to the optimizer's first write (`window_s`); only what
does not fit into it blocks, and only what does not fit into the arena waits for the disk (design: DataStates-LLM,
section 4); what is parked on the device does neither. What hides is not free: it reads the device's memory beside
kernels that want all of its rate, and takes its bytes' share of that (a bare copy beside training cost as much). All
rates come from a measured `Machine`; one that was not measured leaves its answer out rather than guess, but for that
small share.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..dist.machine import Machine
from ..dist.units import format_bytes, format_seconds


@dataclass(frozen=True)
class Prediction:
    """Of one save of `nbytes` on one rank, seconds; None where a rate is missing. `interval_s`: the shortest time
    between two saves that the disk sustains."""

    nbytes: int
    copy_s: float | None
    stall_s: float | None
    durable_s: float | None
    interval_s: float | None

    def __str__(self) -> str:
        def show(value: float | None) -> str:
            return "unknown (not measured by `undertow probe`)" if value is None else format_seconds(value)

        return (
            f"{format_bytes(self.nbytes)}: copy {show(self.copy_s)}, stall {show(self.stall_s)}, "
            f"durable after {show(self.durable_s)}, at most every {show(self.interval_s)}"
        )


def predict(
    nbytes: int, machine: Machine, *, cuda: bool, window_s: float = 0.0, arena_bytes: int | None = None,
    eager_bytes: int = 0, parked_bytes: int = 0, ranks_per_disk: int = 1
) -> Prediction:  # fmt: skip
    """The cost of a save of `nbytes`, of which `eager_bytes` are copied inside the call, and `parked_bytes` may leave
    after the optimizer's first write, `window_s` after the call. `arena_bytes`: default all of it. `ranks_per_disk`
    share one disk's rate."""
    copy_rate = machine.copies.get("d2h_pinned" if cuda else "host_one_thread")
    disk_rate = machine.disks.get("write_direct", machine.disks.get("write_buffered"))
    copy_s = None if copy_rate is None else nbytes / copy_rate
    write_s = None if disk_rate is None else nbytes * ranks_per_disk / disk_rate
    # 'd2d' counts a byte once that it reads and writes
    beside_s = (nbytes / 2 + parked_bytes) / machine.copies["d2d"] if cuda and "d2d" in machine.copies else 0.0
    stall_s = None
    if copy_rate is not None:
        eager_s = eager_bytes / copy_rate
        filled_s = (nbytes - eager_bytes - parked_bytes) / copy_rate
        held_bytes = None if arena_bytes is None else arena_bytes + parked_bytes
        if held_bytes is not None and held_bytes < nbytes:  # the rest waits until the disk has made room
            filled_s = None if write_s is None else max(filled_s, write_s * (1 - held_bytes / nbytes))
        late_s = None if filled_s is None else max(0.0, filled_s - window_s)
        stall_s = None if late_s is None else eager_s + late_s + beside_s
    durable_s = None if copy_s is None or write_s is None else max(copy_s, write_s)
    return Prediction(nbytes, copy_s, stall_s, durable_s, write_s)
