"""The paper's configurations of one sub-layer: sequential, T3, T3 with MCA, and two ideals (section 5.3).

The all-gather follows in each of them and is the same in each. The ideals are bounds and not simulations: the longer
of GEMM and reduce-scatter, each at its speed when alone. Ideal-GEMM-RS-Overlap has the baseline's GEMM and
reduce-scatter. Ideal-RS+NMC has what T3 has, near-memory reduction and outputs that bypass the cache, so nothing of
T3's can be faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from . import collectives, ring
from .gemm import Gemm, sliced_gemm
from .hardware import Hardware
from .memory import Policy
from .workloads import SubLayer


class Config(Enum):
    SEQUENTIAL = "Sequential"
    T3 = "T3"
    T3_MCA = "T3-MCA"
    IDEAL_OVERLAP = "Ideal-GEMM-RS-Overlap"
    IDEAL_NMC = "Ideal-RS+NMC"


@dataclass(frozen=True)
class Run:
    """One sub-layer under one configuration, on one GPU of the ring.

    `gemm_s` and `reduced_s` end the GEMM and the reduce-scatter, counted from the start of the sub-layer where they
    overlap, and each alone where they do not. `traffic_bytes`: DRAM bytes by kind (gemm_reads, gemm_writes, rs_reads,
    rs_writes, ag_reads, ag_writes).
    """

    config: Config
    seconds: float
    gemm_s: float
    reduced_s: float
    all_gather_s: float
    traffic_bytes: dict[str, float]

    @property
    def moved_bytes(self) -> float:
        return sum(self.traffic_bytes.values())


def simulate(row: SubLayer, config: Config, hw: Hardware) -> Run:
    """Time and DRAM bytes of `row` under `config`."""
    bypass = config not in (Config.SEQUENTIAL, Config.IDEAL_OVERLAP)
    gemm = sliced_gemm(row, hw, outputs_bypass=bypass)
    gather = collectives.all_gather(gemm.output_bytes / row.tp, row.tp, hw)
    if config in (Config.T3, Config.T3_MCA):
        fused = ring.fuse(gemm, row.tp, hw, Policy.MCA if config is Config.T3_MCA else Policy.SHARED)
        gemm_s, reduced_s, both_s = fused.gemm_s, fused.reduced_s, fused.seconds
        moved = _t3_traffic(fused)
    else:
        gemm_s = gemm.alone_s(hw.dram_bytes_per_s)
        reduced_s, moved = _alone(gemm, row.tp, hw, nmc=bypass)
        both_s = gemm_s + reduced_s if config is Config.SEQUENTIAL else max(gemm_s, reduced_s)
    moved |= {f"ag_{kind}": nbytes for kind, nbytes in gather.moved_bytes.items()}
    return Run(config, both_s + gather.seconds, gemm_s, reduced_s, gather.seconds, moved)


def _alone(gemm: Gemm, world: int, hw: Hardware, *, nmc: bool) -> tuple[float, dict[str, float]]:
    """Seconds of the reduce-scatter alone, and the DRAM bytes of it and the GEMM."""
    moved = {"gemm_reads": gemm.reads_bytes, "gemm_writes": gemm.output_bytes}
    if nmc:
        fused = ring.reduce_scatter_alone(gemm, world, hw)
        moved |= {"rs_reads": fused.served_bytes["rs_reads"], "rs_writes": fused.served_bytes["rs_updates"]}
        return fused.reduced_s, moved
    scatter = collectives.reduce_scatter(gemm.output_bytes / world, world, hw)
    moved |= {f"rs_{kind}": nbytes for kind, nbytes in scatter.moved_bytes.items()}
    return scatter.seconds, moved


def _t3_traffic(fused: ring.Fused) -> dict[str, float]:
    served = fused.served_bytes
    return {
        "gemm_reads": served["gemm_reads"],
        "gemm_writes": served["gemm_writes"],
        "rs_reads": served["rs_reads"],
        "rs_writes": served["rs_updates"],
    }
