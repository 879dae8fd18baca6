"""`undertow report RUN_DIR`: a run as one HTML page that needs no network, no script and no other file.

Tables and plots of loss, stalls, memory and the overlap timeline, from what the run left behind. The timeline shows a
window around the middle save of the last start, because a whole run's spans are too small to see; `undertow` traces
open whole in Perfetto.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..dist.command_line import application, run_application
from ..dist.errors import UserError
from ..dist.units import format_bytes, format_count, format_seconds
from . import report_plots as plots
from .report_data import RunData, Span, read_run

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd}
th{text-align:left}td.n{text-align:right;font-variant-numeric:tabular-nums}svg{max-width:100%;height:auto}
.note{color:#666}.bad{color:#b00}
"""
BACKGROUND = ("copy", "flush", "fsync", "vote", "commit")
app = application()


def main(argv: list[str]) -> int:
    """Run the command line; the exit code."""
    return run_application(app, argv, "undertow report")


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="a run's folder")],
    output: Annotated[Path | None, typer.Option(help="the page (default RUN_DIR/report.html)")] = None,
) -> None:
    """Write RUN_DIR as one HTML page: loss, stall, memory, the overlap timeline, checkpoints."""
    run = read_run(run_dir)
    path = output or run_dir / "report.html"
    try:
        path.write_text(page(run))
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror})", remedy="pass --output FILE") from error
    typer.echo(f"{path}")


def page(run: RunData) -> str:
    """The whole page."""
    name = html.escape(run.folder.resolve().name)
    parts = [f"<h1>{name}</h1>", _summary(run)]
    parts += ["<h2 id=loss>Loss</h2>", plots.loss(run), plots.throughput(run)] if run.steps else []
    parts += ["<h2 id=stall>Stall</h2>", plots.stall(run), _stall_table(run)] if run.stalls else []
    parts += ["<h2 id=memory>Memory</h2>", plots.memory(run), _memory_table(run)] if run.memory else []
    if run.spans:
        window = window_of(run)
        parts += ["<h2 id=timeline>Overlap timeline</h2>", plots.timeline(window, "around one save, all ranks")]
        parts += [_overlap_table(run)]
    parts += ["<h2 id=checkpoints>Checkpoints</h2>", _checkpoint_table(run)] if run.checkpoints else []
    parts += ["<h2 id=config>Configuration</h2>", _config_table(run)] if run.config else []
    if run.missing:
        parts.append(f"<p class=note>Not in this folder: {html.escape(', '.join(run.missing))}.</p>")
    body = "\n".join(parts)
    head = f"<meta charset=utf-8><title>{name}: undertow report</title>\n<style>{STYLE}</style>"
    return f"<!doctype html>\n<html lang=en>{head}\n{body}\n</html>\n"


def window_of(run: RunData) -> tuple[Span, ...]:
    """The spans from one step before the middle save to the end of the step after its commit, of the last start that
    committed one: starts may lie hours apart."""
    spans, saves = run.spans, list[float]()
    for index in reversed(range(max(map(len, run.starts.values()), default=1))):
        mine = run.spans_of_start(index)
        saves = sorted({span.begin_s for span in mine if span.name == "commit" and not span.killed and span.rank == 0})
        if saves:
            spans = mine
            break
    if not saves:
        return tuple(sorted(spans, key=lambda span: span.begin_s)[:200])
    around_s = saves[len(saves) // 2]
    steps = sorted((span for span in spans if span.name == "step" and span.rank == 0), key=lambda span: span.begin_s)
    flush = [span for span in spans if span.name in ("snapshot", "copy") and span.begin_s <= around_s]
    begin_s = max((span.begin_s for span in flush), default=around_s)
    before = [step for step in steps if step.begin_s < begin_s][-2:]
    after = [step for step in steps if step.begin_s > around_s][:2]
    low_s = min([begin_s, *(step.begin_s for step in before)])
    high_s = max([around_s, *(step.begin_s + step.seconds for step in after)])
    return tuple(span for span in spans if span.begin_s < high_s and span.begin_s + span.seconds > low_s)


def overlap(run: RunData, rank: int) -> tuple[float, float]:
    """Seconds that `rank` worked on checkpoints in the background, and how many of them beneath its steps."""
    steps = _union((s.begin_s, s.begin_s + s.seconds) for s in run.spans if s.rank == rank and s.name == "step")
    work = _union((s.begin_s, s.begin_s + s.seconds) for s in run.spans if s.rank == rank and s.name in BACKGROUND)
    hidden = sum(max(0.0, min(b, d) - max(a, c)) for a, b in work for c, d in steps)
    return sum(b - a for a, b in work), hidden


def _union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    lines = [
        "<tr>"
        + "".join(f"<td{' class=n' if i else ''}>{html.escape(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for row in rows
    ]
    return f"<table><tr>{top}</tr>{''.join(lines)}</table>"


def _summary(run: RunData) -> str:
    rows = [("steps", str(len(run.steps)))]
    if run.steps:
        rows.append(("last loss", f"{run.steps[-1]['loss']:.4f} at step {run.steps[-1]['step']}"))
        rates = sorted(line["tokens_per_s"] for line in run.steps if "tokens_per_s" in line)
        rows += [("median throughput", format_count(rates[len(rates) // 2], "tokens/s"))] if rates else []
    if run.starts:
        rows += [("ranks", str(len(run.starts))), ("starts", str(max(map(len, run.starts.values()))))]
    if run.resumed_at:
        rows.append(("went on at step", ", ".join(map(str, run.resumed_at))))
    if run.stalls:
        stalls = sorted(run.stalls.values())
        rows.append(("median stall of a save", format_seconds(stalls[len(stalls) // 2] / 1e3)))
    if run.failed_saves:
        rows.append(("saves that failed", ", ".join(map(str, run.failed_saves))))
    if run.result:
        rows.append(("held out", f"{run.result['bits_per_byte']:.4f} bits per byte"))
        rows.append(("checksum of the weights", run.result["weights_hash"]))
        rows.append(("checksum of weights and optimizer", run.result["state_hash"]))
    else:
        rows.append(("state", "not finished: there is no result.json"))
    return _table(("run", ""), rows)


def _stall_table(run: RunData) -> str:
    return _table(("step", "stall"), ((str(step), format_seconds(ms / 1e3)) for step, ms in run.stalls.items()))


def _memory_table(run: RunData) -> str:
    rows = ((name, format_bytes(max(value for _, value in points))) for name, points in run.memory.items())
    return _table(("series", "most"), rows)


def _overlap_table(run: RunData) -> str:
    rows = []
    for rank in run.starts:
        work_s, hidden_s = overlap(run, rank)
        share = f"{hidden_s / work_s:.0%}" if work_s else "–"
        rows.append((f"rank {rank}", format_seconds(work_s), format_seconds(hidden_s), share))
    return _table(("", "checkpoint work in the background", "beneath a step", "share"), rows)


def _checkpoint_table(run: RunData) -> str:
    rows = ((str(e.step), format_bytes(e.nbytes), str(e.world_size or "–"), e.state) for e in run.checkpoints)
    return _table(("step", "size", "ranks", "state"), rows)


def _config_table(run: RunData) -> str:
    flat: list[tuple[str, str]] = []

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat.append((prefix, str(value)))

    walk("", dict(run.config))
    return _table(("name", "value"), flat)
