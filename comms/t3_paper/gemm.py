"""One sliced GEMM: how many stages, how long each computes, and what each reads from DRAM (paper sections 2.5 and 6.2).

A stage is one wave of work-groups: all compute units work on one output tile each and end together. Work-groups are
numbered down the columns of a column-major output, as BLAS does, so a sweep over one column of tiles reads all of A
and one panel of B. What of A is still in the last-level cache when the next sweep wants it follows from a cache with
hashed sets and random replacement: a line survives D bytes of other fills with probability exp(-D / capacity). The
output is among those fills in the usual GEMM; T3's outputs bypass the cache, and so its GEMM re-reads less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .hardware import Hardware
from .workloads import SubLayer


@dataclass(frozen=True)
class Gemm:
    """A GEMM cut into stages.

    `stage_reads_bytes` from DRAM per stage, of which the share `exposed` must arrive before a stage can compute;
    `stage_compute_s` is the inner loop's time; `output_bytes` of the whole product; `tiles` may end in a part stage.
    """

    tiles: int
    tiles_per_stage: int
    stage_compute_s: float
    stage_reads_bytes: float
    exposed: float
    output_bytes: float

    @property
    def stages(self) -> int:
        return math.ceil(self.tiles / self.tiles_per_stage)

    @property
    def reads_bytes(self) -> float:
        return self.stages * self.stage_reads_bytes

    @property
    def tile_bytes(self) -> float:
        """Output bytes of a tile, edge tiles averaged in, so that all tiles make exactly the output."""
        return self.output_bytes / self.tiles

    def stage_s(self, dram_bytes_per_s: float) -> float:
        """Time of one stage alone on the GPU: the first load, then the rest of the loads beside the computation."""
        load_s = self.stage_reads_bytes / dram_bytes_per_s
        return self.exposed * load_s + max(self.stage_compute_s, (1 - self.exposed) * load_s)

    def alone_s(self, dram_bytes_per_s: float) -> float:
        """Time of the GEMM alone; each stage's output is written before the next stage's loads are served."""
        return self.stages * self.stage_s(dram_bytes_per_s) + self.output_bytes / dram_bytes_per_s


def sliced_gemm(row: SubLayer, hw: Hardware, *, outputs_bypass: bool) -> Gemm:
    """The stages of `row` on `hw`. `outputs_bypass`: stores go around the last-level cache, as T3's do."""
    tile_rows, tile_cols = math.ceil(row.M / hw.tile_rows), math.ceil(row.N / hw.tile_cols)
    tiles = tile_rows * tile_cols
    compute_s = 2 * hw.tile_rows * hw.tile_cols * row.K / (hw.peak_flops / hw.compute_units * hw.gemm_efficiency)
    reads = dram_reads_bytes(row, hw, outputs_bypass=outputs_bypass)
    return Gemm(
        tiles=tiles,
        tiles_per_stage=hw.compute_units,
        stage_compute_s=compute_s,
        stage_reads_bytes=reads / math.ceil(tiles / hw.compute_units),
        exposed=min(1.0, hw.k_step / row.K),
        output_bytes=row.M * row.N * hw.element_bytes,
    )


def dram_reads_bytes(row: SubLayer, hw: Hardware, *, outputs_bypass: bool) -> float:
    """Bytes of A and B that one GPU reads from DRAM for the product.

    B is read once. A is read once, and again in every further sweep for the share that did not survive in the cache.
    """
    tile_rows, tile_cols = math.ceil(row.M / hw.tile_rows), math.ceil(row.N / hw.tile_cols)
    a_bytes = tile_rows * hw.tile_rows * row.K * hw.element_bytes
    b_panel = hw.tile_cols * row.K * hw.element_bytes
    together = max(tile_rows, hw.compute_units)  # tiles between two uses of a panel of A
    columns = together / tile_rows
    output = 0.0 if outputs_bypass else together * hw.tile_rows * hw.tile_cols * hw.element_bytes
    missed = miss_share(a_bytes, columns * b_panel + output, hw.llc_bytes)
    more_sweeps = max(0.0, tile_cols / columns - 1)
    return tile_cols * b_panel + a_bytes * (1 + more_sweeps * missed)


def miss_share(reused_bytes: float, streamed_bytes: float, capacity_bytes: float) -> float:
    """The share m of cyclically reused bytes that misses: m = 1 - exp(-(m · reused + streamed) / capacity).

    The fills between two uses are the misses among the reused bytes and all streamed ones. The largest root in [0, 1],
    by iteration from above; it is the stable one.
    """
    missed = 1.0
    for _ in range(10_000):
        following = -math.expm1(-(missed * reused_bytes + streamed_bytes) / capacity_bytes)
        if abs(missed - following) < 1e-12:
            return following
        missed = following
    return missed
