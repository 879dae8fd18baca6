"""A timeline as a picture: one row per lane, one bar per action, grouped by rank.

matplotlib is imported here only, inside the function, because it is an optional package. Colours are chosen to stay
apart for colour-blind readers (Okabe & Ito 2008); the time that a message waited for its link or its other end is the
thin line in front of its bar.
"""

from __future__ import annotations

from pathlib import Path

from ..dist.errors import MissingPackage, UserError
from .timeline import Timeline

COLOURS = {
    "compute": "#0072B2",
    "reduce": "#009E73",
    "merge": "#56B4E9",
    "copy": "#CC79A7",
    "send": "#E69F00",
    "recv": "#D55E00",
    "wait": "#999999",
}
_SCALES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def draw(timeline: Timeline, path: Path, *, max_ranks: int = 8) -> None:
    """Write a PNG of the first `max_ranks` ranks. `MissingPackage` without matplotlib, `UserError` without a place."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise MissingPackage("matplotlib", extra="plots", needed_for="drawing a timeline") from None

    lanes = {key: spans for key, spans in timeline.lanes().items() if key[0] < max_ranks}
    scale, unit = next((s for s in _SCALES if timeline.makespan_s >= s[0]), _SCALES[-1])
    figure = Figure(figsize=(11, 1.6 + 0.3 * len(lanes)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    shown: set[str] = set()
    for row, ((rank, _), spans) in enumerate(lanes.items()):
        if rank % 2:
            axes.axhspan(row - 0.5, row + 0.5, color="#f2f2f2", zorder=0, linewidth=0)
        for span in spans:
            if span.start_s > span.reached_s:
                axes.plot(
                    [span.reached_s / scale, span.start_s / scale], [row, row], color="#bbbbbb", linewidth=1, zorder=1
                )
            if span.seconds > 0:
                shown.add(span.kind)
                thin = span.seconds < 0.004 * timeline.makespan_s  # a white edge would hide it
                axes.barh(
                    row, span.seconds / scale, left=span.start_s / scale, height=0.72, zorder=2,
                    color=COLOURS[span.kind], edgecolor=COLOURS[span.kind] if thin else "white", linewidth=0.6,
                )  # fmt: skip
    axes.set_yticks(range(len(lanes)), [f"rank {rank}  {lane}" for rank, lane in lanes], fontsize=8)
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.set_xlim(0, timeline.makespan_s / scale * 1.01 or 1)
    axes.set_xlabel(f"time in {unit} (modelled)")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)
    hidden = timeline.world - max_ranks
    axes.set_title(timeline.title() + (f" (ranks 0 to {max_ranks - 1})" if hidden > 0 else ""), fontsize=10, loc="left")
    handles = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items() if kind in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(len(handles), 1), frameon=False, fontsize=8)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise UserError(
            f"cannot write the picture {path} ({error.strerror})", expected="a folder that exists"
        ) from error
