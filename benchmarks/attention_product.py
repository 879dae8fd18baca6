"""Is every attention schedule exact? All of them × layouts × masks × heads × 1 to 5 ranks, forward and backward.

    undertow bench attention_product

No timing and no process group: all ranks run in this process, in float64, on lengths that the ranks do not divide. Each
plan is proved by `check`, run, and its out, log-sum-exp and gradients compared with attention written out in full; a
wrong cell is named and makes the exit code 1. The tests draw from this product at random; this is the whole of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from undertow.benchmarks.case import Benchmark
from undertow.benchmarks.facts import facts
from undertow.comms import local
from undertow.comms.builders.attention_shape import Heads
from undertow.comms.check import check
from undertow.dist.progress import Progress
from undertow.parallel.masks import Mask
from undertow.parallel.partition import LAYOUTS, positions_of
from undertow.parallel.token_ring.block_ops import ops
from undertow.parallel.token_ring.problem import SCHEDULES, Problem

LENGTH, SCALE, DIM, WIDE = 26, 0.3, 8, 16
TOLERANCE = 1e-9  # float64: 2⁻⁵³ of values up to about 10, over some hundred additions, twice
RANKS = (1, 2, 3, 4, 5)
HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1)}
BOUNDS = (0, 7, 7, 19, LENGTH)
MASKS = {  # keys, mask
    "full": (LENGTH, Mask()),
    "causal": (LENGTH, Mask(True)),
    "window": (LENGTH, Mask(True, 5)),
    "prefix": (LENGTH, Mask(True, None, 9)),
    "documents": (LENGTH, Mask(True, None, 0, BOUNDS, BOUNDS)),
    "causal, fewer queries": (LENGTH + 15, Mask(True)),
    "causal, more queries": (LENGTH - 15, Mask(True)),
}


@dataclass(frozen=True)
class Cell:
    """`error`: the largest of out, lse, dq, dk, dv; `reason` why the schedule does not exist for the problem."""

    schedule: str
    layout: str
    mask: str
    heads: str
    ranks: int
    error: float = 0.0
    reason: str = ""


def visible(mask: Mask, lq: int, lk: int) -> torch.Tensor:
    """[Lq, Lk] bool by definition: within each document the last query stands at the last key."""
    q_bounds = mask.cu_seqlens_q or (0, lq)
    k_bounds = mask.cu_seqlens_k or mask.cu_seqlens_q or (0, lk)
    seen = torch.zeros(lq, lk, dtype=torch.bool)
    for qa, qb, ka, kb in zip(q_bounds, q_bounds[1:], k_bounds, k_bounds[1:]):
        behind = torch.arange(qa, qb)[:, None] - qb - (torch.arange(ka, kb)[None] - kb)  # how far the key lies back
        inside = torch.ones_like(behind, dtype=torch.bool)
        if mask.causal:
            inside = (behind >= 0) | (torch.arange(ka, kb)[None] < mask.prefix)
        if mask.window is not None:
            inside &= behind < mask.window
        seen[qa:qb, ka:kb] = inside
    return seen


def exact(problem: Problem, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """out, lse, dq, dk, dv of the whole, rows first."""
    q, k, v = (tensors[name].clone().requires_grad_() for name in "qkv")
    share = problem.heads.q_heads // problem.heads.kv_heads
    wide_k, wide_v = k.repeat_interleave(share, 2), v.repeat_interleave(share, 2)
    scores = torch.einsum("qbhd,kbhd->bhqk", q, wide_k) * SCALE
    scores = scores.masked_fill(~visible(problem.mask, problem.lq, problem.lk), float("-inf"))
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0).unsqueeze(-1))
    out = torch.einsum("bhqk,kbhd->qbhd", weights, wide_v)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), tensors["dout"])
    return {"out": out.detach(), "lse": lse.detach().permute(2, 0, 1), "dq": dq, "dk": dk, "dv": dv}


def error(problem: Problem, name: str, tensors: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Run both phases of the schedule called `name`; the largest difference on any rank, inf for one in infinities."""
    given = tensors | {"lse": wanted["lse"], "delta": (tensors["dout"] * wanted["out"]).sum(-1)}
    copies, table, worst = problem.kv_copies(name), ops(problem, problem.inner(name), SCALE), 0.0
    for backward, names in ((False, "qkv"), (True, tuple(given))):
        plan = problem.schedule(name, backward=backward)
        check(plan, rendezvous=True)
        inputs = [
            {n: given[n][at[n]].repeat_interleave(copies, 2) if n in "kv" else given[n][at[n]] for n in names}
            for at in (_rows(problem, rank, names) for rank in range(problem.world))
        ]
        for rank, found in enumerate(local.run(plan, inputs, table)):
            for n, x in found.items():
                mine = x.unflatten(2, (-1, copies)).sum(3) if n in ("dk", "dv") else x
                right = wanted[n][_rows(problem, rank, (n,))[n]]
                same = mine == right  # infinities too
                gap = torch.where(same, torch.zeros_like(right), (mine - right).abs()).nan_to_num(float("inf"))
                worst = max(worst, float(gap.max()) if gap.numel() else 0.0)
    return worst


