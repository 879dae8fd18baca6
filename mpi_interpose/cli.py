"""`undertow mpi VERB`: run, doctor, build, explain, measure, report."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..dist.command_line import application, run_application
from . import build as building
from . import core, gpu_doctor, gpu_pairs, launch, measure, python_mpi, signatures, spec, toolchain
from .chosen import choose, family_of
from .errors import InterposeError

app = application(no_args_is_help=True, help="The MPI datatype interposer.")
Mpicc = Annotated[str | None, typer.Option(help="the MPI's compiler wrapper; default: the one of the launcher")]
Mpirun = Annotated[
    str | None,
    typer.Option(
        help="the launcher whose MPI is meant, with its options; default: the first mpirun or mpiexec on PATH"
    ),
]
Abi = Annotated[
    bool, typer.Option("--abi", help="the MPI-5 standard ABI flavour (found by itself for linked programs)")
]


FORTRAN = {
    "openmpi": "own entry points",
    "mpich": "comes through the C functions; own entry points for what mpi_f08 takes past them",
    "abi": "comes through the C functions",
}


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def run(
    command: Annotated[list[str], typer.Argument(help="the program, e.g. mpirun -n 4 ./app")],
    mode: Annotated[
        str, typer.Option(help="auto: where it wins; force: everywhere; check: both, compared; off")
    ] = "auto",
    report: Annotated[
        Path | None, typer.Option(help="write what was done to this JSON file and print it as a table")
    ] = None,
    mpicc: Mpicc = None,
    abi: Abi = False,
) -> None:
    """Run a program under the preload."""
    status = launch.run(list(command), mode, report, mpicc, abi)
    if report and report.exists():
        show_report(json.loads(report.read_text()), _console(stderr=True))
    raise typer.Exit(status)


@app.command()
def build(mpirun: Mpirun = None, mpicc: Mpicc = None, abi: Abi = False) -> None:
    """Build the preload for an MPI and print its path (for LD_PRELOAD)."""
    choice = choose(_words(mpirun), mpicc, abi)
    sys.stderr.write(f"for {choice}\n")
    sys.stdout.write(f"{building.library(choice.mpi)}\n")


def _words(mpirun: str | None) -> list[str]:
    """`--mpirun` as the command it is; InterposeError when there is no such program."""
    words = shlex.split(mpirun) if mpirun else []
    if words and not shutil.which(words[0]):
        raise InterposeError(f"--mpirun {words[0]} is not a program")
    return words


@app.command()
def doctor(
    mpirun: Mpirun = None,
    mpicc: Mpicc = None,
    abi: Abi = False,
) -> None:
    """Say which MPI is found, which flavour serves it, what is intercepted and what will happen.

    Started on several ranks (mpirun -n 4 undertow mpi doctor): which way device buffers take between each two of them.
    """
    if gpu_pairs.started():
        gpu_pairs.main()
        return
    choice = choose(_words(mpirun), mpicc, abi)
    mpi = choice.mpi
    have = [symbol for symbol in toolchain.SYMBOLS if symbol in mpi.symbols]
    large = sum(symbol.endswith("_c") for symbol in have)
    library = building.library(mpi)
    model = measure.model_file(library)
    rows = [
        ("MPI", f"{mpi.version}, MPI {mpi.standard}"),
        ("chosen by", choice.why),
        ("library", mpi.library),
        ("compiler wrapper", mpi.mpicc or "none that works: the preload must be a shipped one"),
        ("launcher", choice.launcher or "no mpirun or mpiexec found"),
        ("flavour", mpi.flavour),
        ("preload", f"{library} ({building.origin(mpi)})"),
        ("intercepted", f"{len(have)} functions, {large} of them large-count"),
        ("not in this MPI", missing(mpi)),
        ("Fortran", FORTRAN[mpi.flavour]),
        ("kernels", core.load().undertow_core_kernels().decode()),
        ("model", str(model) if model.exists() else measure.shipped_table(mpi, core.processor())),
        *gpu_doctor.rows(mpi),
        ("switched off", "yes, by UNDERTOW_DISABLE" if launch.disabled() else "no"),
    ]
    rows += python_mpi.rows(choice, python_mpi.ask())
    family = family_of(choice.launcher) if choice.launcher else ""
    if family and mpi.flavour != "abi" and family != mpi.flavour:
        rows.append(
            ("warning", f"{choice.launcher} starts ranks of {family}, the compiler wrapper is of {mpi.flavour}")
        )
    width = max(len(name) for name, _ in rows)
    sys.stdout.write("".join(f"{name:<{width}}  {text}\n" for name, text in rows))


def missing(mpi: toolchain.Mpi) -> str:
    """Functions that could be intercepted but that this MPI does not have, and what follows from that."""
    needed = [f"MPI_{name}" for name in signatures.OWN if f"MPI_{name}" not in mpi.symbols]
    if needed:
        return f"{', '.join(needed)}: without these every call is handed on"
    made = signatures.NEWER if building.fixed_abi(mpi) else ()  # out of older functions
    lacking = [symbol for symbol in toolchain.SYMBOLS if symbol not in (*mpi.symbols, *made)]
    plain = [symbol for symbol in lacking if not symbol.endswith("_c")]
    parts = plain + ([f"{len(lacking) - len(plain)} large-count functions"] if len(lacking) > len(plain) else [])
    return f"{', '.join(parts)}; not exported, the others are served" if parts else "nothing is missing"


@app.command()
def explain(
    datatype: str = typer.Argument(
        ..., help="e.g. 'vector(1024, 4, 16, float)', or an IR such as '(loop 3 16 (bytes 4))'"
    ),
    count: Annotated[int, typer.Option(min=1, help="elements per message")] = 1,
    mpirun: Mpirun = None,
    mpicc: Mpicc = None,
    report: Annotated[
        Path | None, typer.Option(help="a report of `run --report`: what that run's timed calls said of the datatype")
    ] = None,
) -> None:
    """Show a datatype's IR before and after the passes, its plan, and the path the model would take."""
    if datatype.lstrip().startswith("("):
        made = spec.Spec(core.parse(datatype), 0, 0, 0)
    else:
        made = spec.read(datatype)
    ir = core.parse(made.ir)
    plan = core.describe(ir, made.lb, made.extent)
    sys.stdout.write(f"IR         {ir}\ncanonical  {core.normalise(ir)}\nplan       {plan}\n")
    for line in measure.corrections(_read_report(report), plan) if report else []:
        sys.stdout.write(line + "\n")
    try:
        choice = choose(_words(mpirun), mpicc, False)
    except InterposeError as error:
        sys.stdout.write(f"model      unknown: {error}\n")
        return
    sys.stdout.write(f"MPI        {choice}\n")
    known = 0 if datatype.lstrip().startswith("(") else spec.leaf(datatype)
    for line in measure.predictions(choice.mpi, plan, count, known):
        sys.stdout.write(line + "\n")


