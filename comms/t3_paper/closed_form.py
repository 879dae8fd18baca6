"""The same quantities by algebra, without events: what the simulation must give where nothing contends.

Bytes are exact for every configuration. Times are exact for the sequential configuration, and for T3 when memory is
free (no contention); the formula there says which of two limits holds, the GEMM's stages or the link. Written
independently of `ring.py` and `collectives.py`, and compared with them in the tests and in the table.
"""

from __future__ import annotations

import math

from .gemm import Gemm
from .hardware import Hardware

CHUNKS = {
    # DRAM bytes of one GPU in chunks (output / p), as functions of p: (reads, writes) per part
    "sequential": {
        "gemm": lambda p: (0, p),
        "rs": lambda p: (2 * p - 1, p),  # first send 1, each further send 2, last sum 2; p - 1 arrivals and one result
        "ag": lambda p: (p - 1, p - 1),
    },
    "t3": {
        "gemm": lambda p: (0, p - 1),  # the first position is stored on the neighbour
        "rs": lambda p: (p - 2, p - 1),  # DMA reads of all positions but the first and the last; updates that arrive
        "ag": lambda p: (p - 1, p - 1),
    },
}


def traffic_bytes(config: str, chunk_bytes: float, world: int, gemm_reads_bytes: float) -> dict[str, float]:
    """DRAM bytes by kind for 'sequential' or 't3'; GEMM reads come from the cache model."""
    found = {"gemm_reads": gemm_reads_bytes}
    for part, count in CHUNKS[config].items():
        reads, writes = count(world)
        found[f"{part}_reads"] = found.get(f"{part}_reads", 0.0) + reads * chunk_bytes
        found[f"{part}_writes"] = writes * chunk_bytes
    return found


def reduce_scatter_s(chunk_bytes: float, world: int, hw: Hardware) -> float:
    last_sum_s = 3 * chunk_bytes / (hw.reduce_efficiency * hw.dram_bytes_per_s)
    return all_gather_s(chunk_bytes, world, hw) + last_sum_s


def all_gather_s(chunk_bytes: float, world: int, hw: Hardware) -> float:
    return (world - 1) * (chunk_bytes / hw.link_bytes_per_s + hw.link_latency_s)


def sequential_s(gemm: Gemm, world: int, hw: Hardware) -> float:
    chunk = gemm.output_bytes / world
    gemm_s = gemm.alone_s(hw.dram_bytes_per_s)
    return gemm_s + reduce_scatter_s(chunk, world, hw) + all_gather_s(chunk, world, hw)


def fused_s(gemm: Gemm, world: int, hw: Hardware) -> float:
    """T3's GEMM and reduce-scatter without contention.

    Bytes made in stage w cannot leave before its end, and all that is made from then on must still pass the link, so
    the time is the maximum over w of (end of stage w + bytes from w on / link). Between the stages where the local
    stores begin and where the bytes to send end, both terms are linear in w: only the ends of those intervals count.
    Valid while a chunk takes the link longer than one piece takes to be read, sent and added.
    """
    chunk = gemm.output_bytes / world
    stage_bytes = gemm.tiles_per_stage * gemm.tile_bytes
    update_s = hw.update_cost / hw.dram_bytes_per_s

    def end_s(stage: int) -> float:
        stored = max(0.0, min(stage * stage_bytes, gemm.output_bytes) - chunk)
        return (stage + 1) * gemm.stage_s(hw.dram_bytes_per_s) + stored * update_s

    to_send = gemm.output_bytes - chunk
    last = math.ceil(to_send / stage_bytes) - 1
    turn = chunk / stage_bytes
    stages = {0, min(math.floor(turn), last), min(math.ceil(turn), last), last}
    left_s = max(end_s(w) + (to_send - w * stage_bytes) / hw.link_bytes_per_s for w in stages)
    reduced_s = left_s + hw.link_latency_s
    final = gemm.stages - 1
    final_bytes = gemm.output_bytes - max(final * stage_bytes, chunk)
    return max(reduced_s, end_s(final) + final_bytes * update_s)
