"""The collectives that run alone: the usual ring reduce-scatter by a kernel on the compute units, and the all-gather.

In step k a GPU sends a chunk and receives another; from the second step on it sends the sum of what came and its own
part, reading both. A kernel reads, adds and sends in one pass, so a step takes the link's time; only the last sum,
which goes nowhere, takes memory time of its own. That is the part which near-memory reduction saves (section 6.1.1).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .clock import Clock
from .hardware import Hardware


@dataclass
class Collective:
    """`seconds` from start to end; `moved_bytes` of one GPU's DRAM under 'reads' and 'writes'."""

    seconds: float = 0.0
    moved_bytes: dict[str, float] = field(default_factory=lambda: {"reads": 0.0, "writes": 0.0})


def reduce_scatter(chunk_bytes: float, world: int, hw: Hardware) -> Collective:
    """The baseline's reduce-scatter; one GPU of the symmetric ring, `chunk_bytes` = output / world."""
    clock, result = Clock(), Collective()

    def send(step: int) -> None:
        result.moved_bytes["reads"] += chunk_bytes if step == 0 else 2 * chunk_bytes
        clock.after(chunk_bytes / hw.link_bytes_per_s + hw.link_latency_s, lambda: receive(step))

    def receive(step: int) -> None:
        result.moved_bytes["writes"] += chunk_bytes
        if step + 1 < world - 1:
            send(step + 1)
            return
        result.moved_bytes["reads"] += 2 * chunk_bytes
        result.moved_bytes["writes"] += chunk_bytes
        clock.after(3 * chunk_bytes / (hw.reduce_efficiency * hw.dram_bytes_per_s), lambda: None)

    send(0)
    clock.run()
    result.seconds = clock.now_s
    return result


def all_gather(chunk_bytes: float, world: int, hw: Hardware) -> Collective:
    """Ring all-gather: every step passes on the chunk that came in the step before."""
    clock, result = Clock(), Collective()

    def send(step: int) -> None:
        result.moved_bytes["reads"] += chunk_bytes
        clock.after(chunk_bytes / hw.link_bytes_per_s + hw.link_latency_s, lambda: receive(step))

    def receive(step: int) -> None:
        result.moved_bytes["writes"] += chunk_bytes
        if step + 1 < world - 1:
            send(step + 1)

    send(0)
    clock.run()
    result.seconds = clock.now_s
    return result
