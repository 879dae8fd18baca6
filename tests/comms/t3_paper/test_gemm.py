"""Stages and the cache model at their limits, where the answer is known."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from undertow.comms.t3_paper.gemm import dram_reads_bytes, miss_share, sliced_gemm
from undertow.comms.t3_paper.hardware import Hardware
from undertow.comms.t3_paper.workloads import SubLayer

GPU = Hardware()
ROW = SubLayer("any", 8, "any", M=2048, N=1024, K=512)  # 16 x 8 tiles: 128 tiles on 80 units are two stages


def test_stages_are_waves_of_tiles_and_a_part_wave_is_a_whole_stage():
    gemm = sliced_gemm(ROW, GPU, outputs_bypass=True)
    assert (gemm.tiles, gemm.stages) == (128, 2)
    assert gemm.tile_bytes * gemm.tiles == gemm.output_bytes == 2048 * 1024 * 2
    assert gemm.stage_compute_s == pytest.approx(2 * 128 * 128 * 512 / (1.4e9 * 1024 * GPU.gemm_efficiency))


def test_edge_tiles_count_as_tiles_but_make_no_bytes_beyond_the_output():
    gemm = sliced_gemm(replace(ROW, M=2049, N=1025), GPU, outputs_bypass=True)
    assert gemm.tiles == 17 * 9
    assert gemm.tile_bytes * gemm.tiles == pytest.approx(2049 * 1025 * 2)


def test_an_endless_cache_reads_each_input_once():
    once = (2048 + 1024) * 512 * 2
    assert dram_reads_bytes(ROW, replace(GPU, llc_bytes=1e15), outputs_bypass=False) == pytest.approx(once)


def test_no_cache_reads_a_again_for_every_sweep():
    # Five columns of tiles go on at once (80 units, 16 rows of tiles), so A is swept 8 / 5 times.
    reads = 1024 * 512 * 2 + 2048 * 512 * 2 * 8 / 5
    assert dram_reads_bytes(ROW, replace(GPU, llc_bytes=1.0), outputs_bypass=False) == pytest.approx(reads)


def test_outputs_that_bypass_the_cache_never_add_reads(seed):
    rng = random.Random(seed)
    for _ in range(200):
        row = SubLayer("any", 2, "any", rng.randint(1, 20000), rng.randint(1, 20000), rng.randint(1, 4000))
        assert dram_reads_bytes(row, GPU, outputs_bypass=True) <= dram_reads_bytes(row, GPU, outputs_bypass=False)


@pytest.mark.parametrize("reused, streamed", [(0.5, 0.0), (0.99, 0.0), (0.0, 0.7), (0.3, 0.2), (2.0, 0.1), (50.0, 1.0)])
def test_miss_share_solves_its_equation(reused, streamed):
    m = miss_share(reused, streamed, 1.0)
    assert 0 <= m <= 1
    # The iteration stops when a step is below 1e-12; near reused = 1 a step is 100 times smaller than the error.
    assert m == pytest.approx(1 - math.exp(-(m * reused + streamed)), abs=1e-9)


def test_what_fits_alone_in_the_cache_never_misses():
    assert miss_share(0.5, 0.0, 1.0) == pytest.approx(0, abs=1e-9)


def test_loads_hide_behind_computation_but_for_the_first():
    gemm = replace(sliced_gemm(ROW, GPU, outputs_bypass=True), stage_reads_bytes=1e6, exposed=0.1, stage_compute_s=5e-6)
    assert gemm.stage_s(1e12) == pytest.approx(0.1e-6 + 5e-6)
    assert gemm.stage_s(1e11) == pytest.approx(1e-6 + 9e-6)
