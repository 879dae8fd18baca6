"""Does a checkpoint fit the state that is to be filled, on every rank? Asked before anything is changed.

Ranks may hold other parts of one model (pipeline stages), so a name that this rank does not know is wrong only when no
rank knows it; and what does not fit one rank is refused by all, or they would go on from different states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..dist.errors import UserError
from .manifest import Manifest
from .state import AppState, Leaf


@dataclass
class Fit:
    """One rank's word: what is wrong here, which stored names it does not know, and a value that it may not read."""

    problems: list[str]
    unknown: list[str]
    refused: str = ""


Exchange = Callable[[Fit], Sequence[Fit]]  # this rank's word -> the words of all


def alone(mine: Fit) -> Sequence[Fit]:
    """The exchange of a single rank."""
    return [mine]


def settle(words: Sequence[Fit], where: Path) -> None:
    """`UserError` when the checkpoint at `where` does not fit all ranks."""
    unknown = set.intersection(*(set(word.unknown) for word in words))
    problems = list(dict.fromkeys(problem for word in words for problem in word.problems))
    problems += [f"'{key}' is only in the checkpoint" for key in sorted(unknown)]
    if problems:
        more = f" (and {len(problems) - 4} more)" if len(problems) > 4 else ""
        raise UserError(
            f"{where} is a checkpoint of another model or optimizer: {'; '.join(problems[:4])}{more}",
            expected="the same names and shapes",
            remedy="build the model with the checkpoint's configuration, or pass another folder",
        )
    refused = next((word.refused for word in words if word.refused), "")
    if refused:
        raise UserError(refused)


def compare(state: AppState, leaves: Sequence[Leaf], manifest: Manifest) -> Fit:
    """This rank's word about names and shapes. Users' own objects may change inside."""

    def name(path: Sequence[str | int], key: str) -> str | None:
        if is_rank_word(path):
            return None
        if path[0] in state.others:
            return str(path[0])
        if path[0] in state.optimizers:  # its state appears with its first step, its options vary with torch
            return key if path[-1] == "params" else None
        return key

    live = {name(leaf.path, leaf.key): leaf for leaf in leaves} | {None: None}
    stored = {name(path, key) for key, path in manifest.paths.items()} | {None}
    problems = [f"'{key}' is not in the checkpoint" for key in sorted(live.keys() - stored, key=str)]
    problems += [_other_kind(label, optimizer, manifest) for label, optimizer in state.optimizers.items()]
    problems = list(filter(None, problems))
    for leaf in leaves:
        record = manifest.tensors.get(leaf.key)
        if record is None or leaf.path[0] in state.others:
            continue
        shape = tuple(leaf.value.shape) if isinstance(leaf.value, torch.Tensor) else type(leaf.value).__name__
        if shape != record.shape:
            problems.append(f"'{leaf.key}' has shape {shape} here and {record.shape} in the checkpoint")
    return Fit(problems, sorted(filter(None, stored - live.keys())))


def _other_kind(label: str, optimizer: torch.optim.Optimizer, manifest: Manifest) -> str:
    """What tells that a checkpoint is of another kind of optimizer: each side has options that the other lacks. A later
    torch, or a scheduler, adds options to one side only."""
    stored = {
        str(path[3]) for path in manifest.paths.values() if path[:2] == (label, "param_groups") and len(path) == 4
    }
    live = {key for group in optimizer.param_groups for key in group}
    if not stored - live or not live - stored:
        return ""
    lacks, has = (", ".join(sorted(names)[:3]) for names in (live - stored, stored - live))
    return f"'{label}' is a {type(optimizer).__name__} with {lacks} here and has {has} in the checkpoint"


def is_rank_word(path: Sequence[str | int]) -> bool:
    """Whether the value at `path` belongs to one rank."""
    return len(path) == 2 and str(path[1]).startswith("rank-")