@app.command(name="measure")
def measure_(
    output: Annotated[
        Path | None, typer.Option(help="the table; default: beside the preload, where it is found by itself")
    ] = None,
    quick: Annotated[bool, typer.Option(help="two message sizes and fewer rounds: a look only")] = False,
    rounds: Annotated[int | None, typer.Option(min=6, max=201, help="samples per cell", show_default=False)] = None,
    mpirun: Mpirun = None,
    remote: Annotated[bool, typer.Option("--remote", help="the two ranks of --mpirun are on two hosts")] = False,
    machine: Annotated[Path | None, typer.Option(help="Machine file; default: the one of `undertow probe`")] = None,
    mpicc: Mpicc = None,
) -> None:
    """Measure the library against our kernels on this machine and write the model's table."""
    from . import policy

    start = _words(mpirun)
    choice = choose(start, mpicc, False)
    mpi = choice.mpi
    if not mpi.mpicc:
        raise InterposeError(f"measuring takes an mpicc and its compiler; found only the library {mpi.library}")
    library = building.library(mpi)
    wanted = rounds or (measure.QUICK_ROUNDS if quick else measure.ROUNDS)
    console = Console(stderr=True)
    console.print(f"measuring {choice}", highlight=False)
    start = start or measure.launcher(mpi, choice.launcher)
    with console.status(f"timing {mpi.version[:40].strip()}") as status:

        def progress(done: int, title: str) -> None:
            status.update(f"timing {mpi.version[:40].strip()}: {done} cells, {title}")

        cells = measure.measure(mpi, library, start, rounds=wanted, quick=quick, progress=progress)
        links = {cell.link for cell in cells}
        if remote and links != {"remote"}:
            raise InterposeError(
                f"--remote, but the two ranks are on {policy.LINKS[links.pop()]}; expected a --mpirun that uses two "
                "hosts"
            )
        fresh = [] if quick else measure.apart(mpi, library, start, rounds=wanted, progress=progress)
    target = output or measure.model_file(library)
    found = measure.write(cells, mpi, target, fresh=fresh)
    measure.write_machine(found, mpi, machine or measure.machine_file())
    table = policy.Policy(target.read_text())
    if cells:
        for run, where in ((cells, ""), (fresh, ", sent by fresh programs")):
            if held := [cell for cell in run if cell.held]:
                said = policy.summary(policy.judge(held, table))
                console.print(f"choices of the table on cells it has not seen{where}: {said}")
    sys.stdout.write(f"{target}\n")


