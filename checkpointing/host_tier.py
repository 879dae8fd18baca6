"""The host-memory tier: checkpoints in named shared memory, which outlives the training process.

A generation is an ordinary checkpoint folder in the shared-memory file system whose shard files are mapped into the
ranks and pinned, so that copies from the device land in it directly. Saves take turns over a few generations (`turns`);
the one that is newest and valid is never overwritten, so that a process killed in mid-save restarts from the step
before. Rank 0 chooses, and all ranks must share one host's memory. Files here are plain files: no resource tracker of
Python removes them when the process is killed.
"""

from __future__ import annotations

import os
import shutil
import stat
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import xxhash

from ..dist.errors import PeerLost, UserError
from ..dist.log import get_logger
from ..dist.units import format_bytes
from .attempt import Attempt
from .choices import Choices, StateFirst
from .coordinate import Coordinator
from .generation import Generation
from .memory_folder import MemoryFolder
from .memory_ops import MemoryOps
from .plan import SavePlan, shard_name
from .turns import Claim, Turns

log = get_logger(__name__)
SHARED_MEMORY = Path("/dev/shm")
WAIT_S = 300.0  # for ranks that make their generations
ROOT_FILE = "ROOT.part"  # names the checkpoint folder that a memory folder belongs to


def memory_name(root: Path) -> str:
    """What the memory of the checkpoint folder `root` is called: this user's, wherever the path comes from."""
    return f"undertow-{os.getuid()}-{xxhash.xxh3_64(str(root.resolve()).encode()).hexdigest()}"


def free_stale(memory: Path, own: Path) -> None:
    """Free what checkpoint folders that no longer exist have left in `memory`; `own` stays."""
    for stale in memory.glob(f"undertow-{os.getuid()}-*"):
        with suppress(OSError):
            owner = Path((stale / ROOT_FILE).read_text().strip())
            if stale != own and not owner.exists():
                shutil.rmtree(stale)
                log.info("freed the shared memory of %s, which is gone", owner)


