"""What saves cost, for whoever watches: a Prometheus text file and TensorBoard scalars, from one `SaveReport` each.

An observer is any function of (report, arena_bytes): pass several to `Checkpointer(observers=[…])`. They are called on
the training thread between two steps, so they must be quick; one that fails is reported once and then left out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..dist.errors import MissingPackage
from .save import SaveReport

Observer = Callable[[SaveReport, int], None]


class PrometheusFile:
    """Writes `path`, for node_exporter's textfile collector, after every save; by rename, so never half-written.

    One file per rank: put the rank into its name. Counters count this process's saves.
    """

    def __init__(self, path: Path | str, **labels: str) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge
        except ImportError:
            raise MissingPackage("prometheus_client", extra="metrics", needed_for="PrometheusFile") from None
        self.path = Path(path)
        self._registry = CollectorRegistry()
        names = (*labels, "tier")

        def gauge(name: str, text: str) -> Any:
            return Gauge(f"undertow_checkpoint_{name}", text, names, registry=self._registry)

        self._labels = labels
        self._saves = Counter("undertow_checkpoint_saves", "Saves by outcome", (*names, "ok"), registry=self._registry)
        self._written = Counter(
            "undertow_checkpoint_bytes", "Bytes committed by this rank", names, registry=self._registry
        )
        self._step = gauge("step", "Step of the newest committed checkpoint")
        self._seconds = {
            "call_s": gauge("call_seconds", "Training blocked in the call"),
            "fence_s": gauge("fence_seconds", "Training blocked at the fence"),
            "durable_s": gauge("durable_seconds", "From the call to durable files on this rank"),
            "commit_s": gauge("commit_seconds", "From the call to the commit on all ranks"),
            "slowdown_s": gauge("slowdown_seconds", "By how much the steps beside the save were longer"),
        }
        self._arena = gauge("arena_bytes", "Most host memory in use at one time for bytes on their way to the disk")

    def __call__(self, report: SaveReport, arena_bytes: int) -> None:
        from prometheus_client import write_to_textfile

        labels = {**self._labels, "tier": report.tier}
        self._saves.labels(**labels, ok=str(report.ok).lower()).inc()
        self._arena.labels(**labels).set(arena_bytes)
        if report.ok:
            self._step.labels(**labels).set(report.step)
            self._written.labels(**labels).inc(report.nbytes)
            for name, gauge in self._seconds.items():
                if getattr(report, name) is not None:
                    gauge.labels(**labels).set(getattr(report, name))
        write_to_textfile(str(self.path), self._registry)


class TensorBoardScalars:
    """Adds scalars to `writer`, a torch.utils.tensorboard.SummaryWriter or anything with its `add_scalar`."""

    def __init__(self, writer: Any, prefix: str = "checkpoint") -> None:
        self._writer, self._prefix = writer, prefix

    def __call__(self, report: SaveReport, arena_bytes: int) -> None:
        values = {"stall_ms": 1e3 * (report.call_s + report.fence_s), "failed": float(not report.ok)}
        values["arena_bytes"] = float(arena_bytes)
        if report.ok:
            values |= {"durable_s": report.durable_s, "commit_s": report.commit_s, "bytes": float(report.nbytes)}
        if report.slowdown_s is not None:
            values["slowdown_ms"] = 1e3 * report.slowdown_s
        for name, value in values.items():
            self._writer.add_scalar(f"{self._prefix}/{report.tier}/{name}", value, report.step)
