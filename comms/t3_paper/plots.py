"""Pictures after the paper's figures 16, 18 and 17: speedups per sub-layer, DRAM traffic, and DRAM traffic over time.

Needs matplotlib (extra `plots`), which is imported only here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...dist.errors import MissingPackage
from .configs import Config
from .gemm import sliced_gemm
from .hardware import Hardware
from .memory import Policy
from .paper import CLAIMS, Row, geomean
from .ring import Fused, fuse
from .workloads import SubLayer

# Okabe and Ito's colours.
SPEEDUPS = {
    Config.T3: "#E69F00",
    Config.T3_MCA: "#009E73",
    Config.IDEAL_OVERLAP: "#56B4E9",
    Config.IDEAL_NMC: "#0072B2",
}
KINDS = {
    "gemm_reads": ("GEMM reads", "#0072B2"),
    "gemm_writes": ("GEMM writes", "#56B4E9"),
    "rs_reads": ("RS reads", "#D55E00"),
    "rs_writes": ("RS writes", "#E69F00"),
    "ag_reads": ("AG reads", "#999999"),
    "ag_writes": ("AG writes", "#CCCCCC"),
}
SERVED = {"gemm_reads": "gemm_reads", "gemm_writes": "gemm_writes", "rs_reads": "rs_reads", "rs_updates": "rs_writes"}
BINS = 240


def draw(rows: Sequence[Row], timed: SubLayer, hw: Hardware, path: Path, *, paper: bool) -> Path:
    """Write the PNG: all `rows`, and `timed` over time. `paper` adds the published geomeans. `MissingPackage`."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingPackage("matplotlib", extra="plots", needed_for="drawing the simulation") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    wide = max(9.0, 0.55 * len(rows))
    figure = pyplot.figure(figsize=(wide, 13.5), layout="constrained")
    grid = figure.add_gridspec(4, 1, height_ratios=(1.15, 1.0, 0.7, 0.7))
    _speedups(figure.add_subplot(grid[0]), rows, paper=paper)
    _traffic(figure.add_subplot(grid[1]), rows)
    gemm = sliced_gemm(timed, hw, outputs_bypass=True)
    runs = {name: fuse(gemm, timed.tp, hw, policy, traced=True) for name, policy in _POLICIES.items()}
    longest_s = max(run.seconds for run in runs.values())
    for place, (name, run) in enumerate(runs.items(), start=2):
        _over_time(figure.add_subplot(grid[place]), run, longest_s, f"{timed.name}, {name}: DRAM traffic over time")
    figure.suptitle("Simulated, not measured: T3 (ASPLOS'24)" + (" and its published geomeans" if paper else ""))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


_POLICIES = {"T3": Policy.SHARED, "T3-MCA": Policy.MCA}


def _speedups(axes: Any, rows: Sequence[Row], *, paper: bool) -> None:
    names, places = [row.sublayer.name for row in rows], [float(i) for i in range(len(rows))]
    if paper:
        for text, tps in (("TP 8, 16", (8, 16)), ("TP 32", (32,))):
            names.append(f"geomean {text}")
            places.append(places[-1] + 1.2)
            group = [row for row in rows if row.sublayer.tp in tps]
            _bars(axes, [places[-1]], {c: [geomean(row.speedup(c) for row in group)] for c in SPEEDUPS}, labelled=False)
            published = {c.key: c.paper for c in CLAIMS}
            keys = (
                {Config.T3: "t3_geomean", Config.T3_MCA: "t3_mca_geomean", Config.IDEAL_OVERLAP: "ideal_geomean"}
                if tps == (8, 16)
                else {Config.T3_MCA: "tp32_geomean"}
            )
            for config, key in keys.items():
                at = places[-1] + 0.2 * (list(SPEEDUPS).index(config) - 1.5)
                axes.plot([at], [published[key]], "k_", markersize=12, markeredgewidth=2)
        axes.plot([], [], "k_", markersize=12, markeredgewidth=2, label="paper")
    _bars(axes, places[: len(rows)], {c: [row.speedup(c) for row in rows] for c in SPEEDUPS}, labelled=True)
    _name(axes, places, names)
    axes.set_ylim(0.95, 1.07 * max(row.speedup(config) for row in rows for config in SPEEDUPS))
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_ylabel("speedup over Sequential")
    axes.legend(ncols=5, fontsize=8, loc="upper left")
    axes.margins(x=0.01, y=0.15)