class HostTier:
    """`generations` checkpoints in shared memory for the checkpoint folder `root`."""

    tier = "host"

    def __init__(self, root: Path, coordinator: Coordinator, *, generations: int) -> None:
        if generations < 2:
            raise UserError(
                f"host_generations is {generations}", expected="at least 2: one valid while the other is written"
            )
        self.coordinator, self._count, self._root = coordinator, generations, root.resolve()
        self.folder = MemoryFolder(SHARED_MEMORY / memory_name(root), MemoryOps())
        self.turns = Turns(self.folder, coordinator.token, leads=coordinator.rank == 0)
        self._mine: list[Generation] = []
        self._folders: list[Path] = []
        self._choices = Choices(coordinator)
        self._plan: SavePlan | None = None  # that the generations are made for
        self._proven = False
        self.skipped = 0

    def take(self) -> None:
        """Rank 0: lock this folder's shared memory, and free that of folders which no longer exist."""
        free_stale(SHARED_MEMORY, self.folder.root)
        self._make_root()
        self.folder.take()
        self.turns.outside = set(self.folder.committed())

    def _make_root(self) -> None:
        self._make_own(self.folder.root)
        (self.folder.root / ROOT_FILE).write_text(f"{self._root}\n")

    @staticmethod
    def _make_own(root: Path) -> None:
        """Everyone may write to /dev/shm: what bears our name there must be this user's own, or it is not read."""
        with suppress(FileExistsError):
            os.mkdir(root, 0o700)
        status = os.lstat(root)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise UserError(f"{root} is not this user's folder", remedy="remove it, or pass host_every=0")

    def prepare(self, name: str, plan: SavePlan, *, pinned: bool) -> None:
        """Make the generations for `plan`, unless they are there. All ranks; `PeerLost` on all where one is late or has
        no memory: the next save tries again. Whatever is valid in memory stays so until a newer save is. `UserError`
        on all when memory is too small at the first time."""
        if plan is self._plan:
            return
        self._plan = None
        try:
            self.coordinator.together(name, partial(self._prepare, name, plan, pinned), timeout_s=WAIT_S)
        except BaseException:
            self.close_maps()
            for folder in self._folders:  # others need the memory: loaders of this job, for example
                with suppress(OSError):
                    os.unlink(folder / plan.shard_name)
            raise
        self._plan, self._proven = plan, True

    def _prepare(self, name: str, plan: SavePlan, pinned: bool) -> None:
        unless = f"{name}/verdict"
        self.close_maps()
        self._folders = []
        self.coordinator.say(f"{name}/size", (plan.image.size, os.uname().nodename))
        if self.coordinator.rank == 0:
            self.coordinator.say(f"{name}/folders", self._make_folders(name))
        found = self.coordinator.hear(f"{name}/folders", 0, deadline_s=time.monotonic() + WAIT_S, unless=unless)
        if isinstance(found, str):
            error = UserError(found, remedy="pass host_every=0, fewer host_generations, or partner=Partner()")
            raise PeerLost(str(error)) if self._proven else error
        self._folders = found
        self._mine = [Generation(folder / plan.shard_name, plan, pinned=pinned) for folder in found]
        self.turns.begin(found)
        self.coordinator.say(f"{name}/open", True)
        if self.coordinator.rank == 0:  # whose first claim renames a folder
            self.coordinator.hear_all(f"{name}/open", timeout_s=WAIT_S, unless=unless)

    def _make_folders(self, name: str) -> list[Path] | str:
        words = self.coordinator.hear_all(f"{name}/size", timeout_s=WAIT_S, unless=f"{name}/verdict")
        hosts = sorted({host for _, host in words})
        if len(hosts) > 1:
            return f"the host-memory tier needs all ranks on one host; these are on {', '.join(hosts)}"
        self._make_root()
        old = self.folder.committed()
        for step in old[:-1]:  # the newest stays until a save replaces it: it may be all there is
            self.folder.remove(step)
        self.turns.outside = set(old[-1:])
        self.folder.clear_scratch()
        need = self._count * sum(size for size, _ in words)
        free = shutil.disk_usage(self.folder.root).free
        if need > free:
            return (
                f"{self._count} generations of {format_bytes(need / self._count)} need {format_bytes(need)} of shared "
                f"memory and {SHARED_MEMORY} has {format_bytes(free)} free"
            )
        folders = [self.turns.scratch(0) for _ in range(self._count)]
        for folder in folders:
            self.folder.ops.mkdir(folder)
        return folders

    def ready(self, plan: SavePlan) -> bool:
        """Whether the generations are there and made for `plan`."""
        return plan is self._plan

    def claim(self, attempt: Attempt, *, flush: bool, ready: bool, again: bool = False) -> Claim | StateFirst | None:
        """A generation for the save of `attempt`, and its folder; None when all are needed. All ranks alike. `PeerLost`
        with the reason that a rank has given for it instead. Asked before the state is read, so that a save which finds
        none costs no look at it; `StateFirst` where that cannot be told yet: then the state is read, `prepare` called,
        and asked `again`.

        `flush`: another tier will read it too, and it is not claimed again before `done` has been called for that.
        `ready`: this rank's generations are made for the last plan.
        """
        chosen = self.turns.chosen(attempt, flush=flush)
        if chosen is not None:
            return chosen
        mine = None
        if self.coordinator.rank == 0:
            mine = self._choose(attempt.step, flush, again) if ready else StateFirst()
        name, patience_s = attempt.at("again" if again else "claim"), None if ready else WAIT_S
        chosen = self._choices.tell(
            name,
            mine,
            undo=lambda one: self.release(one[0]),
            but=partial(self.turns.known, attempt.number) if attempt.rising else None,
            patience_s=patience_s,
        )
        if chosen is None:
            chosen = self.turns.chosen(attempt, flush=flush)
        if isinstance(chosen, StateFirst) and chosen.anew:
            self._plan = None  # on all ranks, so that `prepare` makes other generations
        self.skipped += chosen is None
        return chosen

    def forget_choices(self) -> None:
        """All ranks, when the generations are lost and no save is in flight: a rank that gives this save up, and makes
        no others, must not think that it knows a choice which the rest have forgotten."""
        self.turns.forget_choices()

    def _choose(self, step: int, flush: bool, again: bool) -> Claim | StateFirst | None:
        try:
            if self.turns.doubted:
                self._look()
            return self.turns.choose(step, flush=flush, again=again)
        except OSError as error:
            if again:
                raise
            log.warning("the checkpoints in %s are lost, and their memory is had anew: %s", self.folder.root, error)
            return StateFirst(anew=True)

    def _look(self) -> None:
        """`OSError` where a file of a generation is gone: a commit has failed, perhaps for that."""
        for slot in self.turns.slots:
            for rank in range(self.coordinator.world):
                os.stat(slot.folder / shard_name(rank))
        self.turns.doubted = False

    def generation(self, index: int) -> Generation:
        return self._mine[index]

    def done(self, index: int, step: int, user: str, ok: bool) -> None:
        """The use of a generation by `user` ('host': its own commit, 'flush': another tier) has ended, well or not."""
        if self.coordinator.rank == 0:
            self._choices.tidy()
            self.turns.done(index, step, user, ok)

    def release(self, index: int) -> None:
        """Rank 0: a generation that was claimed in vain."""
        self.turns.release(index)

    def forget_after(self, step: int) -> None:
        """Rank 0: checkpoints in memory after `step` are of a branch that was rolled back."""
        self.turns.forget_after(step)

    def forget(self, step: int) -> None:
        """All ranks: what memory has of `step` is not the last save of it."""
        if self.coordinator.rank == 0:
            self.turns.forget(step)

    def close_maps(self) -> None:
        for generation in self._mine:
            generation.close()
        self._mine = []
        self.turns.end()

    def close(self, *, remove: bool) -> None:
        """Unmap, and on rank 0 free all but the newest checkpoint, or with `remove` everything."""
        self.close_maps()
        if self.coordinator.rank == 0:
            for step in self.folder.committed()[:-1]:
                self.folder.remove(step)
            with suppress(OSError):  # somebody has removed it all
                self.folder.clear_scratch()
            if remove:
                shutil.rmtree(self.folder.root, ignore_errors=True)
        self.folder.release()
