"""What becomes of a benchmark's report: a table on the terminal; JSON, Markdown and a plot in a folder; read again.

The JSON has everything, so the rest can be made from it later (`undertow bench NAME --read FILE`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from undertow.dist.errors import MissingPackage, UserError

if TYPE_CHECKING:
    from undertow.benchmarks.report import Report


def load(file: str, name: str) -> Report:
    """The report of the benchmark `name` in a JSON `file`."""
    from undertow.benchmarks.report import Report

    report = Report.load(Path(file))
    if report.benchmark != name:
        raise UserError(f"{file} is a result of '{report.benchmark}'", expected=f"a result of '{name}'")
    return report


def show(report: Report) -> None:
    """The table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    from undertow.benchmarks.report import COLUMNS

    table = Table(title=f"{report.benchmark}: {report.claim}", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("case", "arm") else "right", overflow="fold")
    case = ""
    for row in report.compared():
        if row.case != case:
            table.add_section()
        _, *cells = row.cells()
        table.add_row("" if row.case == case else row.case, *(cell.replace("**", "") for cell in cells))
        case = row.case
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for line in report.not_compared():
        console.print(f"not compared: {line}", markup=False)


def default_folder(aside: bool) -> Path:
    """The kept results, where the repository is there; `aside` for runs that must not replace them."""
    from undertow.benchmarks.facts import ROOT

    return Path("runs/bench") if aside or not (ROOT / "setup.cfg").exists() else ROOT / "benchmarks" / "results"


def _base(report: Report) -> str:
    from undertow.benchmarks.facts import slug

    return f"{report.benchmark}_{slug(report.facts['hardware'])}_{report.facts['date']}"


def keep(report: Report, folder: Path) -> None:
    """Only the JSON, from which `--read` makes the rest."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        report.dump(folder / f"{_base(report)}.json")
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}", remedy="name another folder with --output"
        ) from error


def write(report: Report, folder: Path, *, draw: bool) -> None:
    """JSON, Markdown and, with `draw`, the plot; says what was written."""
    base = _base(report)
    keep(report, folder)
    try:
        picture = _picture(report, folder / f"{base}.png") if draw else ""
        (folder / f"{base}.md").write_text(report.markdown(picture))
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}", remedy="name another folder with --output"
        ) from error
    typer.echo(f"written: {folder / base}.json, .md" + (", .png" if picture else ""))


def _picture(report: Report, path: Path) -> str:
    from undertow.benchmarks.plot import draw as draw_plot

    try:
        return draw_plot(report, path).name
    except MissingPackage as missing:
        typer.echo(f"no plot: {missing}", err=True)
        return ""
