"""`undertow bench NAME`: runs a benchmark, shows its table, writes JSON, Markdown and plot, compares with an older run.

Works alone and under torchrun (`torchrun --nproc-per-node 4 -m undertow bench NAME`): every rank runs the same cases,
the slowest rank's time counts, and rank 0 reports. Quick runs, and runs of an installed package, write to runs/bench,
so that they never replace the results that are kept in benchmarks/results.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from undertow.benchmarks import published
from undertow.dist.command_line import application, run_application
from undertow.dist.errors import UserError
from undertow.dist.machine import Machine

if TYPE_CHECKING:
    from undertow.benchmarks.case import Benchmark
    from undertow.benchmarks.report import Report, Row
    from undertow.benchmarks.timing import Peers

QUICK_ROUNDS = 7
app = application()


def main(argv: list[str]) -> int:
    """Run the command line; returns 1 when an answer was wrong or an arm failed."""
    return run_application(app, argv, "undertow bench")


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="which benchmark; none lists them", show_default=False)] = "",
    list_: Annotated[bool, typer.Option("--list", help="list the benchmarks, or the cases of NAME")] = False,
    quick: Annotated[bool, typer.Option("--quick", help=f"fewer cases, {QUICK_ROUNDS} rounds: a look only")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="every arm once against the reference; nothing is timed or written")
    ] = False,
    rounds: Annotated[int | None, typer.Option(help="rounds per case, at least 6", show_default=False)] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="shared out among the cases: fewer rounds, and no new case after it", show_default=False),
    ] = None,
    filter_: Annotated[
        str, typer.Option("--filter", help="only the case of this name, or those whose names contain it")
    ] = "",
    seed: Annotated[int, typer.Option(help="seeds the inputs and the order of the arms")] = 0,
    output: Annotated[str, typer.Option(help="folder for the JSON, Markdown and PNG", show_default=False)] = "",
    compare: Annotated[str, typer.Option(metavar="OLD.json", help="say what changed since a former result")] = "",
    read: Annotated[str, typer.Option(metavar="NEW.json", help="take this result instead of running")] = "",
    machine: Annotated[str, typer.Option(metavar="FILE", help="what `undertow probe` wrote, for predictions")] = "",
    plot: Annotated[bool, typer.Option(help="draw the PNG (needs the extra `plots`)")] = True,
) -> None:
    """Run a benchmark against its rivals: check, interleave, report."""
    from undertow.benchmarks import discover

    if not name:
        known = discover.listed()
        for each, line in known.items():
            typer.echo(f"{each:<{max(map(len, known))}}  {line}")
        return
    benchmark = discover.load(name)
    if rounds is not None and rounds < 6:
        raise UserError(f"--rounds {rounds}", expected="at least 6, the fewest that give a 95 % interval of a median")
    if minutes is not None and benchmark.program:
        raise UserError(
            f"--minutes with '{name}'", expected="a benchmark that the harness times; this one times itself"
        )
    if minutes is not None and minutes <= 0:
        raise UserError(f"--minutes {minutes:g}", expected="more than 0")
    if benchmark.program and (check or list_):
        raise UserError(
            f"--{'check' if check else 'list'} with '{name}'",
            expected="a benchmark that the harness times; this one times itself",
            remedy=f"for a look at it: undertow bench {name} --quick",
        )
    if benchmark.program:
        raise typer.Exit(
            benchmark.program(quick, rounds, filter_, Path(output) if output else published.default_folder(quick))
        )
    rounds = rounds or (QUICK_ROUNDS if quick else benchmark.rounds)
    run = _Run(benchmark, quick, rounds, filter_, seed, machine, None if minutes is None else 60 * minutes)
    if list_:
        run.list()
        return
    if check:
        raise typer.Exit(run.check())
    old = published.load(compare, name) if compare else None
    folder = Path(output) if output else published.default_folder(quick or bool(read))
    report = published.load(read, name) if read else run.report(folder)
    if report is None:  # another rank than 0
        return
    published.show(report)
    published.write(report, folder, draw=plot)
    if old is not None:
        from undertow.benchmarks.compare import comparison

        typer.echo(comparison(old, report))
    if run.stopped:
        raise typer.Exit(128 + run.stopped)
    if report.failed:
        raise typer.Exit(1)


class _Run:
    """One run of one benchmark: its options, and what becomes of them. `limit_s`: seconds to share out."""

    def __init__(
        self,
        benchmark: Benchmark,
        quick: bool,
        rounds: int,
        only: str,
        seed: int,
        machine: str,
        limit_s: float | None,
    ) -> None:
        self.benchmark, self.quick, self.rounds, self.only, self.seed = benchmark, quick, rounds, only, seed
        self.machine_file, self.limit_s = machine, limit_s
        self.stopped = 0  # by this signal, which some rank got

    def cases(self, rank: int, world_size: int):
        from undertow.benchmarks.case import Context

        machine = Machine.load(Path(self.machine_file)) if self.machine_file else None
        cases = self.benchmark.cases(Context(self.quick, self.seed, machine, rank, world_size, self.limit_s))
        chosen = [case for case in cases if self.only == case.name]
        chosen = chosen or [case for case in cases if self.only in case.name]
        if not chosen:
            names = ", ".join(case.name for case in cases)
            raise UserError(
                f"--filter '{self.only}' leaves no case of '{self.benchmark.name}'", expected=f"part of {names}"
            )
        return chosen

    def command(self) -> str:
        """The command that repeats the measurement; where its output goes is left out."""
        parts = ["undertow", "bench", self.benchmark.name, "--rounds", str(self.rounds), "--seed", str(self.seed)]
        parts += ["--quick"] if self.quick else []
        parts += ["--minutes", f"{self.limit_s / 60:g}"] if self.limit_s else []
        parts += ["--filter", self.only] if self.only else []
        parts += ["--machine", Path(self.machine_file).name] if self.machine_file else []
        return shlex.join(parts)

    def list(self) -> None:
        """The names of the cases, on rank 0; some depend on the number of ranks."""
        rank, world_size, _, leave = _join()
        names = [case.name for case in self.cases(rank, world_size)]
        if rank == 0:
            typer.echo("\n".join(names))
        leave()

    def check(self) -> int:
        """Every arm of the cases once, a line each on rank 0; 1 when an answer is wrong or an arm failed."""
        from undertow.benchmarks.harness import check_case

        rank, world_size, peers, leave = _join()
        bad = False
        for case in self.cases(rank, world_size):
            for row in check_case(case, peers=peers):
                bad = bad or row.bad
                if rank == 0:
                    typer.echo(f"{case.name}: {row.arm}: {row.note or 'right'}")
        leave()
        return int(bad)

    def report(self, folder: Path) -> Report | None:
        """Run all cases; the report on rank 0, None elsewhere. What is known after each case is kept in `folder`."""
        from undertow.benchmarks.facts import facts
        from undertow.benchmarks.harness import LATE, STOPPED, run_case
        from undertow.benchmarks.report import Row
        from undertow.benchmarks.stopping import Stopping
        from undertow.dist.progress import Progress

        rank, world_size, peers, leave = _join()
        cases, rows = self.cases(rank, world_size), list[Row]()
        found = facts(self.benchmark.packages)
        if world_size > 1:
            found["ranks"] = str(world_size)
        total, end_s = len(cases) * self.rounds, time.monotonic() + (self.limit_s or math.inf)
        stopping = Stopping()
        with stopping, Progress(total, f"bench {self.benchmark.name}", enabled=rank == 0, unit="round") as bar:
            for at, case in enumerate(cases):
                bar.update(0, case=case.name)
                if self.stopped or peers.largest(float(time.monotonic() > end_s)):
                    why = "stopped before" if self.stopped else "the time of --minutes was up"
                    rows.append(Row(case.name, self.benchmark.name, "ours", note=why))
                    bar.update(self.rounds)
                    continue
                share_s = time.monotonic() + (end_s - time.monotonic()) / (len(cases) - at)
                rows += run_case(
                    case,
                    rounds=self.rounds,
                    seed=self.seed,
                    peers=peers,
                    tick=bar.update,
                    hurry=lambda until_s=share_s: (
                        STOPPED if stopping.signal else LATE if time.monotonic() > until_s else 0
                    ),
                )
                self.stopped = int(peers.largest(stopping.signal))
                bar.update((at + 1) * self.rounds - bar.done)  # the rounds that were left out
                if rank == 0 and len(cases) > 1:  # should a later case fail or be stopped
                    published.show(self._report(found, [row for row in rows if row.case == case.name]))
                    published.keep(self._report(found, rows), folder)
        leave()
        return None if rank else self._report(found, rows)

    def _report(self, found: dict[str, str], rows: Sequence[Row]) -> Report:
        from undertow.benchmarks.report import Report

        about = self.benchmark
        return Report(
            about.name, about.claim, self.command(), self.seed, self.rounds, found, about.x_label, tuple(rows),
            about.choices,
        )  # fmt: skip


def _join() -> tuple[int, int, Peers, Callable[[], object]]:
    """Rank, world size, peers, and how to leave again: joins the job's process group when a launcher started ranks."""
    from undertow.benchmarks.timing import Peers
    from undertow.dist.launch import detect

    launch = detect()
    if launch.world_size == 1:
        return 0, 1, Peers(), lambda: None
    import torch
    import torch.distributed as dist

    from undertow.dist.launch import init_process_group

    mine = not dist.is_initialized()
    if mine:
        init_process_group(launch, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    leave = dist.destroy_process_group if mine else dist.barrier
    return launch.rank, launch.world_size, Peers(dist.new_group(backend="gloo")), leave