def drawn(problem: Problem) -> dict[str, torch.Tensor]:
    """q, k, v, dout of the whole, rows first, in float64."""
    h = problem.heads
    sizes = {"q": (problem.lq, h.q_heads, h.head_dim), "k": (problem.lk, h.kv_heads, h.head_dim),
             "v": (problem.lk, h.kv_heads, h.v_dim), "dout": (problem.lq, h.q_heads, h.v_dim)}  # fmt: skip
    return {n: torch.randn(rows, 1, *size, dtype=torch.float64) for n, (rows, *size) in sizes.items()}


def _rows(problem: Problem, rank: int, names: Sequence[str]) -> dict[str, torch.Tensor]:
    keys = ("k", "v", "dk", "dv")
    return {n: positions_of((problem.k_spans if n in keys else problem.q_spans)[rank]) for n in names}


def problems(filter_: str, ranks: Sequence[int]) -> Iterator[tuple[Cell, Problem]]:
    """Every combination once; documents' own layout gets masks without documents as one document."""
    for layout, what, kind, world in product(LAYOUTS, MASKS, HEADS, ranks):
        lk, mask = MASKS[what]
        if layout == "zigzag_documents" and mask.cu_seqlens_q is None:
            if mask.prefix:
                continue  # a prefix and documents exclude each other
            mask = Mask(mask.causal, mask.window, 0, (0, LENGTH), (0, lk))
        heads = Heads(1, *HEADS[kind], DIM, WIDE, "float64", "float64")
        problem = Problem(world, LENGTH, lk, heads, mask, layout)
        for name in SCHEDULES:
            if filter_ in name:
                yield Cell(name, layout, what, kind, world, reason=problem.possible(name)), problem


def table(cells: Sequence[Cell]) -> Table:
    """Schedules by layouts: cells and the worst error."""
    shown = Table(title=f"against full attention in float64; wrong is more than {TOLERANCE:g}", title_justify="left")
    for column in ("schedule", *LAYOUTS, "impossible", "wrong"):
        shown.add_column(column, justify="left" if column == "schedule" else "right")
    for name in dict.fromkeys(cell.schedule for cell in cells):
        mine = [cell for cell in cells if cell.schedule == name]
        ran = [cell for cell in mine if not cell.reason]
        columns = []
        for layout in LAYOUTS:
            errors = [cell.error for cell in ran if cell.layout == layout]
            columns.append(f"{len(errors)}: {max(errors):.1e}" if errors else "–")
        wrong = sum(cell.error > TOLERANCE for cell in ran)
        shown.add_row(name, *columns, str(len(mine) - len(ran)), str(wrong))
    return shown


def run(quick: bool, rounds: int | None, filter_: str, folder: Path) -> int:
    """The whole product, or 1 to 3 ranks of it; writes attention_product.json and .txt into `folder`."""
    torch.manual_seed(0)
    todo, found, last = list(problems(filter_, RANKS[:3] if quick else RANKS)), list[Cell](), None
    tensors, wanted = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    with Progress(len(todo), "product", unit="cell") as progress:
        for cell, problem in todo:
            if problem is not last:
                last, tensors = problem, drawn(problem)
                wanted = exact(problem, tensors)
            if not cell.reason:
                cell = replace(cell, error=error(problem, cell.schedule, tensors, wanted))
            found.append(cell)
            progress.update()
    wrong, shown, screen = [cell for cell in found if cell.error > TOLERANCE], table(found), Console(width=150)
    screen.print(shown)
    for cell in wrong:
        screen.print(f"wrong: {cell}")
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"facts": facts(("torch",)), "cells": [asdict(cell) for cell in found]}, indent=1)
    (folder / "attention_product.json").write_text(text + "\n")
    with (folder / "attention_product.txt").open("w") as file:
        Console(width=150, file=file).print(shown)
    return int(bool(wrong))


BENCHMARK = Benchmark(
    name="attention_product",
    claim="every attention schedule is exact for every layout, mask and ratio of heads",
    cases=lambda context: (),
    program=run,
)

if __name__ == "__main__":
    from undertow.benchmarks.cli import main

    sys.exit(main(["attention_product", *sys.argv[1:]]))
