"""Which checkpoint to restart from: the newest that every rank finds whole.

Rank 0 proposes, every rank verifies its share of the chunks, and the verdicts go through the `Coordinator`. A damaged
checkpoint is set aside under a new name (never deleted) and the next older one is proposed.
"""

from __future__ import annotations

import time

from ..dist.errors import UserError
from ..dist.log import get_logger
from .coordinate import Coordinator
from .folder import Folder, read_manifest
from .manifest import BadCheckpoint, Manifest
from .verify import check_content, check_lengths

log = get_logger(__name__)


def choose(
    folder: Folder, coordinator: Coordinator, *, step: int | None, timeout_s: float
) -> tuple[int, Manifest] | None:
    """(step, manifest) of the checkpoint to load, agreed by all ranks; None when there is none.

    With `step` only that one will do: a `UserError` says why it does not.
    """
    while True:
        coordinator.round += 1
        name = f"restore/{coordinator.round}"
        if coordinator.rank == 0:
            steps = folder.committed()
            coordinator.say(name, (steps, steps[-1] if step is None and steps else step))
        deadline_s = time.monotonic() + timeout_s
        steps, proposed = coordinator.hear(name, 0, deadline_s=deadline_s)
        if step is None and proposed is None:
            return None
        if proposed not in steps:
            raise UserError(
                f"{folder.root} has no committed checkpoint of step {proposed}",
                expected=f"one of {steps}" if steps else "a folder with checkpoints",
            )
        manifest, problem = _verify(folder, coordinator, proposed)
        coordinator.say(f"{name}/verdict", problem)
        problems = [text for text in coordinator.hear_all(f"{name}/verdict", timeout_s=timeout_s) if text]
        if not problems:
            assert manifest is not None
            return proposed, manifest
        if step is not None:
            raise UserError(problems[0], remedy="restore another step, or none to take the newest valid one")
        if coordinator.rank == 0:
            aside = folder.quarantine(proposed)
            log.warning("checkpoint %d is damaged (%s); set aside as %s", proposed, problems[0], aside)


def _verify(folder: Folder, coordinator: Coordinator, step: int) -> tuple[Manifest | None, str]:
    path = folder.final(step)
    try:
        manifest = read_manifest(path)
        check_lengths(path, manifest)
        check_content(path, manifest, part=coordinator.rank, parts=coordinator.world)
    except BadCheckpoint as error:
        return None, str(error)
    return manifest, ""
