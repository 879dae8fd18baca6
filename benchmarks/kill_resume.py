"""Kill a rank of the main job at a seeded moment, restart, and compare with a run that nobody disturbed, many times.

`python -m undertow.benchmarks.kill_resume --trials 20` (200 for the long one). Every trial is `undertow train` itself,
in forked ranks, because a torchrun start would take longer than the run. Half of the kills strike inside a named stage
of a save, seen as an open span in the victim's own trace; the others somewhere in a step, or at any time from outside.
SIGKILL cannot show what a power failure loses; that is tested by replaying the disk's operations. The claim: losses,
weights and optimizer state are bit-identical in every trial, and nothing is ever found damaged.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from undertow.checkpointing.catalogue import entries
from undertow.dist.errors import UndertowError, UserError
from undertow.dist.launch import free_port
from undertow.dist.progress import Progress
from undertow.dist.trace import Trace, open_spans, trace_path
from undertow.dist.trace_read import read_attempts
from undertow.examples.kill_and_resume import IN_FLIGHT, compare

STAGES = ("snapshot", "copy", "flush", "flush", "flush", "fsync", "vote", "commit", "fence")


@dataclass(frozen=True)
class Moment:
    """Rank `rank` dies `delay_s` after its `nth` span called `inside` began; '' counts from the start of the run."""

    rank: int
    inside: str
    nth: int
    delay_s: float


@dataclass(frozen=True)
class Row:
    """One trial: where the kill struck (`inside`: the spans of the save that were open), and what came of it."""

    trial: int
    moment: Moment
    struck: bool
    inside: tuple[str, ...]
    resumed_from: int | None
    identical: bool
    damaged: int
    seconds: float

    @property
    def good(self) -> bool:
        return self.identical and not self.damaged


def moment(seed: int, trial: int, *, begun: Sequence[Mapping[str, int]], run_s: float) -> Moment:
    """The seeded moment of a trial: every other one inside a stage of a save, most others somewhere in a step, one in
    eight from outside at any time, the start included. `begun`: for each rank of an undisturbed run that took `run_s`,
    how often each span began, so that a kill does not miss."""
    rng = random.Random(f"{seed}/{trial}")
    rank = rng.randrange(len(begun))
    if trial % 8 == 7:
        return Moment(rank, "", 0, rng.uniform(0.02, 0.7) * run_s)
    stage = rng.choice(STAGES) if trial % 2 == 0 else "step"
    rank = rank if begun[rank].get(stage) else 0  # rank 0 alone counts votes
    delay_s = rng.choice([0.0, 0.0005, 0.003]) if trial % 2 == 0 else rng.uniform(0.0, 0.03)
    return Moment(rank, stage, rng.randrange(1, begun[rank][stage] + 1), delay_s)


class Job:
    """`undertow train` on `ranks` forked processes; their output goes to `log`."""

    def __init__(self, options: Sequence[str], ranks: int, log: Path, victim: Moment | None = None) -> None:
        port = free_port()
        self.codes: dict[int, int | None] = {}
        self.began_s = time.monotonic()
        self._log = log
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                _be_rank(rank, ranks, port, list(options), log, victim)
            self.codes[pid] = None
        self.pids = list(self.codes)

    def poll(self) -> bool:
        """Reap whoever has ended; whether all have."""
        for pid, code in self.codes.items():
            if code is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return None not in self.codes.values()

    def wait(self, timeout_s: float, *, kill_at_s: float | None = None, victim: int = 0) -> None:
        """Until all have ended. The first that fails ends the others, as torchrun does; `kill_at_s` after the start
        rank `victim` is killed."""
        deadline_s = self.began_s + timeout_s
        while not self.poll():
            now_s = time.monotonic()
            if kill_at_s is not None and now_s - self.began_s >= kill_at_s and self.codes[self.pids[victim]] is None:
                os.kill(self.pids[victim], signal.SIGKILL)
                kill_at_s = None
            if now_s > deadline_s or any(self.codes.values()):
                self.stop()
                if now_s > deadline_s:
                    raise UndertowError(f"the run did not end within {timeout_s:.0f} s; its output is in {self._log}")
                return
            time.sleep(0.002)

    def stop(self) -> None:
        for pid, code in self.codes.items():
            if code is None:
                os.kill(pid, signal.SIGKILL)
                self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def succeed(self, timeout_s: float) -> None:
        self.wait(timeout_s)
        if any(self.codes.values()):
            raise UndertowError(f"a run that nobody disturbed failed ({self._log}):\n{self._log.read_text()[-2000:]}")


def prepare() -> None:
    """Import what the ranks need before they are forked, and keep torch on one thread: a parent that has run an
    operation on two hangs its forked children."""
    import torch

    import undertow.examples.train  # noqa: F401

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)  # imports torch's compiler, and takes seconds the first time
    with suppress(ImportError):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot  # noqa: F401


def _be_rank(rank: int, ranks: int, port: int, options: list[str], log: Path, victim: Moment | None) -> None:
    """The life of a forked rank; never returns."""
    code = 1
    try:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        logging.getLogger().handlers.clear()  # under pytest these and the streams were its own
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}.items():
            os.environ[name] = str(value)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if victim is not None and victim.rank == rank and victim.inside:
            _arm(victim)
        from undertow.__main__ import main

        code = main(["train", "--threads", "1", "--device", "cpu", *options])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _arm(victim: Moment) -> None:
    """Let this process kill itself inside the span that `victim` names, after the trace shows it open."""
    record, seen = Trace._event, [0]

    def event(self: Trace, phase: str, name: str, lane: str, args: dict) -> None:
        record(self, phase, name, lane, args)
        if phase == "B" and name == victim.inside:
            seen[0] += 1
            if seen[0] == victim.nth:
                time.sleep(victim.delay_s)
                os.kill(os.getpid(), signal.SIGKILL)

    Trace._event = event  # type: ignore[method-assign]


def reference(out: Path, options: Sequence[str], ranks: int, timeout_s: float) -> float:
    """The run that nobody disturbs; its seconds."""
    job = Job([*options, "--out", str(out / "reference")], ranks, out / "reference.log")
    job.succeed(timeout_s)
    return time.monotonic() - job.began_s


def spans_begun(out: Path, ranks: int) -> list[Counter[str]]:
    """How often each span began on each rank of the reference."""
    traces = [read_attempts(trace_path(out / "reference" / "trace", rank)) for rank in range(ranks)]
    return [Counter(e["name"] for attempt in trace for e in attempt.events if e["ph"] == "B") for trace in traces]


def run_trial(
    trial: int, when: Moment, out: Path, options: Sequence[str], ranks: int, timeout_s: float, *, restarts: int = 1
) -> Row:
    """Kill at `when`, resume, compare with the reference under `out`."""
    began_s = time.monotonic()
    folder, log = out / f"trial-{trial:03d}", out / f"trial-{trial:03d}.log"
    mine = [*options, "--out", str(folder)]
    job = Job(mine, ranks, log, when)
    job.wait(timeout_s, kill_at_s=None if when.inside else when.delay_s, victim=when.rank)
    struck = job.codes[job.pids[when.rank]] == -signal.SIGKILL
    trace = trace_path(folder / "trace", when.rank)
    inside = tuple(span.name for span in open_spans(trace) if span.name in IN_FLIGHT) if trace.exists() else ()
    resumed = None
    if not (folder / "result.json").exists() or struck:
        before = len(log.read_text())
        started = (folder / "config.json").exists()  # a kill before that has left nothing to resume
        Job([*mine, *(["--resume"] if started else [])], ranks, log).succeed(timeout_s)
        found = re.findall(r"restored step (\d+)", log.read_text()[before:])
        resumed = int(found[-1]) if found else None
    damaged = sum(".bad-" in entry.path.name for entry in entries(folder / "checkpoints"))
    same = compare(out / "reference", folder).identical
    return Row(trial, when, struck, inside, resumed, same, damaged, time.monotonic() - began_s)


def table(rows: Sequence[Row]):
    from rich.table import Table

    made = Table(title="a rank killed, the run restarted", title_justify="left")
    for name in ("trial", "rank", "aimed at", "inside", "resumed from", "bit-identical", "damaged", "s"):
        made.add_column(name, justify="right" if name in ("trial", "rank", "resumed from", "damaged", "s") else "left")
    for row in rows:
        aim = f"{row.moment.inside} {row.moment.nth}" if row.moment.inside else f"{row.moment.delay_s:.2f} s"
        resumed = "start" if row.resumed_from is None else str(row.resumed_from)
        cells = [aim, " ".join(row.inside) or "-", resumed, "yes" if row.identical else "NO", str(row.damaged)]
        made.add_row(str(row.trial), str(row.moment.rank), *cells, f"{row.seconds:.1f}")
    return made


def summary(rows: Sequence[Row]) -> dict[str, object]:
    """What the claim needs: identical of struck, and how many struck inside which stage."""
    struck = [row for row in rows if row.struck]
    stages = Counter(name for row in struck for name in set(row.inside))
    return {
        "trials": len(rows),
        "struck": len(struck),
        "bit_identical": sum(row.identical for row in rows),
        "damaged": sum(row.damaged for row in rows),
        "inside_a_save": sum(bool(row.inside) for row in struck),
        "inside_a_flush": stages["flush"],
        "stages": dict(sorted(stages.items())),
    }


def main(
    trials: Annotated[int, typer.Option(help="How many kills.")] = 20,
    ranks: Annotated[int, typer.Option(help="Ranks of each run.")] = 2,
    seed: Annotated[int, typer.Option(help="Seeds the moments.")] = 0,
    recipe: Annotated[str, typer.Option(help="Recipe of `undertow train`.")] = "tiny",
    out: Annotated[Path, typer.Option(help="A new folder for the runs.")] = Path("runs/kill_resume"),
    result: Annotated[Path | None, typer.Option(help="Write the rows as JSON here.")] = None,
    timeout_s: Annotated[float, typer.Option(help="Longest time of one run.")] = 120.0,
    minutes: Annotated[float | None, typer.Option(help="Begin no trial after this time.")] = None,
) -> None:
    """Kill and resume the main job; exit code 1 when a run differs, is damaged, or too few kills struck a flush."""
    if trials < 1 or ranks < 1:
        raise UserError(f"--trials {trials} --ranks {ranks}", expected="at least 1")
    if minutes is not None and minutes <= 0:
        raise UserError(f"--minutes {minutes:g}", expected="more than 0")
    end_s = time.monotonic() + (math.inf if minutes is None else 60 * minutes)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty", expected="a new folder", remedy="pass another --out")
    out.mkdir(parents=True, exist_ok=True)
    from rich.console import Console

    prepare()
    options = ["--recipe", recipe]
    run_s = reference(out, options, ranks, timeout_s)
    begun = spans_begun(out, ranks)
    rows = []
    with Progress(trials, "kill and resume", unit="trial") as bar:
        for trial in range(trials):
            if rows and time.monotonic() > end_s:
                break
            when = moment(seed, trial, begun=begun, run_s=run_s)
            rows.append(run_trial(trial, when, out, options, ranks, timeout_s))
            bar.update(identical=sum(row.identical for row in rows), flush=summary(rows)["inside_a_flush"])
    Console(width=None if sys.stdout.isatty() else 140).print(table(rows))
    found = summary(rows)
    sys.stdout.write(json.dumps(found) + "\n")
    if result is not None:
        from undertow.benchmarks.facts import facts

        text = {"facts": facts(()), "seed": seed, "ranks": ranks, "recipe": recipe, "summary": found}
        result.write_text(json.dumps(text | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    enough = len(rows) < 20 or summary(rows)["inside_a_flush"] >= 5  # type: ignore[operator]
    if not all(row.good for row in rows) or not enough:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
