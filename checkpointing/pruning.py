"""What retention lets go in one tier: invalid at once, while the room it takes is given back beside the next save.

On some file systems a large file takes long to remove, so a thread of its own does that, never behind by more than one
save. `retention` has the rules; only the commit thread of rank 0 calls this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from ..dist.log import get_logger
from .bucket_folder import BucketFolder
from .folder import Folder
from .manifest import BadCheckpoint, metrics_of
from .retention import Retention, to_remove

log = get_logger(__name__)
Home = Folder | BucketFolder  # where the checkpoints of a tier are


class Pruner:
    """For the checkpoints in `folder`; `keep` as a `Committer` has it."""

    def __init__(self, tier: str, folder: Home, keep: int | Retention | None) -> None:
        self._folder, self._keep = folder, keep
        self._metrics: dict[int, Mapping[str, float]] = {}
        self._reaper = ThreadPoolExecutor(1, thread_name_prefix=f"undertow-reaper-{tier}")
        self._leaving: set[int] = set()  # steps that `_going` removes
        self._going: Future[None] | None = None

    def prune(self) -> None:
        """Begin to remove what no rule keeps; metrics are read only when a rule asks for them. `OSError` where that
        cannot be told, or done."""
        if self._keep is None:
            return
        steps = self._folder.committed()
        if isinstance(self._keep, Retention) and self._keep.best:
            for step in steps:
                if step not in self._metrics:
                    try:
                        self._metrics[step] = metrics_of(self._folder.manifest(step))
                    except BadCheckpoint as error:
                        if isinstance(error.__cause__, (TimeoutError, PermissionError)):
                            raise error.__cause__ from None  # it may be one of the best: nothing is removed now
                        continue  # damaged: it has no metrics, and restore will set it aside
        steps = to_remove(steps, self._keep, self._metrics)
        for step in steps:
            self._folder.invalidate(step)
            self._metrics.pop(step, None)
        if steps:
            self.drain()
            self._leaving, self._going = set(steps), self._reaper.submit(self._reap, steps)

    def _reap(self, steps: Sequence[int]) -> None:
        for step in steps:
            try:
                self._folder.remove(step)
            except OSError as error:
                log.warning("cannot remove the checkpoint of step %d (%s)", step, error)

    def clear(self, step: int) -> None:
        """Return when nothing that goes has the name of `step`."""
        if step in self._leaving:
            self.drain()

    def drain(self) -> None:
        """Wait until all that was to go is gone."""
        if self._going is not None:
            self._going.result()

    def close(self) -> None:
        self._reaper.shutdown()
