"""Draw predicted peak memory over sequence length, from the formulas of `parallel.memory_model`: no device is needed.

python benchmarks/stream_memory_plot.py docs/stream-memory.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from undertow.parallel.memory_model import checkpointing_bytes
from undertow.parallel.stream.cli import KNOWN
from undertow.parallel.stream.planner import plan


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("picture", type=Path, help="the PNG to write")
    picture: Path = parser.parse_args(argv).picture

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shape = KNOWN["llama3-8b"]
    resident = shape.parameters * 2 * shape.element_size
    lengths = [1024 * n for n in (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)]

    def ours(**how):
        return lambda tokens: plan(shape, 1, tokens, chunk=8192, stash=False, **how).device_bytes

    def theirs(chunked: bool, offload: bool):
        return lambda tokens: checkpointing_bytes(shape, tokens, chunked_loss=chunked, offload=offload)

    ways = {
        "gradient checkpointing": theirs(False, False),
        "+ chunked loss": theirs(True, False),
        "+ chunked loss + offload": theirs(True, True),
        "streamed": ours(offload=False),
        "streamed + offload": ours(offload=True),
    }
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name, of in ways.items():
        axes.plot([t / 1024 for t in lengths], [(resident + of(t)) / 1e9 for t in lengths], marker=".", label=name)
    axes.axhline(80, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", ylim=(0, 140), xlabel="tokens (K)", ylabel="peak GB, weights and gradients included")
    axes.set_title("Llama-3-8B, bfloat16, one sequence, predicted")
    ticks = [4, 16, 64, 256, 1024]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