def _name(axes: Any, places: Sequence[float], names: Sequence[str]) -> None:
    if len(names) > 6:
        axes.set_xticks(places, names, rotation=60, ha="right", fontsize=8)
    else:
        axes.set_xticks(places, names, fontsize=9)


def _bars(axes: Any, places: Sequence[float], heights: dict[Config, list[float]], *, labelled: bool) -> None:
    for i, (config, values) in enumerate(heights.items()):
        shifted = [place + 0.2 * (i - 1.5) for place in places]
        label = config.value if labelled else None
        axes.bar(shifted, [v - 0.9 for v in values], 0.2, bottom=0.9, color=SPEEDUPS[config], label=label)


def _traffic(axes: Any, rows: Sequence[Row]) -> None:
    """Left bar Sequential, right bar T3, both over Sequential's sum."""
    wholes = [row.runs[Config.SEQUENTIAL].moved_bytes for row in rows]
    for side, config in ((-0.2, Config.SEQUENTIAL), (0.2, Config.T3_MCA)):
        below = [0.0] * len(rows)
        for kind, (label, colour) in KINDS.items():
            shares = [row.runs[config].traffic_bytes[kind] / whole for row, whole in zip(rows, wholes)]
            places = [i + side for i in range(len(rows))]
            axes.bar(places, shares, 0.36, bottom=below, color=colour, label=label if side < 0 else None)
            below = [low + share for low, share in zip(below, shares)]
    _name(axes, range(len(rows)), [row.sublayer.name for row in rows])
    axes.set_ylabel("DRAM bytes / Sequential's\n(left Sequential, right T3)")
    axes.set_ylim(0, 1.22)
    axes.legend(ncols=6, fontsize=8, loc="upper left")
    axes.margins(x=0.01)


def _over_time(axes: Any, run: Fused, longest_s: float, title: str) -> None:
    """Bytes per time bin, stacked by kind; a request's bytes are spread evenly over its service."""
    width_s = longest_s / BINS
    rates = {kind: [0.0] * BINS for kind in SERVED.values()}
    for served, begin_s, end_s, nbytes in run.trace:
        low, high = int(begin_s / width_s), min(int(end_s / width_s), BINS - 1)
        for b in range(low, high + 1):
            inside_s = min(end_s, (b + 1) * width_s) - max(begin_s, b * width_s)
            share = 1.0 if low == high else max(inside_s, 0.0) / (end_s - begin_s)
            rates[SERVED[served]][b] += nbytes * share / width_s
    times_ms = [1e3 * (b + 0.5) * width_s for b in range(BINS)]
    series = [[value / 1e9 for value in rates[kind]] for kind in rates]
    axes.stackplot(times_ms, series, labels=[KINDS[k][0] for k in rates], colors=[KINDS[k][1] for k in rates])
    for label, at_s in (("GEMM ends", run.gemm_s), ("RS ends", run.reduced_s)):
        axes.axvline(1e3 * at_s, color="black", linewidth=0.8, linestyle="--" if label == "RS ends" else "-")
    axes.set_title(
        f"{title}; GEMM ends {1e3 * run.gemm_s:.2f} ms (line), RS {1e3 * run.reduced_s:.2f} ms (dashed)", fontsize=9
    )
    axes.set_xlim(0, 1e3 * longest_s * 1.01)
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])
    axes.set_ylabel("GB/s")
    axes.set_xlabel("ms")
    axes.legend(ncols=4, fontsize=8, loc="upper left")
