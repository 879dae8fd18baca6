"""Where a run's states are kept: the toolkit's checkpoints, or a plain copy in memory for the run without them.

The copy exists so that a method that rolls back runs the same with the system off, which is what the equivalence
tests compare.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from ...checkpointing import Checkpointer
from ...checkpointing.files import FileOps
from ...checkpointing.folder import Folder, read_manifest
from .contract import Place


class Keeper(Protocol):
    def step(self, step: int) -> bool: ...
    def save(self, step: int) -> bool: ...
    def restore(self, step: int | None = None) -> int | None: ...
    def close(self) -> None: ...


class Copies:
    """Deep copies in memory of what `Checkpointer` would save; they end with the process."""

    def __init__(self, every: int, objects: dict[str, Any]) -> None:
        self.every, self.objects = every, objects
        self.copies: dict[int, dict[str, Any]] = {}

    def step(self, step: int) -> bool:
        return bool(self.every) and step % self.every == 0 and step not in self.copies and self.save(step)

    def save(self, step: int) -> bool:
        self.copies[step] = {name: copy.deepcopy(thing.state_dict()) for name, thing in self.objects.items()}
        return True

    def restore(self, step: int | None = None) -> int | None:
        step = max(self.copies, default=None) if step is None else step
        if step is None:
            return None
        for name, state in self.copies[step].items():
            self.objects[name].load_state_dict(copy.deepcopy(state))
        self.copies = {known: state for known, state in self.copies.items() if known <= step}
        return step

    def close(self) -> None:
        self.copies.clear()


class Nothing:
    """For runs that neither save nor roll back."""

    def step(self, step: int) -> bool:
        return False

    def save(self, step: int) -> bool:
        return False

    def restore(self, step: int | None = None) -> int | None:
        return None

    def close(self) -> None:
        return


class Checkpoints:
    """`Checkpointer`, which also counts what it did into the run's evidence when it closes."""

    def __init__(self, place: Place, root: Path, every: int, keep: int | None, objects: dict[str, Any]) -> None:
        self.place, self.root = place, root
        self.inner = Checkpointer(root, every=every, keep=keep, **objects)
        self.step, self.save, self.restore = self.inner.step, self.inner.save, self.inner.restore

    def close(self) -> None:
        self.inner.close()
        done = [report for report in self.inner.reports if report.ok]
        committed = self.inner.folder.committed()
        chunks = 0
        if committed:
            files = read_manifest(self.inner.folder.final(committed[-1])).files
            chunks = sum(len(record.chunks) for record in files.values())
        self.place.count(
            "checkpoint",
            commits=len(done),
            failed=self.inner.failures,
            bytes=sum(report.nbytes for report in done),
            chunks=chunks * len(done),
        )


def saved_step(folder: Path) -> int:
    """How many updates the newest checkpoint of the run in `folder` holds; 0 where there is none."""
    root = folder / "checkpoints"
    return max(Folder(root, FileOps()).committed(), default=0) if root.is_dir() else 0


def keeper(place: Place, every: int, rolls_back: bool, model: nn.Module, optimizer: Optimizer, more: dict) -> Keeper:
    """The keeper that the switches ask for."""
    objects = {"model": model, "optimizer": optimizer, **more}
    if place.switches.checkpoint == "lazy":
        return Checkpoints(place, place.folder / "checkpoints", every, None if rolls_back else 3, objects)
    return Copies(every, objects) if rolls_back else Nothing()
