"""What lies in a checkpoint folder, for people: read-only, without a lock, and safe while a job writes there.

Every entry is looked at as it is now: a checkpoint may be renamed or removed between two looks, which is no error. A
cheap look trusts lengths; only `verify` reads content.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..dist.errors import UserError
from .folder import FINAL, read_manifest
from .manifest import COMMIT, METADATA, BadCheckpoint, Manifest, metrics_of
from .verify import check_lengths

HIDDEN = re.compile(r"^\.step-(\d{9,})\.(tmp|old|bad|left)-")
STATES = {
    "tmp": "being written",
    "old": "being replaced",
    "bad": "set aside: damaged",
    "left": "set aside: rolled back",
}


@dataclass(frozen=True)
class Entry:
    """One checkpoint folder. `state`: 'whole' (lengths are right), 'damaged', 'not committed' or one of `STATES`;
    `nbytes` on disk; `age_s` since its commit, or since it was last changed."""

    step: int
    path: Path
    state: str
    problem: str = ""
    nbytes: int = 0
    age_s: float = 0.0
    world_size: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        return self.state == "whole"

    @property
    def aside(self) -> bool:
        return self.state in (STATES["bad"], STATES["left"])


def entries(root: Path, *, now_s: float | None = None) -> list[Entry]:
    """Everything under `root` that is or was a checkpoint, oldest step first; `root` itself where it is one.
    `UserError` when it cannot be read."""
    now_s = time.time() if now_s is None else now_s
    try:
        names = sorted(os.listdir(root))
    except OSError as error:
        raise UserError(
            f"cannot read the checkpoint folder {root} ({error.strerror})", expected="a folder of checkpoints"
        ) from error
    if COMMIT in names:
        return [_alone(root, now_s)]
    found = []
    for name in names:
        path = root / name
        if path.is_symlink() or not path.is_dir():
            continue
        if match := FINAL.match(name):
            found.append(_committed(int(match[1]), path, now_s))
        elif match := HIDDEN.match(name):
            found.append(Entry(int(match[1]), path, STATES[match[2]], "", size_of(path), _age_s(path, now_s)))
    if not found and METADATA in names:
        raise UserError(
            f"{root} is a checkpoint of torch.distributed.checkpoint, not of undertow: no {COMMIT}, no checksums",
            remedy="open_checkpoint(folder) reads it, Checkpointer(…).restore_from(folder) loads it",
        )
    return sorted(found, key=lambda entry: (entry.step, entry.path.name))


def _alone(path: Path, now_s: float) -> Entry:
    """One that is asked for by its own folder, of any name."""
    match = FINAL.match(path.resolve().name)
    try:
        step = int(match[1]) if match else read_manifest(path).step
    except (BadCheckpoint, UserError):
        step = 0
    return _committed(step, path, now_s)


def _committed(step: int, path: Path, now_s: float) -> Entry:
    nbytes, age_s = size_of(path), _age_s(path, now_s)
    if not (path / COMMIT).is_file():
        return Entry(step, path, "not committed", f"no {COMMIT}", nbytes, age_s)
    try:
        manifest = read_manifest(path)
        if manifest.step != step:
            raise BadCheckpoint(f"it holds step {manifest.step}")
        check_lengths(path, manifest)
    except (BadCheckpoint, UserError) as error:
        return Entry(step, path, "damaged", str(error), nbytes, age_s)
    return Entry(step, path, "whole", "", nbytes, age_s, manifest.world_size, metrics_of(manifest))


def size_of(path: Path) -> int:
    """Bytes of the files in a folder; files that vanish meanwhile count nothing."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue
    return total


def _age_s(path: Path, now_s: float) -> float:
    """Since the commit by its own clock, else since the folder changed; never negative, clocks go backwards."""
    try:
        text = (path / COMMIT).read_bytes() if (path / COMMIT).is_file() else b""  # a planted pipe would never end
        then_s = float(json.loads(text)["epoch_s"])
    except (OSError, ValueError, KeyError, TypeError):
        try:
            then_s = os.stat(path).st_mtime
        except OSError:
            then_s = now_s
    return max(0.0, now_s - then_s)


def locate(path: Path, step: int | None = None) -> tuple[Path, Manifest]:
    """(folder, manifest) of one checkpoint: `path` itself when it is one, else the newest whole one under it, or the
    one of `step`. `UserError` says what is there instead."""
    if (path / COMMIT).is_file():
        if step is not None:
            raise UserError(f"{path} is one checkpoint and --step {step} was given", remedy="pass one of the two")
        try:
            return path, read_manifest(path)
        except BadCheckpoint as error:
            raise UserError(str(error), remedy="'undertow ckpt list' shows which are whole") from error
    found = entries(path)
    usable = [entry for entry in found if entry.usable and step in (None, entry.step)]
    if not usable:
        wanted = [entry for entry in found if step == entry.step and entry.problem]
        if wanted:
            raise UserError(f"the checkpoint {wanted[-1].path} is {wanted[-1].state}: {wanted[-1].problem}")
        steps = [entry.step for entry in found if entry.usable]
        which = "no whole checkpoint" if step is None else f"no checkpoint of step {step}"
        raise UserError(f"{path} holds {which}", expected=f"one of {steps}" if steps else "a folder of checkpoints")
    return usable[-1].path, read_manifest(usable[-1].path)
