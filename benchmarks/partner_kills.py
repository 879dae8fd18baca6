"""Kill all ranks at a seeded moment and take one machine's memory away, many times: no committed step may be lost.

`python -m undertow.benchmarks.partner_kills --trials 40` runs forked ranks that pass for machines, each machine with a
memory of its own, and saves every step to memory with partner copies and no step to a disk. In each trial the ranks are
killed (SIGKILL) one after another at a random moment, in random order; then a machine loses its memory, or one bit of
one file in it changes, or nothing. The next start must go on from a step at least as new as the newest that any rank
had been told was committed, with weights and optimizer state bit-identical to a run that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from torch import nn

from undertow.checkpointing import Checkpointer, Partner
from undertow.dist.errors import UndertowError, UserError
from undertow.dist.progress import Progress

LOSSES = ("machine", "machine", "bit", "nothing")


@dataclass(frozen=True)
class Row:
    """One trial: what was lost after the kill, the newest step known as committed, and where the next start went on."""

    trial: int
    lost: str
    committed: int
    resumed: int
    identical: bool

    @property
    def good(self) -> bool:
        return self.identical and self.resumed >= self.committed


class Training:
    """A model of 1.2 MB with AdamW whose gradients depend on the step alone."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(128, 400), nn.Linear(400, 128))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def advance(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step()

    def same(self, other: Training) -> bool:
        one, two = (
            [*job.model.parameters(), *(v for s in job.optimizer.state.values() for v in s.values())]
            for job in (self, other)
        )
        return len(one) == len(two) and all(map(torch.equal, one, two))


def tell(path: Path, word: object) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(word))
    part.rename(path)


def work(folder: Path, store: Path, rank: int, ranks: int, machines: int, again: bool) -> None:
    """One rank: restore, compare, and save every step until it is killed."""
    dist.init_process_group("gloo", store=dist.FileStore(str(store), ranks), rank=rank, world_size=ranks)
    job, host = Training(int(again)), rank * machines // ranks
    memory = folder / f"memory-{host}"
    memory.mkdir(exist_ok=True)
    partner = Partner(host=f"machine-{host}", memory=memory, address="127.0.0.1")
    options = {"host_every": 1, "partner": partner, "chunk_bytes": 1 << 16, "host_generations": 2}
    ckpt = Checkpointer(folder / "c", model=job.model, optimizer=job.optimizer, **options)
    step, right = ckpt.restore() or 0, Training(0)
    for number in range(1, step):
        right.advance(number)
    tell(folder / f"resumed-{rank}.json", [step, not again if not step else job.same(right)])
    for number in range(step + 1, sys.maxsize):
        if number > 1:
            job.advance(number - 1)
        ckpt.step(number)
        if number % 3 == rank % 3:
            ckpt.wait()
        committed = [report.step for report in ckpt.reports if report.ok]
        if committed:
            tell(folder / f"committed-{rank}.json", committed[-1])


def start(folder: Path, trial: int, ranks: int, machines: int) -> list[int]:
    pids = []
    for rank in range(ranks):
        pids.append(os.fork())
        if not pids[-1]:
            try:
                handle = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                os.dup2(handle, 1)
                os.dup2(handle, 2)
                work(folder, folder / f"store-{trial}", rank, ranks, machines, trial > 0)
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(1)
    return pids


def await_words(paths: list[Path], pids: list[int], folder: Path, timeout_s: float) -> list:
    """What the ranks have told."""
    end_s = time.monotonic() + timeout_s
    while not all(path.exists() for path in paths):
        if any(os.waitpid(pid, os.WNOHANG)[0] for pid in pids) or time.monotonic() > end_s:
            raise UndertowError(f"a rank ended by itself or said nothing:\n{(folder / 'log').read_text()[-3000:]}")
        time.sleep(0.01)
    return [json.loads(path.read_text()) for path in paths]


