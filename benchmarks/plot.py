"""The picture of a report: per group, what each arm reaches along x, and below it the ratio with its interval.

The grey band is the A/A row's interval and the dashed line the 0.97 of the promise, so that a difference smaller than
the noise looks like one. Needs matplotlib (extra `plots`). Cases without an x stand beside each other, unconnected.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from undertow.benchmarks.intervals import NEVER_SLOWER
from undertow.benchmarks.report import Report, Row
from undertow.dist.errors import MissingPackage
from undertow.dist.units import format_bytes

MAX_PANELS = 4
# Okabe and Ito's colours, which colour-blind readers can tell apart; ours is always the first.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#5E4FA2")
MARKERS = (".", "^", "x")  # beyond the colours, the same ones again


def draw(report: Report, path: Path) -> Path:
    """Write the PNG and return its path; `MissingPackage` without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingPackage("matplotlib", extra="plots", needed_for="drawing the benchmark's plot") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    rows = [row for row in report.rows if row.seconds is not None]
    groups = list(dict.fromkeys(row.group for row in rows))[:MAX_PANELS] or [""]
    colours = arm_colours(rows)
    figure, axes = pyplot.subplots(
        2, len(groups), figsize=(2.5 + 5.5 * len(groups), 7.5), sharex="col", squeeze=False, layout="constrained"
    )
    for column, group in enumerate(groups):
        here = [row for row in rows if row.group == group]
        if _ordered(here):  # a line goes from left to right, in whatever order cases were run
            here.sort(key=lambda row: row.x or 0.0)
        above, below = axes[0][column], axes[1][column]
        places = _places(here)
        _draw_rates(above, here, places, colours)
        _draw_ratios(below, here, places, colours)
        above.set_title(group)
        _dress_values(above)
        _dress_values(below)
        _dress_cases(below, here, report.x_label)
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(len(labels), 1 + 2 * len(groups)), frameon=False
        )
    title = f"{report.benchmark}: {report.claim}\n{report.facts.get('hardware', '')}, {report.facts.get('date', '')}"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def arm_colours(rows: list[Row]) -> dict[str, str]:
    """A colour per arm; ours first, then in order of appearance."""
    names = dict.fromkeys(row.arm for row in sorted(rows, key=lambda row: row.role != "ours") if row.role != "again")
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}


def _ordered(rows: list[Row]) -> bool:
    """Whether the cases lie along an axis: each has an x of its own."""
    xs = list({row.case: row.x for row in rows}.values())
    return None not in xs and len(set(xs)) == len(xs) > 1


def _places(rows: list[Row]) -> dict[str, float]:
    """Where each case stands on the x axis: at its x, or one after the other."""
    cases = {row.case: row.x for row in rows}
    if _ordered(rows):
        return {case: x for case, x in cases.items() if x is not None}
    return {case: float(i) for i, case in enumerate(cases)}


def _draw_rates(axis: Any, rows: list[Row], places: dict[str, float], colours: dict[str, str]) -> None:
    bandwidth = all(row.nbytes for row in rows)
    for name in colours:
        mine = [row for row in rows if row.arm == name and row.seconds]
        if not mine:
            continue
        x, spans = [places[row.case] for row in mine], [row.seconds for row in mine]
        if bandwidth:
            ends = [[(r.nbytes or 0) / at / 1e9 for at in (s.high, s.median, s.low)] for r, s in zip(mine, spans) if s]
        else:
            ends = [[s.low, s.median, s.high] for s in spans if s]
        _line(axis, x, ends, name, colours, mine[0].role, joined=_ordered(rows))
    axis.set_ylabel("bandwidth (GB/s)" if bandwidth else "time per run (s)")
    axis.grid(alpha=0.25)


def _draw_ratios(axis: Any, rows: list[Row], places: dict[str, float], colours: dict[str, str]) -> None:
    again = sorted((places[r.case], r.ratio.low, r.ratio.high) for r in rows if r.role == "again" and r.ratio)
    if again:
        x, low, high = zip(*again)
        axis.fill_between(x, low, high, color="0.6", alpha=0.4, lw=0)
        axis.plot(x, high, color="0.6", lw=0.5)
    for name in colours:
        mine = [row for row in rows if row.arm == name and row.ratio]
        if mine:
            ends = [[row.ratio.low, row.ratio.median, row.ratio.high] for row in mine if row.ratio]
            _line(axis, [places[r.case] for r in mine], ends, name, colours, mine[0].role, joined=_ordered(rows))
    axis.axhline(1, color="0.3", lw=0.8)
    axis.axhline(NEVER_SLOWER, color="0.3", lw=0.8, ls="--")
    axis.set_ylabel("plain / arm (above 1: faster)\ngrey: A/A noise, dashed: 0.97")
    axis.grid(alpha=0.25)


def _line(
    axis: Any, x: list[float], ends: list[list[float]], name: str, colours: dict[str, str], role: str, *, joined: bool
) -> None:
    """The medians with their intervals as bars, joined by a line or not; `ends` are (low, median, high) per point."""
    at, arms, colour = list(colours).index(name), len(colours), colours[name]
    low, middle, high = zip(*ends)
    errors = [[m - lo for lo, m in zip(low, middle)], [h - m for m, h in zip(middle, high)]]
    style = {"ours": {"lw": 2.4, "marker": "o"}, "plain": {"lw": 1.6, "marker": "s"}, "hardware": {"ls": ":"}}
    keywords = {"lw": 1.2, "marker": MARKERS[at // len(COLOURS) % len(MARKERS)], "ms": 5, "elinewidth": 1.0}
    keywords |= style.get(role, {})
    if not joined:  # beside each other, so that the intervals can be told apart
        keywords["ls"] = "none"
        x = [place + 0.8 * (at + 0.5) / arms - 0.4 for place in x]
    label = f"{name} ({role})" if role in ("ours", "plain", "hardware") else name
    axis.errorbar(x, middle, yerr=errors, label=label, color=colour, capsize=2, **keywords)


def _dress_values(axis: Any) -> None:
    """Logarithmic when the values span more than a factor of three; plain numbers at the ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.dataLim.intervaly
    if low > 0 and high / low > 3:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if high / low < 1e3 else (1,)))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))


def _dress_cases(axis: Any, rows: list[Row], x_label: str) -> None:
    """The cases along the x axis, sizes in words."""
    places = _places(rows)
    xs = list(places.values())
    sized = xs == [row.nbytes for row in {row.case: row for row in rows}.values()]
    if min(xs, default=0) > 0 and max(xs) / min(xs) > 8:
        axis.set_xscale("log", base=2)
    labels = [format_bytes(x).replace(".0 ", " ") for x in xs] if sized else list(places)
    slanted = max(map(len, labels), default=0) > 8
    axis.set_xticks(xs, labels, rotation=30 if slanted else 0, ha="right" if slanted else "center")
    axis.minorticks_off()
    axis.set_xlabel(x_label)
