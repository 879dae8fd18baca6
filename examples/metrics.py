"""What a run writes about itself: metrics.jsonl, one line a step, and the picture of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..dist.log import get_logger

log = get_logger(__name__)


class Metrics:
    """Appends to `folder`/metrics.jsonl. A resumed run drops the lines of the steps that it repeats."""

    def __init__(self, folder: Path, *, enabled: bool, start: int) -> None:
        self.path, self.enabled = folder / "metrics.jsonl", enabled
        if enabled:
            kept = [line for line in read(self.path) if line["step"] < start and "loss" in line]
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, **values: Any) -> None:
        if self.enabled:
            with self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")

    def losses(self) -> list[float]:
        """Every step's loss so far, exactly (JSON keeps a float's every bit)."""
        return [line["loss"] for line in read(self.path) if "loss" in line]


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a line torn by a kill is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def plot_losses(folder: Path) -> Path | None:
    """Draw `folder`/loss.png; None, and says why, when matplotlib is not installed or the disk is full."""
    try:
        import matplotlib
    except ImportError:
        log.info("no loss.png: pip install 'undertow[plots]' brings matplotlib")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read(folder / "metrics.jsonl")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    points = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    axes.plot(*zip(*points), linewidth=1, label="training loss (nats per byte)")
    evaluated = [
        (line["step"], line["bits_per_byte"] * 0.6931471805599453) for line in lines if "bits_per_byte" in line
    ]
    if evaluated:
        axes.plot(*zip(*evaluated), "o", label="held out (nats per byte)")
    axes.set(xlabel="step", ylabel="nats per byte", title=f"{folder.name}: loss")
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / "loss.png"
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:  # of a full disk, after a run whose results are there
        log.warning("no loss.png (%s)", error)
        return None
    finally:
        pyplot.close(figure)
    return path
