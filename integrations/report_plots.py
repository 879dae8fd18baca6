"""The pictures of a run's report, each as an SVG text that stands in the page itself."""

from __future__ import annotations

import io
from typing import Any

from ..dist.errors import MissingPackage
from .report_data import RunData, Span

COLOURS = {"step": "#4c78a8", "snapshot": "#e45756", "fence": "#ff9da6", "copy": "#f58518", "flush": "#72b7b2"}
COLOURS |= {"fsync": "#54a24b", "vote": "#b279a2", "commit": "#9d755d"}
OTHER = "#bab0ac"
NATS = 0.6931471805599453  # of a bit
MOST_SPANS = 4000


def _axes(title: str, xlabel: str, ylabel: str, height: float = 3.2) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackage("matplotlib", extra="plots", needed_for="the report's plots") from error
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _svg(figure: Any) -> str:
    """The drawing alone, without the XML prologue, which HTML does not take."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def loss(run: RunData) -> str:
    figure, axes = _axes("loss", "step", "nats per byte")
    axes.plot([line["step"] for line in run.steps], [line["loss"] for line in run.steps], label="training")
    if run.evaluations:
        held_out = [line["bits_per_byte"] * NATS for line in run.evaluations]
        axes.plot([line["step"] for line in run.evaluations], held_out, "o", label="held out")
    for at, step in enumerate(run.resumed_at):
        axes.axvline(step, color="#666", linestyle=":", label="" if at else "restart")
    axes.legend()
    return _svg(figure)


def throughput(run: RunData) -> str:
    figure, axes = _axes("throughput", "step", "tokens/s")
    points = [line for line in run.steps if "tokens_per_s" in line]
    axes.plot([line["step"] for line in points], [line["tokens_per_s"] for line in points])
    return _svg(figure)


def stall(run: RunData) -> str:
    figure, axes = _axes("stall: how long each save blocked training (slowest rank)", "step", "ms")
    axes.bar([str(step) for step in run.stalls], list(run.stalls.values()), color=COLOURS["snapshot"])
    return _svg(figure)


def memory(run: RunData) -> str:
    figure, axes = _axes("memory", "seconds", "GiB")
    for name, measured in run.memory.items():
        later = run.starts.get(int(name.split(":")[0].removeprefix("rank ")), ())[1:]
        points = sorted([*measured, *((start_s, float("nan")) for start_s in later)], key=lambda point: point[0])
        axes.plot([t for t, _ in points], [value / 2**30 for _, value in points], label=name)
    axes.legend(fontsize="small")
    return _svg(figure)


def timeline(spans: tuple[Span, ...], title: str) -> str:
    """A row for each lane of each rank; what is below a step's bar is hidden beneath it."""
    shown = sorted(spans, key=lambda span: span.begin_s)[:MOST_SPANS]
    rows = sorted({(span.rank, span.lane != "train", span.lane) for span in shown})
    figure, axes = _axes(title, "seconds", "", height=1.2 + 0.28 * len(rows))
    place = {(rank, lane): index for index, (rank, _, lane) in enumerate(rows)}
    for name in dict.fromkeys(span.name for span in shown):
        mine = [span for span in shown if span.name == name]
        axes.barh(
            [place[span.rank, span.lane] for span in mine],
            [span.seconds for span in mine],
            left=[span.begin_s for span in mine],
            color=COLOURS.get(name, OTHER),
            label=name,
            edgecolor=["black" if span.killed else "none" for span in mine],
        )
    axes.set_yticks(range(len(rows)), [f"rank {rank} {lane}" for rank, _, lane in rows], fontsize="x-small")
    axes.invert_yaxis()
    figure.legend(ncols=8, fontsize="x-small", loc="outside lower center")
    return _svg(figure)
