"""The simulated GPU and its link: every constant of the model, each with where it comes from.

The paper is Pati et al., "T3: Transparent Tracking & Triggering for Fine-grained Overlap of Compute & Collectives"
(ASPLOS'24, arXiv 2401.16677). A constant is *read* (stated by the paper), *recalled* (believed to be in the paper or
in the hardware's manuals, not checked against the text), *assumed* (our choice, no source) or *calibrated* (fitted by
`calibrate.py` on the TP-8 rows alone). No constant names a model or a layer: what differs between layers must come out
of their shapes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ...dist.errors import UserError
from ...dist.machine import Machine


def _constant(default: float, origin: str, why: str) -> Any:
    return dataclasses.field(default=default, metadata={"origin": origin, "why": why})


@dataclass(frozen=True)
class Hardware:
    """One GPU of a ring of equal GPUs. Rates are bytes/s or operations/s, times seconds, sizes bytes."""

    compute_units: int = _constant(80, "read", "80 CUs")
    clock_hz: float = _constant(1.4e9, "read", "1.4 GHz")
    flops_per_unit_cycle: float = _constant(1024, "recalled", "FP16 matrix operations of a CU per cycle: 114.7 TFLOP/s")
    tile_rows: int = _constant(128, "recalled", "a work-group computes a 128 x 128 tile of the output")
    tile_cols: int = _constant(128, "recalled", "as tile_rows")
    k_step: int = _constant(32, "recalled", "depth of one step of the GEMM's inner loop; its first load is not hidden")
    element_bytes: int = _constant(2, "read", "FP16")
    llc_bytes: float = _constant(16 * 2**20, "read", "16 MB L2, the last-level cache")
    dram_bytes_per_s: float = _constant(1e12, "read", "HBM2, 1 TB/s")
    link_bytes_per_s: float = _constant(75e9, "read", "ring of 150 GB/s bidirectional: 75 GB/s per direction")
    link_latency_s: float = _constant(500e-9, "read", "500 ns")
    update_cost: float = _constant(
        2.0, "recalled", "near-memory op-and-store holds the DRAM column twice as long (CCDWL)"
    )
    unarbitrated_share: float = _constant(0.5, "assumed", "without MCA two waiting streams get equal DRAM time")
    piece_tiles: int = _constant(8, "assumed", "tiles per DMA; results have converged: half of it changes them < 1 %")
    gemm_efficiency: float = _constant(0.72, "calibrated", "share of the peak in the GEMM's inner loop")
    reduce_efficiency: float = _constant(
        0.47, "calibrated", "share of DRAM bandwidth a CU kernel reaches when reducing"
    )
    interference: float = _constant(
        8.3, "calibrated", "DRAM time of communication, as a multiple, while GEMM traffic waits"
    )
    mca_share: float = _constant(0.36, "calibrated", "DRAM time MCA leaves to communication while GEMM traffic waits")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            low, high = _RANGES.get(field.name, (0.0, float("inf")))
            if not low < value <= high:
                raise UserError(f"{field.name} = {value}", expected=f"a number above {low:g} and at most {high:g}")

    @property
    def peak_flops(self) -> float:
        """Matrix operations per second of the whole GPU."""
        return self.compute_units * self.clock_hz * self.flops_per_unit_cycle

    def with_peak(self, flops: float) -> Hardware:
        """The same GPU with another peak rate, in operations per second."""
        return dataclasses.replace(self, flops_per_unit_cycle=flops / (self.compute_units * self.clock_hz))


_RANGES = {
    "gemm_efficiency": (0.0, 1.0),
    "reduce_efficiency": (0.0, 1.0),
    "unarbitrated_share": (0.0, 0.999),
    "mca_share": (0.0, 0.999),
    "link_latency_s": (-1e-12, float("inf")),
    "update_cost": (0.999999, float("inf")),
    "interference": (0.999999, float("inf")),
}


def origins() -> list[tuple[str, float, str, str]]:
    """(name, value, origin, why) of every constant of the paper's GPU, for tables and documentation."""
    return [
        (field.name, getattr(Hardware(), field.name), field.metadata["origin"], field.metadata["why"])
        for field in dataclasses.fields(Hardware)
    ]


def from_machine(machine: Machine, base: Hardware | None = None) -> Hardware:
    """T3's mechanism on a machine that `undertow probe` measured: its GEMM rate, memory and link where it has them.

    The measured GEMM rate is one that a whole product reached, so the efficiency becomes 1 and the peak that rate.
    Device copies count each byte once but move it twice. What was not measured stays as in `base`.
    """
    hw = base or Hardware()
    changes: dict[str, Any] = {}
    links = [machine.links[name] for name in ("nccl_ring", "nccl", "gloo_ring", "gloo") if name in machine.links]
    for link in links[:1]:  # the rate of a ring in which all send, where it was measured
        changes |= {"link_bytes_per_s": link.bytes_per_s, "link_latency_s": link.latency_s}
    rate = machine.flops.get("gemm/bfloat16") or machine.flops.get("gemm/float16")
    if rate:
        changes["gemm_efficiency"] = 1.0
    if "d2d" in machine.copies:
        changes["dram_bytes_per_s"] = 2 * machine.copies["d2d"]
    hw = dataclasses.replace(hw, **changes)
    return hw.with_peak(rate) if rate else hw
