"""Draw what the overlap engine did, from its trace: products, messages on the emulated link, and waits of each rank.

``python -m undertow.benchmarks.overlap_timeline docs/images/overlap-timeline.png`` runs one product on two gloo ranks
whose link makes the reduce-scatter as long as the product, sequentially and overlapped, and draws the fastest of many
calls of each. The bars are spans of the real run's trace; those of the link are when the emulation let each message's
bytes leave. The number in a bar is the rank that keeps these rows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from undertow.comms.link import LinkModel
from undertow.comms.overlap_engine import OverlapEngine
from undertow.comms.slow_messenger import SlowMessenger
from undertow.comms.trigger import GlooMessenger
from undertow.dist.trace import Trace, trace_path
from undertow.dist.trace_read import read_attempts
from undertow.integrations.pytest_plugin import run_ranks

WORLD, ROWS, INNER, OUTER, SUBCHUNKS, CALLS = 2, 1024, 2048, 1024, 4, 40
Bar = tuple[str, str, float, float]  # lane, name, begin, end in microseconds of the monotonic clock


class Recorded(SlowMessenger):
    """Remembers when the link was busy with each message."""

    def __init__(self, model: LinkModel) -> None:
        super().__init__(GlooMessenger(None, 60.0), model)
        self.bars: list[Bar] = []

    def post_send(self, rows: torch.Tensor, to: int, tag: int) -> Any:
        handle = super().post_send(rows, to, tag)
        gone_s = float(handle[2])
        took_s = rows.numel() * rows.element_size() / self._wire.model.bytes_per_s
        self.bars.append(("link", f"to {to}", 1e6 * (gone_s - took_s), 1e6 * gone_s))
        return handle


def one_rank(rank: int, world: int, folder: str) -> dict[str, list[list[Bar]]]:
    """The bars of each call of this rank, in turns sequential and overlapped, on one link."""
    generator = torch.Generator().manual_seed(rank)
    x, w = torch.randn(ROWS, INNER, generator=generator), torch.randn(INNER, OUTER, generator=generator)
    y, sizes = torch.empty(ROWS, OUTER), (ROWS // world,) * world
    took = []
    for _ in range(20):
        dist.barrier()
        began_s = time.perf_counter()
        torch.mm(x, w, out=y)
        took.append(time.perf_counter() - began_s)
    fastest = torch.tensor([min(took)], dtype=torch.float64)
    dist.all_reduce(fastest, dist.ReduceOp.MAX)

    def product(low: int, high: int) -> None:
        torch.mm(x[low:high], w, out=y[low:high])

    messenger = Recorded(LinkModel((world - 1) / world * y.numel() * 4 / float(fastest)))
    begun_us = []
    with Trace(trace_path(folder, rank), rank) as trace:
        engine = OverlapEngine(messenger=messenger, trace=trace)
        for call in range(2 * CALLS):
            dist.barrier()
            begun_us.append(time.monotonic() * 1e6)
            engine.reduce_scatter(engine.plan(sizes, SUBCHUNKS), product, y, overlap=bool(call % 2))
        engine.close()
    bars = [*_spans(trace_path(folder, rank)), *messenger.bars]
    ends = [*begun_us[1:], float("inf")]
    calls = [[bar for bar in bars if low <= bar[2] < high] for low, high in zip(begun_us, ends)]
    return {"sequential": calls[::2], "overlapped, staggered": calls[1::2]}


def window(call: Sequence[list[Bar]]) -> tuple[float, float]:
    """When the first rank began and the last one ended."""
    return min(bar[2] for bars in call for bar in bars), max(bar[3] for bars in call for bar in bars)


def _spans(path: Path) -> list[Bar]:
    """Every span of a trace file; an end follows its begin, because the engine's spans do not nest."""
    (attempt,) = read_attempts(path)
    found, began = [], dict[int, tuple[str, float]]()
    for event in attempt.events:
        if event["ph"] == "B":
            began[event["tid"]] = event["name"], event["ts"]
        elif event["ph"] == "E":
            name, start_us = began.pop(event["tid"])
            lane = "compute" if name.startswith(("product", "wait")) else "send"
            found.append((lane, name, start_us, event["ts"]))
    return found


def draw(runs: Mapping[str, Sequence[list[Bar]]], path: Path) -> None:
    """One panel per run, two rows per rank, all on one scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(runs), 1, sharex=True, figsize=(10, 2.6 * len(runs)), squeeze=False)
    colours = {"product": "tab:blue", "wait": "lightgrey", "to": "tab:orange"}
    for panel, (title, ranks) in zip(panels[:, 0], runs.items()):
        origin_us, end_us = window(ranks)
        labels = []
        for rank, bars in enumerate(ranks):
            for place, lane in enumerate(("compute", "link")):
                height = -(2.4 * rank + place)
                labels.append((height, f"rank {rank} {lane}"))
                for _, name, begin_us, stop_us in (bar for bar in bars if bar[0] == lane):
                    start_ms, long_ms = (begin_us - origin_us) / 1e3, (stop_us - begin_us) / 1e3
                    colour = colours[name.split()[0]]
                    panel.barh(height, long_ms, 0.8, start_ms, color=colour, edgecolor="white", linewidth=0.8)
                    if name.startswith(("product chunk", "to")) and long_ms > 0.02 * (end_us - origin_us) / 1e3:
                        text = name.split()[2 if name.startswith("product") else 1]
                        panel.text(start_ms + long_ms / 2, height, text, ha="center", va="center", fontsize=6)
        panel.set_yticks([height for height, _ in labels], [text for _, text in labels], fontsize=7)
        panel.set_title(f"{title}: {(end_us - origin_us) / 1e3:.0f} ms", fontsize=9, loc="left")
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
    panels[-1, 0].set_xlabel("ms since the first rank began; blue: product, orange: on the link, grey: waiting")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("picture", type=Path, help="the PNG to write")
    path: Path = parser.parse_args(argv).picture
    with tempfile.TemporaryDirectory() as folder:
        found = run_ranks(WORLD, one_rank, folder, timeout_s=300)
    runs = {
        title: min(zip(*(each[title] for each in found)), key=lambda call: window(call)[1] - window(call)[0])
        for title in found[0]
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, path)
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
