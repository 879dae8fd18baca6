"""Modelled: when which attention schedule wins, over tokens, the ratio of heads and the link. A map, from the planner.

    python benchmarks/attention_choice.py --output docs/images/attention-choice.png

Each cell is the planner's choice for a causal zigzag problem on nominal links; `Rates.drag` is 1, its cautious default.
The figure in a cell: how many times as fast as the plain KV ring it is predicted to be. Nothing here is a measurement;
'auto' measures on the machine itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from undertow.benchmarks.attention_modelled import COPY, H100
from undertow.comms.builders.attention_shape import Heads
from undertow.comms.network import Network
from undertow.parallel.masks import Mask
from undertow.parallel.token_ring.planner import DEFAULT, Rates, choose
from undertow.parallel.token_ring.problem import SCHEDULES, Problem

RATIOS = (1, 2, 4, 8)  # query heads per key head, of 32 query heads
TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)  # of each rank
LATENCY_S = 5e-6


@dataclass(frozen=True)
class Cell:
    """Modelled. `gain`: predicted time of the plain ring / that of `name`."""

    phase: str
    gigabytes_per_s: float
    ratio: int
    tokens: int
    name: str
    gain: float


def cells(ranks: int, links: Sequence[float], tokens: Sequence[int]) -> list[Cell]:
    """The choice for every link (GB/s of each port), ratio of heads, number of tokens and phase."""
    found = []
    for link in links:
        rates = Rates(f"{link:g} GB/s", H100, COPY, Network(LATENCY_S, port_bytes_per_s=link * 1e9))
        for ratio in RATIOS:
            heads = Heads(1, 32, 32 // ratio, 128, 128, "bfloat16", "float32", "bfloat16")
            for count in tokens:
                problem = Problem(ranks, ranks * count, ranks * count, heads, Mask(causal=True))
                for backward in (False, True):
                    choice = choose(problem, rates, backward=backward)
                    seconds = {e.name: e.seconds for e in choice.estimates}
                    phase = "backward" if backward else "forward"
                    gain = seconds[DEFAULT] / seconds[choice.name]
                    found.append(Cell(phase, link, ratio, count, choice.name, gain))
    return found


def draw(rows: Sequence[Cell], ranks: int, path: Path) -> None:
    """A panel for each phase and link: ratio of heads over tokens, coloured by schedule."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    links, names = sorted({c.gigabytes_per_s for c in rows}), [n for n in SCHEDULES if n in {c.name for c in rows}]
    tokens, colours = sorted({c.tokens for c in rows}), plt.get_cmap("tab20")
    figure, axes = plt.subplots(2, len(links), figsize=(4 * len(links), 6), squeeze=False, sharey=True)
    for line, phase in zip(axes, ("forward", "backward")):
        for panel, link in zip(line, links):
            for c in (c for c in rows if c.phase == phase and c.gigabytes_per_s == link):
                x, y = tokens.index(c.tokens), RATIOS.index(c.ratio)
                panel.add_patch(plt.Rectangle((x, y), 1, 1, color=colours(list(SCHEDULES).index(c.name)), ec="white"))
                panel.text(x + 0.5, y + 0.5, f"{c.gain:.2f}×", ha="center", va="center", fontsize=8)
            panel.set(xlim=(0, len(tokens)), ylim=(0, len(RATIOS)), title=f"{phase}, {link:g} GB/s per port")
            panel.set_xticks([x + 0.5 for x in range(len(tokens))], [f"{t // 1024}K" for t in tokens])
            panel.set_yticks([y + 0.5 for y in range(len(RATIOS))], [str(r) for r in RATIOS])
    axes[0][0].set_ylabel("query heads per key head")
    axes[1][0].set_ylabel("query heads per key head")
    axes[1][0].set_xlabel("tokens per rank")
    marks = [plt.Rectangle((0, 0), 1, 1, color=colours(list(SCHEDULES).index(n))) for n in names]
    figure.legend(marks, names, loc="lower center", ncol=len(names), fontsize=8)
    figure.suptitle(
        f"modelled, not measured: the planner's choice on {ranks} ranks, and its gain over the plain KV ring"
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=80)


def main(argv: Sequence[str]) -> int:
    def numbers(text: str) -> list[float]:
        return [float(x) for x in text.split(",")]

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--links", type=numbers, default=[10.0, 50.0, 200.0, 450.0], help="GB/s of each port")
    parser.add_argument("--tokens", type=numbers, default=list(TOKENS), help="of each rank")
    parser.add_argument("--output", required=True, help="the PNG")
    options = parser.parse_args(argv)
    rows = cells(options.ranks, options.links, [int(t) for t in options.tokens])
    for c in rows:
        print(f"{c.phase:<8} {c.gigabytes_per_s:>5g} GB/s  {c.ratio}:1  {c.tokens:>6} tokens  {c.name}  {c.gain:.2f}x")
    draw(rows, options.ranks, Path(options.output))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
