"""The table and the plot of runs of `stream_backprop.py`.

    python benchmarks/stream_report.py h100.json h100_long.json --out benchmarks/results/stream_backprop_h100

writes OUT.json (the runs as they are), OUT.md and OUT.png: time per token and peak memory over sequence length. The
ratio is checkpointing with a chunked loss and offload over the arm, above 1 is faster; in brackets its fastest repeat
over the arm's slowest, the least that the repeats allow.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

BASE = "hf+ce+offload"
Cell = tuple[str, int, int]  # arm, batch, tokens


def cells(run: dict[str, Any]) -> dict[Cell, dict[str, Any]]:
    return {(row["arm"], row["batch"], row["tokens"]): row for row in run["rows"]}


def table(run: dict[str, Any]) -> list[str]:
    """Markdown rows of one run, in its order."""
    found = cells(run)
    lines = [
        "| arm | batch | tokens | seconds | µs/token | ratio | peak GiB | predicted GiB | host GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (arm, batch, tokens), row in found.items():
        head = f"| {arm} | {batch} | {tokens} |"
        if row.get("oom"):
            lines.append(f"{head} out of memory | | | | | |")
            continue
        base = found.get((BASE, batch, tokens), {})
        ratio = ""
        if "seconds" in base and "all_seconds" in row:
            least = min(base["all_seconds"]) / max(row["all_seconds"])
            ratio = f"{base['seconds'] / row['seconds']:.3f} [{least:.3f}]"
        per_token = row["seconds"] / (batch * tokens) * 1e6
        peak, predicted, host = (_gib(row.get(key)) for key in ("peak_bytes", "predicted_bytes", "host_bytes"))
        lines.append(f"{head} {row['seconds']:.2f} | {per_token:.2f} | {ratio} | {peak} | {predicted} | {host} |")
    return lines


def _gib(nbytes: float | None) -> str:
    return f"{nbytes / 2**30:.1f}" if nbytes else ""


def markdown(runs: list[dict[str, Any]], picture: str) -> str:
    lines = ["# stream_backprop: one forward and backward, gradients only", ""]
    lines += [f"- {name}: {value}" for name, value in runs[0]["facts"].items()]
    lines += ["", f"![Time and memory over sequence length]({picture})"]
    for run in runs:
        options = run["options"]
        lines += ["", f"## {options['model']}, {options['layers']} layers, chunks of {options['chunk']} rows", ""]
        for row in run.get("check", []):
            lines.append(
                f"- gradient error of {row['arm']}: at most {row['worst_error']:.2e} in a parameter, "
                f"{row['mean_ratio']:.3f} times hf+ce's (geometric mean)"
            )
        lines += ["", *table(run)]
        if "longest" in run:
            lines += ["", "Longest sequence by the slope of the measured peaks:", "", "```", run["longest"], "```"]
    return "\n".join(lines) + "\n"


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4))
    run = runs[0]
    arms = list(dict.fromkeys(row["arm"] for row in run["rows"]))
    colours = dict(zip(arms, plt.get_cmap("tab20").colors))  # type: ignore[attr-defined]
    for arm in arms:
        rows = [row for row in run["rows"] if row["arm"] == arm and not row.get("oom") and row["batch"] == 1]
        rows.sort(key=lambda row: row["tokens"])
        lengths = [row["tokens"] / 1024 for row in rows]
        style = "-" if arm.startswith("ours") else "--"
        look: dict[str, Any] = {"linestyle": style, "marker": ".", "label": arm, "color": colours[arm]}
        left.plot(lengths, [row["seconds"] / row["tokens"] * 1e6 for row in rows], **look)
        right.plot(lengths, [row.get("peak_bytes", 0) / 2**30 for row in rows], **look)
    left.set(xscale="log", xlabel="tokens (K)", ylabel="µs per token", ylim=(0, None))
    right.set(xscale="log", xlabel="tokens (K)", ylabel="peak GiB", ylim=(0, None))
    for axis in (left, right):
        axis.set_xticks(ticks := sorted({row["tokens"] / 1024 for row in run["rows"]}), [f"{t:g}" for t in ticks])
        axis.minorticks_off()
    right.legend(fontsize="small", bbox_to_anchor=(1.02, 1), loc="upper left")
    figure.suptitle(f"{run['options']['model']}, {run['options']['layers']} layers, {run['facts']['hardware']}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("runs", nargs="+", type=Path, help="files written by --json")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix")
    options = parser.parse_args(argv)
    runs = [json.loads(path.read_text()) for path in options.runs]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(runs) + "\n")
    draw(runs, options.out.with_suffix(".png"))
    options.out.with_suffix(".md").write_text(markdown(runs, options.out.with_suffix(".png").name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
