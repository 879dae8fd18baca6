"""Judges recorded overlap benchmarks by their goals: how much of a perfect overlap was reached, and never slower.

    python -m undertow.benchmarks.overlap_goals benchmarks/results/overlap_*.json

A perfect overlap takes the longer of the product and its collective, so its speed-up is (product + link) / max(product,
link), from times of each alone. Wanted: 0.9 of it where link / product is between 0.3 and 1.5, and nowhere a lower 95 %
bound of plain / auto below 0.97. A cell whose interval reaches to both sides of 0.97 is open, not missed. Where the
plain way is not the engine's own but a library's, which may have overlap or none, `of ideal` compares with that.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from undertow.benchmarks.intervals import Interval, promise
from undertow.benchmarks.overlap_choice import told
from undertow.benchmarks.report import Report, Row, markdown_table
from undertow.dist.errors import UserError

LEAST, FROM, TO = 0.9, 0.3, 1.5  # of the ideal, where link / product is in this range


@dataclass(frozen=True)
class Cell:
    """One case: link / product, the speed-up of a perfect overlap (1 without a link), and of auto over plain."""

    case: str
    link: float
    ideal: float
    ratio: Interval

    @property
    def of_ideal(self) -> float:
        return self.ratio.median / self.ideal

    @property
    def judged(self) -> bool:
        return FROM <= self.link <= TO


def cells(rows: Sequence[Row]) -> list[Cell]:
    """Of the cases whose automatic arm was timed and whose product and link are known."""
    found = []
    for row in rows:
        link = _link(row.extras) if row.role == "ours" and row.ratio is not None else None
        if link is not None and row.ratio is not None:
            found.append(Cell(row.case, link, (1 + link) / max(1.0, link), row.ratio))
    return found


def _link(extras: Mapping[str, float]) -> float | None:
    """link / product; 0 where no link was set, None where it is not known."""
    known = told(extras)
    if known is not None:
        return known.link_s / known.product_s
    return 0.0 if "product_s" in extras else extras.get("copy/gemm")


def markdown(name: str, found: Sequence[Cell]) -> str:
    """A row for each cell, and how many reach the goals."""
    if not found:
        return f"{name}: no cell tells the times of its product and its link alone\n"
    judged = [cell for cell in found if cell.judged]
    reached = sum(cell.of_ideal >= LEAST for cell in judged)
    promises = [promise(cell.ratio) for cell in found]
    lines = markdown_table(
        ("case", "link / product", "ideal", "plain / auto", f"of ideal (≥ {LEAST} wanted)", "never slower"),
        [
            (
                cell.case,
                f"{cell.link:.2f}",
                f"{cell.ideal:.2f}",
                f"{cell.ratio.median:.3f} [{cell.ratio.low:.3f}, {cell.ratio.high:.3f}]",
                f"{cell.of_ideal:.2f}" + ("" if cell.judged else " (not judged)"),
                said,
            )
            for cell, said in zip(found, promises)
        ],
    )
    return "\n".join(
        [
            f"{name}: {LEAST} of the ideal reached in {reached} of {len(judged)} cells with link / product from {FROM} "
            f"to {TO}; never slower: {promises.count('yes')} yes, {promises.count('open')} open, "
            f"{promises.count('no')} no",
            "",
            *lines,
            "",
        ]
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of `undertow bench overlap…`")
    for path in parser.parse_args(argv).results:
        print(markdown(path.stem, cells(Report.load(path).rows)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"overlap_goals: {error}")
