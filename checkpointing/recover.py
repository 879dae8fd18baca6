"""Which checkpoint to restart from: the newest that every rank finds whole.

Rank 0 proposes, every rank verifies its share of the chunks, and the verdicts go through the `Coordinator`. A damaged
checkpoint is set aside under a new name (never deleted) and the next older one is proposed.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence

from ..dist.errors import UserError
from ..dist.log import get_logger
from ..dist.progress import Progress
from .coordinate import Coordinator
from .manifest import BadCheckpoint, Manifest
from .pruning import Home

log = get_logger(__name__)
NOT_DAMAGE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)


def choose(
    folders: Sequence[Home], coordinator: Coordinator, *, step: int | None, timeout_s: float
) -> tuple[Home, int, Manifest] | None:
    """(folder, step, manifest) of the checkpoint to load, agreed by all ranks; None when there is none.

    A run whose every checkpoint is damaged is told so, and does not quietly begin again. The newest step over all
    `folders` is proposed first; of equal ones that in the earliest folder. With `step` only that one will do: a
    `UserError` says why it does not.
    """
    refused = ""
    while True:
        coordinator.round += 1
        name = f"restore/{coordinator.round}"
        if coordinator.rank == 0:
            found = [(number, -place) for place, folder in enumerate(folders) for number in folder.committed()]
            usable = [entry for entry in found if step is None or entry[0] == step]
            away = "; ".join(f"{f.root} does not answer: {f.unreachable}" for f in folders if f.unreachable)
            coordinator.say(name, (sorted({number for number, _ in found}), max(usable, default=None), away))
        steps, proposed, away = coordinator.hear(name, 0, deadline_s=time.monotonic() + timeout_s)
        if proposed is None:
            if away:  # beginning anew would be taken for "there is none"
                raise UserError(f"cannot tell which checkpoints there are ({away})", remedy="try again when it does")
            if step is None and not refused:
                return None
            if step is None:
                raise UserError(
                    f"every checkpoint in {folders[-1].root} is damaged, at last: {refused}",
                    remedy="look at what was set aside (.step-…bad-…), or start again for a run from the beginning",
                )
            raise UserError(
                refused or f"{folders[-1].root} has no committed checkpoint of step {step}",
                expected=f"one of {steps}" if steps else "a folder with checkpoints",
            )
        folder, number = folders[-proposed[1]], proposed[0]
        manifest, problem, undamaged = _verify(folder, coordinator, number)
        coordinator.say(f"{name}/verdict", (problem, undamaged))
        verdicts = [word for word in coordinator.hear_all(f"{name}/verdict", timeout_s=timeout_s) if word[0]]
        if not verdicts:
            assert manifest is not None
            return folder, number, manifest
        refused, undamaged = verdicts[0]
        if undamaged:  # setting it aside would lose a good checkpoint
            raise UserError(refused, remedy="make it readable, or restore an older step by its number")
        if coordinator.rank == 0:
            aside = folder.set_aside(number, "bad")
            log.warning("checkpoint %d is damaged (%s); set aside as %s", number, refused, aside)


def _verify(folder: Home, coordinator: Coordinator, step: int) -> tuple[Manifest | None, str, bool]:
    """The manifest, or what is wrong, and whether that is no damage (a later format, a file this user may not read)."""
    try:
        manifest = folder.manifest(step)
        rank, world = coordinator.rank, coordinator.world
        share = sum(record.nbytes for record in manifest.files.values()) // world  # of any rank, nearly
        with Progress(share, f"verify {folder.final(step).name}", rank == 0, unit="B", patient=True) as bar:
            folder.check(step, manifest, part=rank, parts=world, on_bytes=bar.update)
    except BadCheckpoint as error:
        return None, str(error), isinstance(error.__cause__, OSError) and error.__cause__.errno in NOT_DAMAGE
    except UserError as error:
        return None, str(error), True
    return manifest, "", False
