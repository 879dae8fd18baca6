"""What a comparison leaves behind: a table for people (terminal and table.md), result.json for programs, plots."""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev

import torch
from rich.console import Console
from rich.table import Table

from ...dist.errors import UserError
from .contract import PRESETS, Workload
from .journal import JOURNAL, trajectory
from .judge import Verdict, alone
from .loop import Outcome
from .plots import plot


def _spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over the seeds that ended with a number."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "nan" if values else "–"
    digits = 0 if all(value.is_integer() and abs(value) > 1 for value in finite) else 3  # a count has no fraction
    shown = f"{fmean(finite):.{digits}f}"
    if len(set(finite)) > 1 or (digits and len(finite) > 1):
        shown += f" ± {stdev(finite):.3f}"
    return shown if len(finite) == len(values) else f"{shown} ({len(finite)} of {len(values)})"


def claim_rows(verdicts: Sequence[Verdict]) -> list[tuple[str, ...]]:
    rows = []
    for verdict in verdicts:
        claim = verdict.claim
        asked = "≥ " if claim.relation == ">=" else "≤ "
        if claim.baseline is None:
            asked += f"{claim.margin:g} (fixed)"
        else:
            asked += f"{_spread(verdict.references)} ({claim.baseline}, {claim.margin:+g})"
        rows.append(
            (
                verdict.workload,
                claim.text,
                f"{claim.metric}: {claim.variant} {_spread(verdict.values)}",
                asked,
                f"{sum(verdict.each)}/{len(verdict.seeds)}",
                verdict.word,
            )
        )
    return rows


CLAIM_HEAD = ("workload", "claim", "measured", "asked", "seeds", "verdict")


def variant_rows(workload: Workload, outcomes: Sequence[Outcome]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """One row per variant: its metrics over the seeds, and what it cost."""
    names = list(dict.fromkeys(name for outcome in outcomes for name in outcome.metrics))
    head = ("variant", "what it is", *names, "updates", "CPU s")
    rows = []
    for name, variant in workload.variants.items():
        own = [outcome for outcome in outcomes if outcome.variant == name]
        if own:
            diverged = sum(outcome.diverged for outcome in own)
            ended = [outcome for outcome in own if outcome.metrics]
            cells = [_spread([outcome.metrics.get(metric, float("nan")) for outcome in ended]) for metric in names]
            note = variant.note + (f" (diverged {diverged}/{len(own)})" if diverged else "")
            note += f" (stopped before its end {len(own) - len(ended)}/{len(own)})" if len(ended) < len(own) else ""
            updates = str(round(fmean(outcome.updates for outcome in own)))
            rows.append((name, note, *cells, updates, f"{fmean(outcome.cpu_s for outcome in own):.1f}"))
    return head, rows


LIST_HEAD = ("name", "method and paper", "variants (first: the method)", "claims", "exercises")


def list_row(workload: Workload) -> tuple[str, ...]:
    """What a workload is: its variants and claims one a line, with the presets of those that not every preset has."""

    def line(text: str, presets: Sequence[str]) -> str:
        return text if tuple(presets) == PRESETS else f"{text} ({', '.join(presets)})"

    variants = [line(name, variant.presets) for name, variant in workload.variants.items()]
    claims = [line(claim.text, claim.presets) for claim in workload.claims]
    systems = sorted(workload.exercises)
    return (
        workload.name,
        f"{workload.title}\n{workload.paper}",
        *("\n".join(part) for part in (variants, claims, systems)),
    )


def show(head: Sequence[str], rows: Sequence[Sequence[str]], title: str, lines: bool = False) -> None:
    """Print a table: as wide as the terminal, or wide enough for a log."""
    table = Table(title=title, title_justify="left", show_lines=lines)
    for name in head:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def show_claims_of(workload: Workload, preset: str, outcome: Outcome, device: str) -> None:
    """What is claimed about one run's variant: the verdicts, as far as it can be judged without a rival."""
    verdicts, others = alone(workload, preset, outcome)
    if verdicts:
        show(CLAIM_HEAD, claim_rows(verdicts), f"claims at preset {preset}, one seed")
    if others:
        command = f"undertow workloads claim {workload.name} --preset {preset} --device {device}"
        print(f"to be judged beside its rivals, by `{command}`:")
        for claim in others:
            print(f"  {claim.text} ({claim.metric}: {claim.variant}, rival: {claim.baseline})")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def write(
    out: Path,
    preset: str,
    done: Sequence[tuple[Workload, Sequence[Outcome]]],
    verdicts: Sequence[Verdict],
    seeds: Sequence[int],
    *,
    plots: bool = True,
) -> None:
    """table.md, result.json and the plots. `seeds`: those asked for, whether or not their runs have ended."""
    done = [(workload, outcomes) for workload, outcomes in done if outcomes]
    systems = sorted({system for _, outcomes in done for outcome in outcomes for system in outcome.systems})
    parts = [
        f"# Claims at preset `{preset}`, seeds {', '.join(map(str, seeds))}\n",
        f"{platform.machine()}, torch {torch.__version__}, systems on: {', '.join(systems) or 'none'}. "
        "± is the standard deviation over seeds. A claim holds when it holds on the mean and in more than half of the "
        "seeds, and is open while one of its runs has not ended.\n",
        markdown(CLAIM_HEAD, claim_rows(verdicts)),
    ]
    for workload, outcomes in done:
        parts.append(f"## {workload.title}\n\n{workload.paper}. Variants at equal {workload.equal}.\n")
        parts.append(markdown(*variant_rows(workload, outcomes)))
    (out / "table.md").write_text("\n".join(parts))
    content = {
        "preset": preset,
        "torch": torch.__version__,
        "seeds": list(seeds),
        "runs": [{**asdict(o), "losses": len(o.losses)} for _, outcomes in done for o in outcomes],
        "claims": [{**asdict(v), "each": v.each, "holds": v.holds, "verdict": v.word} for v in verdicts],
    }
    (out / "result.json").write_text(json.dumps(content, indent=1) + "\n")
    if plots:
        plot(out, done)


def read(folder: Path) -> tuple[str, list[Outcome], list[int]]:
    """The preset, runs (with their losses) and seeds asked for of a comparison that `write` left in `folder`."""
    try:
        content = json.loads((folder / "result.json").read_text())
        runs = [Outcome(**{**run, "losses": []}) for run in content["runs"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        wanted = "a folder of `undertow workloads compare`"
        raise UserError(f"{folder} holds no comparison ({error})", expected=wanted) from error
    for run in runs:
        path = home(folder, run.workload, run.seed) / variant_name(run.variant) / JOURNAL
        run.losses.extend(trajectory(path).values())
    return content["preset"], runs, content.get("seeds") or sorted({run.seed for run in runs})


def home(out: Path, workload: str, seed: int) -> Path:
    """Where a comparison keeps the runs of one seed."""
    return out / workload / f"seed-{seed}"


def variant_name(variant: str) -> str:
    """A variant as a folder's name."""
    return "".join(c if c.isalnum() else "-" for c in variant)
