"""The tables of `undertow simulate t3`: paper beside ours, rows, constants, and what T3 gives one's own model."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ...dist.units import format_bytes, format_rate, format_seconds
from .calibrate import Fit
from .configs import Config
from .hardware import Hardware, origins
from .paper import CLAIMS, Claim, Row
from .workloads import BACKWARD, FORWARD, Model

COMPARED = (Config.T3, Config.T3_MCA, Config.IDEAL_OVERLAP, Config.IDEAL_NMC)


def paper_table(rows: Sequence[Row]) -> Table:
    """Every published number beside the simulation's, with the deviation and whether TP-8 rows were fitted to it."""
    table = Table(title="T3 (ASPLOS'24): paper / ours", title_justify="left")
    table.add_column("quantity")
    for name in ("paper", "ours", "deviation", "asked"):
        table.add_column(name, justify="right")
    table.add_column("ours is")
    for claim in CLAIMS:
        ours = claim.of(rows)
        off = claim.deviation(ours)
        asked = "-" if claim.tolerance is None else f"± {100 * claim.tolerance:.0f} %"
        missed = claim.tolerance is not None and abs(off) > claim.tolerance
        table.add_row(
            claim.text,
            value_text(claim, claim.paper),
            value_text(claim, ours),
            f"{100 * off:+.1f} %" + (" MISSED" if missed else ""),
            asked,
            basis_text(claim),
        )
    return table


def hardware_line(hw: Hardware) -> str:
    """The GPU and links of a simulation, and which of it is the paper's."""
    paper = Hardware()
    parts = {
        f"{hw.peak_flops * hw.gemm_efficiency / 1e12:.0f} TFLOP/s in a product": ("peak_flops", "gemm_efficiency"),
        f"{hw.compute_units:g} compute units": ("compute_units",),
        f"memory {format_rate(hw.dram_bytes_per_s)}": ("dram_bytes_per_s",),
        f"cache {format_bytes(int(hw.llc_bytes))}": ("llc_bytes",),
        f"link {format_rate(hw.link_bytes_per_s)}": ("link_bytes_per_s",),
        f"latency {format_seconds(hw.link_latency_s)}": ("link_latency_s",),
    }
    said = [
        text + ("*" if all(getattr(hw, name) == getattr(paper, name) for name in names) else "")
        for text, names in parts.items()
    ]
    return f"on: {', '.join(said)} (* the paper's)"


def value_text(claim: Claim, value: float) -> str:
    """A ratio or, for a change, a signed percentage."""
    return f"{100 * value:+.1f} %" if claim.percent else f"{value:.2f}x"


def basis_text(claim: Claim) -> str:
    if claim.fitted:
        return "fitted on TP 8" + ("" if claim.tps == (8,) else ", TP 16 predicted")
    return "closed form" if claim.algebra else "predicted"


def row_table(rows: Sequence[Row], title: str) -> Table:
    """One line per sub-layer: times of the sequential parts, speedups, and the change of DRAM traffic."""
    table = Table(title=title, title_justify="left")
    table.add_column("sub-layer")
    for name in ("K", "GEMM", "RS", "AG", *(config.value for config in COMPARED), "traffic"):
        table.add_column(
            name.replace("Ideal-GEMM-RS-Overlap", "ideal").replace("Ideal-RS+NMC", "+NMC"), justify="right"
        )
    last = None
    for row in rows:
        sub, base = row.sublayer, row.runs[Config.SEQUENTIAL]
        if last is not None and (sub.model, sub.tp) != last:
            table.add_section()
        last = (sub.model, sub.tp)
        table.add_row(
            sub.name,
            str(sub.K),
            format_seconds(base.gemm_s),
            format_seconds(base.reduced_s),
            format_seconds(base.all_gather_s),
            *(f"{row.speedup(config):.2f}x" for config in COMPARED),
            f"{100 * row.traffic_change():+.0f} %",
        )
    return table


def total_table(model: Model, rows: Sequence[Row]) -> Table:
    """What all layers' sliced products and their all-reduce take, forward and backward, for one micro-batch."""
    table = Table(title=f"{model.name}: {model.layers} layers, one micro-batch per GPU", title_justify="left")
    table.add_column("pass")
    for name in ("Sequential", "T3", "T3-MCA", "saved by T3-MCA", "DRAM traffic saved"):
        table.add_column(name, justify="right")
    for name, layers in (("forward (OP, FC-2)", FORWARD), ("backward (FC-1, IP)", BACKWARD)):
        chosen = [row for row in rows if row.sublayer.layer in layers]
        seconds = {c: model.layers * sum(row.runs[c].seconds for row in chosen) for c in (Config.SEQUENTIAL, *COMPARED)}
        moved = model.layers * sum(
            row.runs[Config.SEQUENTIAL].moved_bytes - row.runs[Config.T3_MCA].moved_bytes for row in chosen
        )
        saved = seconds[Config.SEQUENTIAL] - seconds[Config.T3_MCA]
        table.add_row(
            name,
            format_seconds(seconds[Config.SEQUENTIAL]),
            format_seconds(seconds[Config.T3]),
            format_seconds(seconds[Config.T3_MCA]),
            f"{format_seconds(saved)} ({100 * saved / seconds[Config.SEQUENTIAL]:.0f} %)",
            format_bytes(moved),
        )
    return table


def constants_table() -> Table:
    """Every constant of the paper's GPU with its origin."""
    table = Table(title="constants", title_justify="left")
    table.add_column("name")
    table.add_column("value", justify="right")
    table.add_column("origin")
    table.add_column("what")
    for name, value, origin, why in origins():
        table.add_row(name, f"{value:g}", origin, why)
    return table


def fit_table(fits: Sequence[Fit]) -> Table:
    """The calibrated constants as fitted now."""
    table = Table(title="calibrated on the TP-8 rows alone", title_justify="left")
    table.add_column("constant")
    for name in ("value", "asked of TP 8", "gives"):
        table.add_column(name, justify="right")
    for fit in fits:
        table.add_row(fit.constant, f"{fit.value:g}", f"{fit.wanted:.2f}x", f"{fit.given:.3f}x")
    return table