def lose(folder: Path, machines: int, what: str, rng: random.Random) -> str:
    """Take something away; what, in words."""
    memory = folder / f"memory-{rng.randrange(machines)}"
    if what == "machine":
        shutil.rmtree(memory)
        return memory.name
    files = sorted(memory.glob("*/*/*.distcp"))
    if what == "bit" and files:
        path = rng.choice([file for file in files if file.stat().st_size])
        with path.open("r+b") as file:
            file.seek(at := rng.randrange(path.stat().st_size))
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << rng.randrange(8)]))
        return f"a bit in {memory.name}"
    return "nothing"


def run(trials: int, folder: Path, *, ranks: int = 2, machines: int = 2, seed: int = 0) -> list[Row]:
    """The trials, each with its own kill, and one start more."""
    rng, rows, committed, lost = random.Random(seed), [], 0, ""
    with Progress(trials, "kills", True) as bar:
        for trial in range(trials + 1):
            pids = start(folder, trial, ranks, machines)
            try:
                told = [folder / f"resumed-{rank}.json" for rank in range(ranks)]
                resumed = await_words(told, pids, folder, 300.0)
                if trial:
                    right = all(same for _, same in resumed) and len({step for step, _ in resumed}) == 1
                    rows.append(Row(trial, lost, committed, resumed[0][0], right))
                    bar.update()
                marks = [folder / f"committed-{rank}.json" for rank in range(ranks)]
                for path in (*told, *marks):
                    path.unlink(missing_ok=True)
                await_words(marks[:1], pids, folder, 300.0)
                time.sleep(rng.uniform(0.0, 0.5))
            finally:
                for pid in rng.sample(pids, ranks):
                    with suppress(ProcessLookupError):  # it has ended by itself, and `await_words` says so
                        os.kill(pid, signal.SIGKILL)
                    time.sleep(rng.choice([0.0, 0.0, 0.005, 0.05]))
                for pid in pids:
                    with suppress(ChildProcessError):
                        os.waitpid(pid, 0)
            committed = max(json.loads(path.read_text()) for path in marks if path.exists())
            lost = lose(folder, machines, rng.choice(LOSSES), rng)
    return rows


def main(
    trials: Annotated[int, typer.Option(help="Kills.")] = 40,
    ranks: Annotated[int, typer.Option(help="Ranks, spread evenly over the machines.")] = 2,
    machines: Annotated[int, typer.Option(help="Machines, two or more.")] = 2,
    seed: Annotated[int, typer.Option(help="Chooses moments, orders and losses.")] = 0,
    result: Annotated[Path | None, typer.Option(help="Write the rows as JSON here.")] = None,
) -> None:
    """Kill, lose, restart, compare; exit code 1 when a committed step was lost or a bit differs."""
    if trials < 1 or not 2 <= machines <= ranks:
        raise UserError(f"--trials {trials} --ranks {ranks} --machines {machines}", expected="2 ≤ machines ≤ ranks")
    torch.set_num_threads(1)  # a parent that has run an operation on two hangs its forked children
    with tempfile.TemporaryDirectory(prefix="undertow-kills-") as folder:
        rows = run(trials, Path(folder), ranks=ranks, machines=machines, seed=seed)
    bad = [row for row in rows if not row.good]
    lost = {name: sum(name in row.lost for row in rows) for name in ("memory", "bit", "nothing")}
    print(
        f"{len(rows)} kills of {ranks} ranks on {machines} machines; after them lost: a machine's memory "
        f"{lost['memory'] - lost['bit']} times, a bit {lost['bit']} times, nothing {lost['nothing']} times; "
        f"{len(rows) - len(bad)} went on from the newest committed step or a later one, bit-identical"
    )
    for row in bad:
        print(f"WRONG: {row}")
    if result is not None:
        from undertow.benchmarks.facts import facts

        text = {"facts": facts(()), "ranks": ranks, "machines": machines, "seed": seed}
        result.write_text(json.dumps(text | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    if bad:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
