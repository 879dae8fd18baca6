"""A comparison's runs, one after another: all variants of a workload over its seeds, within a time if one is given.

What has ended is on disk before the next begins, so a comparison that is stopped, or killed, is a table with open
claims, and `--resume` takes over what has ended and goes on in the run that had not. The time is rank 0's affair: it
decides between two updates, for all ranks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...dist.errors import UserError
from ...dist.launch import Launch
from ...dist.progress import Progress
from .contract import Place, Workload
from .journal import JOURNAL, Journal, rows, trajectory
from .keeper import saved_step
from .loop import Outcome, run
from .report import home, variant_name
from .switches import Switches


class Budget:
    """Whether the time is up; without `minutes` it never is. Every rank asks, rank 0's clock answers."""

    def __init__(self, minutes: float | None, here: Launch, device: torch.device) -> None:
        if minutes is not None and not minutes > 0:
            raise UserError(f"--minutes {minutes:g}", expected="more than 0")
        self.minutes, self.here, self.device = minutes, here, device
        self.end_s = None if minutes is None else time.monotonic() + 60 * minutes

    def up(self) -> bool:
        """Collective where there is a time."""
        if self.end_s is None:
            return False
        late = time.monotonic() >= self.end_s
        if self.here.world_size == 1:
            return late
        told = torch.tensor([float(late)], device=self.device)
        dist.broadcast(told, src=0)
        return bool(told.item())


@dataclass(frozen=True)
class Series:
    """What a comparison runs: `variants` (none: all of the preset) over `seeds` seeds, in folders under `out`."""

    preset: str
    seeds: int
    out: Path
    switches: Switches
    variants: tuple[str, ...] = ()
    resume: bool = False

    def of(self, workload: Workload) -> list[tuple[int, str]]:
        """Seeds and variants, in the order of their runs: what is not trained comes first, as it takes no time."""
        compared = workload.compared(self.preset)
        if wrong := [name for name in self.variants if name not in compared]:
            raise UserError(
                f"no variant '{wrong[0]}' of {workload.name} at preset {self.preset}",
                expected=f"one of {', '.join(compared)}",
            )
        chosen = [name for name in compared if not self.variants or name in self.variants]
        chosen.sort(key=lambda name: workload.config(self.preset, name).steps > 0)
        return [(seed, name) for seed in range(self.seeds) for name in chosen]

    def folder(self, workload: Workload, seed: int, variant: str) -> Path:
        return home(self.out, workload.name, seed) / variant_name(variant)


def everything(
    series: Series,
    workload: Workload,
    here: Launch,
    where: torch.device,
    budget: Budget,
    written: Callable[[list[Outcome]], None],
) -> list[Outcome]:
    """Make the runs of one workload, or as many as the time allows; rank 0 hears after each what there is so far."""
    runs = series.of(workload)
    configs = {key: workload.config(series.preset, key[1], seed=key[0]) for key in runs}
    known = earlier(series, workload, runs, here)
    began = {key: saved_step(series.folder(workload, *key)) if series.resume else 0 for key in runs}
    done = sum(config.steps if key in known and known[key].ended else began[key] for key, config in configs.items())
    outcomes: list[Outcome] = []
    total = sum(config.steps for config in configs.values())
    with Progress(total, workload.name, enabled=here.rank == 0, unit="update", initial=done) as bar:
        for (seed, variant), config in configs.items():
            before = known.get((seed, variant))
            if before is not None and before.ended:
                outcomes.append(before)
                continue
            if budget.up():
                outcomes += [] if before is None else [before]
                continue
            folder = series.folder(workload, seed, variant)
            place = Place(here, folder, home(series.out, workload.name, seed) / "shared", series.switches, where)
            bar.update(0, variant=variant, seed=seed)
            with Journal(folder / JOURNAL if here.rank == 0 else None) as note:
                outcome = run(
                    workload,
                    variant,
                    series.preset,
                    config,
                    place,
                    resume=series.resume,
                    enough=budget.up,
                    tell=bar.update,
                    note=note,
                )
            if here.rank == 0:
                outcome = joined(before, outcome, folder) if series.resume else outcome
                outcome.dump(place)
            outcomes.append(outcome)
            if here.rank == 0:
                written(outcomes)
    return outcomes


def earlier(
    series: Series, workload: Workload, runs: Sequence[tuple[int, str]], here: Launch
) -> dict[tuple[int, str], Outcome]:
    """What an earlier process of this comparison has left, as rank 0 sees it."""
    found: list[dict[tuple[int, str], Outcome]] = [{}]
    if series.resume and here.rank == 0:
        for key in runs:
            outcome = read(series.folder(workload, *key))
            if outcome is not None:
                found[0][key] = outcome
    if series.resume and here.world_size > 1:
        dist.broadcast_object_list(found, src=0)
    return found[0]


def read(folder: Path) -> Outcome | None:
    """The run whose result.json is in `folder`, with its losses; None where there is none that can be read."""
    try:
        content: dict[str, Any] = json.loads((folder / "result.json").read_text())
        content["losses"] = list(trajectory(folder / JOURNAL).values())
        names = {item.name for item in fields(Outcome)}
        return Outcome(**{name: value for name, value in content.items() if name in names})
    except (OSError, ValueError, TypeError):
        return None  # killed before it was written, or in the middle


def joined(before: Outcome | None, now: Outcome, folder: Path) -> Outcome:
    """A resumed run and its earlier parts as one: updates as the journal counts them, repeated ones too."""
    path = folder / JOURNAL
    whole = replace(now, losses=list(trajectory(path).values()), updates=len(rows(path)))
    if before is None:
        return whole
    evidence = {system: dict(counts) for system, counts in before.evidence.items()}
    for system, counts in now.evidence.items():
        own = evidence.setdefault(system, {})
        for name, amount in counts.items():
            own[name] = own.get(name, 0) + amount
    return replace(whole, cpu_s=before.cpu_s + now.cpu_s, evidence=evidence)
