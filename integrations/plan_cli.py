"""`undertow plan`: the pre-flight of a job as a table; exit code 1 when it does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..dist.command_line import application, run_application
from ..dist.errors import UserError
from ..dist.machine import Machine
from ..dist.units import format_bytes, format_seconds, parse_bytes, parse_seconds
from ..parallel.stream.cli import KNOWN, OPTIMIZERS, shape_of
from .plan import Preflight, preflight
from .plan_compare import Compared, job_of
from .plan_compare import compare as made
from .plan_job import DTYPES, RESTART_S, Job
from .report_data import read_run

app = application()
_FILE_COLUMNS = 160  # a file or pipe has no width of its own


def main(argv: list[str]) -> int:
    """Run the command line; the exit code."""
    return run_application(app, argv, "undertow plan")


@app.command()
def plan(
    model: Annotated[str, typer.Option(help=f"a config.json, its folder, or one of {', '.join(KNOWN)}")] = "",
    ranks: Annotated[int, typer.Option(show_default=False, help="GPUs of the job")] = 0,
    seq_len: Annotated[int, typer.Option(show_default=False, help="tokens of a sequence")] = 0,
    batch: Annotated[int, typer.Option(help="sequences of a step for each data-parallel rank")] = 1,
    context: Annotated[int, typer.Option(help="ranks that share a sequence")] = 1,
    tensor: Annotated[int, typer.Option(help="ranks that share a layer")] = 1,
    dtype: Annotated[str, typer.Option(help=f"of weights and arithmetic: {', '.join(DTYPES)}")] = "bfloat16",
    stream: Annotated[
        str, typer.Option(help="streamed backpropagation: auto (where a plain step does not fit), on, off")
    ] = "auto",
    memory: Annotated[str, typer.Option(help="memory of a device")] = "80GB",
    host: Annotated[str, typer.Option(help="host memory for each rank; 0 for none")] = "100GB",
    optimizer: Annotated[str, typer.Option(help=f"{', '.join(OPTIMIZERS)}")] = "adamw+master",
    shard: Annotated[
        bool, typer.Option(help="spread weights and state over the data and context axes (ZeRO 3, FSDP)")
    ] = True,
    mtbf: Annotated[str, typer.Option(help="mean time between failures of the whole job")] = "6h",
    restart: Annotated[str, typer.Option(help="from a failure until training goes on")] = f"{RESTART_S:g}s",
    machine: Annotated[Path | None, typer.Option(metavar="FILE", help="what `undertow probe` wrote")] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_DIR", help="a run of `undertow train`: plan that job, print measured beside predicted"
        ),
    ] = None,
) -> None:
    """Say before the job runs whether it fits, how long a step takes, and what checkpoints and failures cost."""
    if optimizer not in OPTIMIZERS:
        raise UserError(f"no optimizer is called '{optimizer}'", expected=f"one of {', '.join(OPTIMIZERS)}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}", expected=f"one of {', '.join(DTYPES)}")
    if compare is not None and (model or ranks or seq_len):
        raise UserError("--compare reads the job from the run", remedy="leave out --model, --ranks and --seq-len")
    needed = {"--model": model, "--ranks": ranks, "--seq-len": seq_len}
    missing = [name for name, value in needed.items() if not value]
    if compare is None and missing:
        raise UserError(
            f"no job to plan without {' and '.join(missing)}", expected=f"{', '.join(needed)}; or --compare RUN_DIR"
        )
    common = {
        "device_bytes": parse_bytes(memory, name="--memory"),
        "host_bytes": parse_bytes(host, name="--host"),
        "mtbf_s": parse_seconds(mtbf, name="--mtbf"),
        "restart_s": parse_seconds(restart, name="--restart"),
    }
    run = read_run(compare) if compare else None
    job = (
        job_of(run, **common)
        if run
        else Job(
            shape=replace(shape_of(model), element_size=DTYPES[dtype]),
            ranks=ranks,
            tokens=seq_len,
            batch=batch,
            context=context,
            tensor=tensor,
            state_bytes=OPTIMIZERS[optimizer],
            sharded=shard,
            stream=stream,
            **common,
        )
    )
    known = Machine.load(machine) if machine else None
    found = preflight(job, known)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=_FILE_COLUMNS)
    console.print(
        f"data {job.data} × context {job.context} × tensor {job.tensor} = {job.ranks} ranks; "
        f"{known.name if known else 'assumed rates: pass --machine FILE from `undertow probe`'}"
    )
    console.print(_table(found))
    if run:
        console.print(_compared(f"{compare}", made(run, job, found)))
    if not found.fits:
        raise typer.Exit(1)


def _table(found: Preflight) -> Table:
    table = Table("question", "answer", "calculation", "source")
    for line in found.lines:
        table.add_row(line.question, line.answer, line.calculation, line.source)
    return table


def _compared(name: str, rows: list[Compared]) -> Table:
    table = Table("", "predicted", "measured", "measured / predicted", "how", title=name, title_justify="left")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(row.question, _say(row.predicted, row.unit), _say(row.measured, row.unit), ratio, row.how)
    return table


def _say(value: float | None, unit: str) -> str:
    if value is None:
        return "not in the run"
    return {"B": format_bytes, "s": format_seconds}.get(unit, lambda amount: f"{amount:,.0f} {unit}")(value)
