"""The T3 paper's evaluation, simulated: sequential against T3, T3-MCA and the ideals, per sub-layer.

No time here is measured: every arm reports simulated seconds on the paper's GPU, so the rows repeat exactly and the
A/A row is 1. The prediction beside each is the closed form, which knows no contention for DRAM: what an arm takes
longer than predicted is what contention costs it. The answer of an arm is its DRAM bytes by kind, and the reference
their algebra. `undertow simulate t3` prints the paper's numbers beside ours.
"""

from __future__ import annotations

import sys

from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Measured, Trial
from undertow.comms.t3_paper import closed_form
from undertow.comms.t3_paper.configs import Config, simulate
from undertow.comms.t3_paper.gemm import sliced_gemm
from undertow.comms.t3_paper.hardware import Hardware
from undertow.comms.t3_paper.workloads import SubLayer, paper_rows

FUSED = (Config.T3, Config.T3_MCA)


def cases(context: Context) -> list[Case]:
    """One case per row of the paper; a quick run takes TP 8 alone."""
    return [
        Case(
            name=row.name,
            build=lambda row=row: trial(row),
            plain=Config.SEQUENTIAL.value,
            ours=Config.T3_MCA.value,
            group=f"TP {row.tp}",
            x=float(i),
        )
        for i, row in enumerate(paper_rows((8,) if context.quick else (8, 16, 32)))
    ]


def trial(row: SubLayer) -> Trial:
    """The configurations of one row. Each is simulated once, since a simulation always gives the same."""
    hw = Hardware()
    return Trial([_arm(row, config, hw) for config in Config if config is not Config.IDEAL_NMC], reference=lambda: None)


def _arm(row: SubLayer, config: Config, hw: Hardware) -> Arm:
    result = simulate(row, config, hw)
    fused = config in FUSED
    gemm = sliced_gemm(row, hw, outputs_bypass=fused)
    chunk = gemm.output_bytes / row.tp
    moved = closed_form.traffic_bytes("t3" if fused else "sequential", chunk, row.tp, gemm.reads_bytes)
    return Arm(
        config.value,
        run=lambda: Measured(_kib(result.traffic_bytes), result.seconds, {"dram_bytes": result.moved_bytes}),
        reference=lambda: _kib(moved),
        predicted_s=_predicted_s(row, config, hw),
    )


def _predicted_s(row: SubLayer, config: Config, hw: Hardware) -> float:
    gemm = sliced_gemm(row, hw, outputs_bypass=config in FUSED)
    chunk = gemm.output_bytes / row.tp
    gather_s = closed_form.all_gather_s(chunk, row.tp, hw)
    if config is Config.SEQUENTIAL:
        return closed_form.sequential_s(gemm, row.tp, hw)
    if config is Config.IDEAL_OVERLAP:
        alone_s = gemm.alone_s(hw.dram_bytes_per_s)
        return max(alone_s, closed_form.reduce_scatter_s(chunk, row.tp, hw)) + gather_s
    return closed_form.fused_s(gemm, row.tp, hw) + gather_s


def _kib(traffic_bytes: dict[str, float]) -> dict[str, int]:
    """Whole KiB: the simulation adds up shares of pieces in floats, off by far less than that."""
    return {kind: round(nbytes / 1024) for kind, nbytes in traffic_bytes.items() if nbytes}


BENCHMARK = Benchmark(
    name="t3_paper",
    claim="simulated: T3-MCA hides most of the reduce-scatter behind the GEMM that feeds it",
    cases=cases,
    rounds=6,
    x_label="row of the paper",
)

if __name__ == "__main__":
    from undertow.benchmarks.cli import main

    sys.exit(main(["t3_paper", *sys.argv[1:]]))
