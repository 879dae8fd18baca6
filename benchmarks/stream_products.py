"""Sums of weight gradients: one long product into a float32 sum against blocks of rows, and how fast each length is.

    python benchmarks/stream_products.py --rows 131072 --json products.json

The weights are those of a Llama-3-8B layer (or of `--model`), the gradients random and bfloat16. `block` 0 is one
product over all rows; `bfloat16` is torch's plain product without a float32 sum, the speed to be reached. Each line is
the time for the whole layer, interleaved, the median over repeats, after the answer was checked against float64 on a
part of the weight. `stream.sums.PRODUCT_ROWS` should be a length that is as fast as any.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undertow.benchmarks.facts import facts
from undertow.benchmarks.stream_backprop import SHAPES
from undertow.parallel.stream import sums

BLOCKS = (4096, 8192, 16384, 32768, 65536, 0)


def weights(shape: dict[str, Any]) -> list[tuple[int, int]]:
    """(out, in) of a layer's matrices, q, k, v, o, gate, up, down."""
    width, hidden = shape["hidden_size"], shape["intermediate_size"]
    head = shape.get("head_dim") or width // shape["num_attention_heads"]
    q, kv = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    return [(q, width), (kv, width), (kv, width), (width, q), (hidden, width), (hidden, width), (width, hidden)]


def add_in_blocks(total: Tensor, dy: Tensor, x: Tensor, block: int) -> None:
    """`sums.add_product` for `block` rows at a time; 0: all at once."""
    step = block or dy.shape[0]
    before, sums.PRODUCT_ROWS = sums.PRODUCT_ROWS, max(step, 1)
    try:
        sums.add_product(total, dy, x)
    finally:
        sums.PRODUCT_ROWS = before


def wrong(rows: int, device: torch.device, block: int) -> float:
    """Relative error of a small sum against float64."""
    dy, x = (torch.randn(rows, n, device=device).bfloat16() for n in (64, 96))
    total = torch.zeros(64, 96, device=device)
    add_in_blocks(total, dy, x, block)
    exact = dy.double().T @ x.double()
    return ((total - exact).norm() / exact.norm()).item()


def measure(shape: dict[str, Any], rows: int, blocks: list[int], repeats: int, device: torch.device) -> list[dict]:
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    times: dict[int | str, float] = dict.fromkeys((*blocks, "bfloat16"), 0.0)
    work = 0.0
    for out, into in weights(shape):
        dy, x = (torch.randn(rows, n, device=device, dtype=torch.bfloat16) for n in (out, into))
        total = torch.zeros(out, into, device=device)
        found: dict[int | str, list[float]] = {name: [] for name in times}
        for turn in range(repeats + 1):
            for name in times:
                wait()
                start = time.perf_counter()
                if isinstance(name, str):
                    torch.mm(dy.T, x)
                else:
                    add_in_blocks(total, dy, x, name)
                wait()
                if turn:
                    found[name].append(time.perf_counter() - start)
        for name, seconds in found.items():
            times[name] += statistics.median(seconds)
        work += 2.0 * rows * out * into
        del dy, x, total
    lines = []
    for name, seconds in times.items():
        error = None if isinstance(name, str) else wrong(rows, device, name)
        lines.append({"block": name, "rows": rows, "seconds": seconds, "tflops": work / seconds / 1e12, "error": error})
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--model", choices=SHAPES, default="llama3-8b")
    parser.add_argument("--rows", default="8192,131072", help="rows of dy and x, one after another")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write all lines")
    options = parser.parse_args(argv)
    device, lines = torch.device(options.device), []
    for rows in map(int, options.rows.split(",")):
        blocks = [block for block in BLOCKS if block < rows]
        for line in measure(SHAPES[options.model], rows, blocks, options.repeats, device):
            lines.append(line)
            error = "" if line["error"] is None else f"{line['error']:>10.1e}"
            print(
                f"{rows:>8} rows  block {line['block']!s:>8} {line['seconds'] * 1e3:>10.2f} ms "
                f"{line['tflops']:>8.1f} TFLOP/s{error}",
                flush=True,
            )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"facts": facts([]), "lines": lines}, indent=1) + "\n")
    return int(any(line["error"] is not None and line["error"] > 1e-4 for line in lines))


if __name__ == "__main__":
    sys.exit(main())