@app.command()
def report(file: Path) -> None:
    """Print a report that `run --report` wrote."""
    show_report(_read_report(file), _console())


def _console(*, stderr: bool = False) -> Console:
    """A file or a pipe has no width of its own, and a table of ten columns is unreadable in eighty."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 160, highlight=False)


def _read_report(file: Path) -> dict:
    try:
        data = json.loads(file.read_text())
        missing = {"ranks", "mode", "library", "types", "refused", "mismatches"} - data.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise InterposeError(f"cannot read the report {file} ({type(error).__name__}: {error})") from error
    if missing:
        raise InterposeError(
            f"{file} is no report of `undertow mpi run --report`: it lacks {', '.join(sorted(missing))}"
        )
    return data


def show_report(data: dict, console: Console) -> None:
    """A table of datatypes, the largest first; then what was refused."""
    title = f"datatypes on {len(data['ranks'])} rank(s), mode {data['mode']}, {data['library']}"
    table = Table(title=title, title_justify="left")
    for title in (
        "layout",
        "class",
        "bytes",
        "pack",
        "unpack",
        "send",
        "recv",
        "MiB moved",
        "ms ours / library",
        "ms saved",
    ):
        table.add_column(title, overflow="fold", justify="left" if title in ("layout", "class") else "right")
    for row in data["types"][:30]:
        uses = [row.get(use) for use in launch.USES]
        if not any(uses):
            continue
        moved = sum(use["bytes"] for use in uses if use) / 2**20
        ours, theirs = (sum(use[key] for use in uses if use) / 1e6 for key in ("ours_ns", "library_ns"))
        cells = [f"{use['taken']}/{use['taken'] + use['passed']}" if use else "" for use in uses]
        sampled = f"{ours:.2f} / {theirs:.2f}" if ours or theirs else ""
        saved = sum(use.get("saved_ns", 0) for use in uses if use) / 1e6
        numbers = (f"{moved:.1f}", sampled, f"{saved:.2f}" if saved else "")
        table.add_row(row["layout"][:60], row["class"], str(row["size"]), *cells, *numbers)
    console.print(table)
    for row in data["types"]:
        for one in row.get("checked", []):
            if one["decision"] == "library" and one["link"]:
                what = f"{one['use']} ({one['link']}), {one['least_bytes']} B and more: {row['layout'][:60]}"
                console.print(f"left to the library by timed {one['of']}: {what}")
    console.print("taken/all calls; times are those of the sampled calls")
    total = sum(row.get(use, {}).get("saved_ns", 0) for row in data["types"] for use in launch.USES) / 1e6
    console.print(
        f"saved: {total:.2f} ms on all ranks together, modelled: calls taken times what the table says of each"
    )
    device = data.get("gpu", {})
    if device.get("launches") or device.get("copies"):
        how = "PTX" if device["ptx_loads"] else "machine code"
        console.print(
            f"device: {device['launches']} launches, {device['copies']} copies, {device['bytes'] / 2**20:.2f} MiB; "
            f"{how} of the kernels loaded in {device['load_us'] / 1000:.1f} ms on all ranks together"
        )
    for why, times in data["refused"].items():
        console.print(f"passed through {times}x: {why}")
    if data["mismatches"]:
        console.print(f"[bold]{data['mismatches']} mismatches with the library (its results were used)[/bold]")


def main(argv: list[str]) -> int:
    """Entry of `undertow mpi`; returns the exit status."""
    try:
        return run_application(app, argv, "undertow mpi")
    except InterposeError as error:
        sys.stderr.write(f"undertow mpi: {error}\n")
        return error.exit_code


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main(sys.argv[1:]))
