"""`undertow plan`: the pre-flight of a job as a table; exit code 1 when it does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..dist.errors import UserError
from ..dist.machine import Machine
from ..dist.units import parse_bytes, parse_seconds
from ..parallel.stream.cli import KNOWN, OPTIMIZERS, shape_of
from .plan import RESTART_S, Job, Preflight, preflight

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
_FILE_COLUMNS = 160  # a file or pipe has no width of its own


def main(argv: list[str]) -> int:
    """Run the command line; the exit code."""
    try:
        result = app(args=argv, prog_name="undertow plan", standalone_mode=True)
    except SystemExit as stop:
        return int(stop.code or 0)
    return int(result or 0)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help=f"a config.json, its folder, or one of {', '.join(KNOWN)}")],
    ranks: Annotated[int, typer.Option(help="GPUs of the job")],
    seq_len: Annotated[int, typer.Option(help="tokens of a sequence")],
    batch: Annotated[int, typer.Option(help="sequences of a step for each data-parallel rank")] = 1,
    context: Annotated[int, typer.Option(help="ranks that share a sequence")] = 1,
    tensor: Annotated[int, typer.Option(help="ranks that share a layer")] = 1,
    memory: Annotated[str, typer.Option(help="memory of a device")] = "80GB",
    host: Annotated[str, typer.Option(help="host memory for each rank; 0 for none")] = "100GB",
    optimizer: Annotated[str, typer.Option(help=f"{', '.join(OPTIMIZERS)}")] = "adamw+master",
    shard: Annotated[bool, typer.Option(help="spread weights and state over the data axis (ZeRO 3, FSDP)")] = True,
    mtbf: Annotated[str, typer.Option(help="mean time between failures of the whole job")] = "6h",
    restart: Annotated[str, typer.Option(help="from a failure until training goes on")] = f"{RESTART_S:g}s",
    machine: Annotated[Path | None, typer.Option(metavar="FILE", help="what `undertow probe` wrote")] = None,
) -> None:
    """Say before the job runs whether it fits, how long a step takes, and what checkpoints and failures cost."""
    if optimizer not in OPTIMIZERS:
        raise UserError(f"no optimizer is called '{optimizer}'", expected=f"one of {', '.join(OPTIMIZERS)}")
    job = Job(
        shape=shape_of(model),
        ranks=ranks,
        tokens=seq_len,
        batch=batch,
        context=context,
        tensor=tensor,
        state_bytes=OPTIMIZERS[optimizer],
        sharded=shard,
        device_bytes=parse_bytes(memory, name="--memory"),
        host_bytes=parse_bytes(host, name="--host"),
        mtbf_s=parse_seconds(mtbf, name="--mtbf"),
        restart_s=parse_seconds(restart, name="--restart"),
    )
    known = Machine.load(machine) if machine else None
    found = preflight(job, known)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=_FILE_COLUMNS)
    console.print(
        f"data {job.data} × context {context} × tensor {tensor} = {ranks} ranks; "
        f"{known.name if known else 'assumed rates: pass --machine FILE from `undertow probe`'}"
    )
    console.print(_table(found))
    if not found.fits:
        raise typer.Exit(1)


def _table(found: Preflight) -> Table:
    table = Table("question", "answer", "calculation", "source")
    for line in found.lines:
        table.add_row(line.question, line.answer, line.calculation, line.source)
    return table
