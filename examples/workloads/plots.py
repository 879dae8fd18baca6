"""The plots of a run or a comparison: how the losses fell, and where every variant and seed ended."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from ...dist.log import get_logger
from .contract import Workload
from .loop import Outcome

log = get_logger(__name__)
Done = Sequence[tuple[Workload, Sequence[Outcome]]]


def plot(out: Path, done: Done) -> None:
    """losses.png and scores.png, one panel for each workload; says so when matplotlib is not installed."""
    done = [(workload, outcomes) for workload, outcomes in done if outcomes]
    if not done:
        return
    try:
        import matplotlib
    except ImportError:
        log.info("no plots: pip install 'undertow[plots]' brings matplotlib")
        return
    matplotlib.use("Agg")
    losses(out / "losses.png", done)
    scores(out / "scores.png", done)


def losses(path: Path, done: Done) -> None:
    """The training losses of every variant, of the first seed; cut off above where they began."""
    from matplotlib import pyplot

    shown = [(workload, outcomes) for workload, outcomes in done if any(outcome.losses for outcome in outcomes)]
    if not shown:
        return
    columns = min(2, len(shown))
    height = -(-len(shown) // columns)
    figure, axes = pyplot.subplots(height, columns, figsize=(6 * columns, 3.4 * height), squeeze=False)
    for panel in axes.flat[len(shown) :]:
        panel.set_visible(False)
    for panel, (workload, outcomes) in zip(axes.flat, shown):
        first = min(outcome.seed for outcome in outcomes)
        for outcome in outcomes:
            if outcome.seed == first and outcome.losses:
                panel.plot(_smooth(outcome.losses), linewidth=1, label=outcome.variant)
        began = [_smooth(o.losses[:10])[-1] for o in outcomes if o.seed == first and o.losses and not o.diverged]
        if began:
            panel.set_ylim(top=1.1 * max(began))
        panel.set(title=workload.name, xlabel="update", ylabel="training loss")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def scores(path: Path, done: Done) -> None:
    """The metric of a workload's first claim: a dot for each variant and seed, a bar for the mean."""
    from matplotlib import pyplot

    columns = min(2, len(done))
    height = -(-len(done) // columns)
    figure, axes = pyplot.subplots(height, columns, figsize=(6 * columns, 3 * height), squeeze=False)
    for panel in axes.flat[len(done) :]:
        panel.set_visible(False)
    for panel, (workload, outcomes) in zip(axes.flat, done):
        claim = workload.claims[0]
        names = [name for name in workload.variants if any(o.variant == name for o in outcomes)][::-1]
        for row, name in enumerate(names):
            own = [o for o in outcomes if o.variant == name]
            values = [o.metrics[claim.metric] for o in own if o.metrics and not o.diverged]
            finite = [value for value in values if math.isfinite(value)]
            panel.plot(finite, [row] * len(finite), "o", color="tab:blue", alpha=0.5, markersize=5)
            if finite:
                panel.plot([fmean(finite)], [row], "|", color="black", markersize=14)
            else:
                why = "diverged" if any(o.diverged for o in own) else "stopped"
                panel.text(0.02, row, why, transform=panel.get_yaxis_transform(), va="center", fontsize=8)
        panel.set_yticks(range(len(names)), names, fontsize=8)
        panel.set(
            title=workload.name, xlabel=f"{claim.metric} ({'more' if claim.relation == '>=' else 'less'} is better)"
        )
        panel.set_ylim(-0.6, len(names) - 0.4)
        panel.grid(alpha=0.3, axis="x")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _smooth(values: Sequence[float], width: int = 10) -> list[float]:
    """The mean over each window of `width` updates."""
    return [fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]
