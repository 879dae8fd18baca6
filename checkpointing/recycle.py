"""Files of expired checkpoints, written over by the next save instead of removed and made anew.

On a file system that tells the disk of every removed block (`discard`), removing the oldest checkpoint takes from the
rate at which the next one is written. So retention moves its shard files into a folder of their own, and a save takes
the one with its name and writes over it: nothing is freed and nothing allocated, as databases do with their logs. What
must hold: nothing that a crash leaves names a file that is written over (`fill` removes what names it first, durably),
and nobody else reads it (`FileOps.reuse` asks the kernel for a write lease, which it gives only when no other open file
and no mapping is there). Whatever is not so is removed, as without a pool.

    root/.step-000000000.tmp-1a2b3c4d-0/__0_0.distcp    a name that the next job deletes, as every version does
    root/.step-000000000.tmp-1a2b3c4d-0/__0_0.distcp.1  of a second set, where saves overlap
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from ..dist.log import get_logger, warn_once
from .files import FileOps, looks
from .manifest import COMMIT, MANIFEST, METADATA

log = get_logger(__name__)
LOCAL = ("ext4", "xfs")  # where a write lease is the kernel's word, and writing over a file moves none of its blocks
SHARD = re.compile(r"__(\d+)_0\.distcp")
SETS = ("", ".1")  # what is added to the names of each set of files in the pool


@dataclass(frozen=True)
class Choice:
    """Whether files are recycled, and why."""

    on: bool
    why: str

    def __str__(self) -> str:
        if self.on:
            fill = "until then one set of them (two where saves overlap), as large as a save, stays on the disk"
            return f"shard files of expired ones are written over by later saves ({self.why}); {fill}"
        return f"expired ones are removed ({self.why})"


def choose(root: Path, wanted: bool | None, mounts: str | None = None) -> Choice:
    """`wanted`: None where it was measured to help, which is where removed blocks are discarded at once. `mounts`: text
    of /proc/self/mountinfo. `root` need not be there yet."""
    if wanted is False:
        return Choice(False, "recycle=False")
    kind, options = mount_of(root, mounts)
    if kind not in LOCAL:
        return Choice(False, f"{kind or 'an unknown file system'}, of {' and '.join(LOCAL)} only files are recycled")
    if wanted:
        return Choice(True, "recycle=True")
    if "discard" in options:
        return Choice(True, f"{kind} mounted with discard, where removing takes from the rate of writing")
    return Choice(False, f"{kind} mounted without discard, where that costs nothing")


def mount_of(root: Path, mounts: str | None = None) -> tuple[str, frozenset[str]]:
    """Kind and options of the file system that holds `root`; ('', none) where that cannot be told."""
    root = root.absolute()
    present = next((folder for folder in (root, *root.parents) if folder.exists()), None)
    try:
        text = Path("/proc/self/mountinfo").read_text() if mounts is None else mounts
        device = os.stat(present or "/").st_dev
    except OSError:
        return "", frozenset()
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields, rest = before.split(), after.split()
        if len(fields) > 5 and len(rest) > 2 and fields[2] == wanted:
            return rest[0], frozenset(fields[5].split(",")) | frozenset(rest[2].split(","))
    return "", frozenset()


class Pool:
    """The files to write over, of one job in one checkpoint folder. Rank 0 fills and empties it, every rank takes its
    own. Thread-safe, since each step is one operation of the file system.

    One for each of `ranks` ranks is what a save needs. A save that begins before the last one is committed finds that
    one taken: from then on there are two, which is no more than lay on the disk at that moment.
    """

    def __init__(self, folder: Path, ops: FileOps, ranks: int) -> None:
        self.folder, self._ops, self._ranks = folder, ops, ranks
        self._like: tuple[int, ...] | None = None  # what a file that this process makes now looks like
        self._sets, self._filled = 1, False
        ops.spare = self.empty

    def fill(self, expired: Path) -> None:
        """Take the shard files out of `expired`, a checkpoint that was invalidated; the rest is the caller's. Where the
        disk has no room for another save beside them, they are left, too."""
        if expired.is_symlink() or not expired.is_dir():
            return
        for name in (COMMIT, METADATA, MANIFEST):
            self._ops.unlink(expired / name)
        self._ops.fsync_dir(expired)
        found = {name: os.lstat(expired / name) for name in os.listdir(expired) if self._known(name)}
        room = os.statvfs(expired)
        if room.f_bavail * room.f_frsize < sum(status.st_size for status in found.values()):
            return
        self._ops.mkdir(self.folder)
        for name, status in sorted(found.items()):
            places = [self.folder / f"{name}{mark}" for mark in SETS[: self._sets]]
            place = next((place for place in places if not place.exists()), None)
            if stat.S_ISREG(status.st_mode) and place is not None:
                self._ops.rename(expired / name, place)
                self._filled = True

    def _known(self, name: str) -> bool:
        match = SHARD.fullmatch(name)
        return match is not None and int(match[1]) < self._ranks

    def create(self, path: Path, nbytes: int) -> tuple[int, bool]:
        """A handle of the file `path`, which is not there yet, with room for `nbytes`; whether it is one that was
        recycled, and holds old bytes."""
        handle = self._take(path, nbytes)
        if handle >= 0:
            return handle, True
        handle = self._ops.create(path, nbytes)
        self._like = looks(os.fstat(handle))
        return handle, False

    def _take(self, path: Path, nbytes: int) -> int:
        if self._like is None:  # a first file of our own tells what mode and owner the next should have
            return -1
        if not any(self._out(self.folder / f"{path.name}{mark}", path) for mark in SETS):
            self._sets = len(SETS) if self._filled else 1
            return -1
        handle = self._ops.reuse(path, nbytes, self._like)
        if handle < 0:
            warn_once(log, "%s of an expired checkpoint is not written over: somebody still reads it", path.name)
            self._ops.unlink(path)
        return handle

    def _out(self, pooled: Path, path: Path) -> bool:
        try:
            self._ops.rename(pooled, path)  # from here on, nobody finds it by its old name
        except OSError:  # there is none, which is usual; whatever else is wrong, making a file will say so
            return False
        return True

    def settle(self) -> None:
        """Make it durable that a file was taken out."""
        self._ops.fsync_dir(self.folder)

    def empty(self) -> bool:
        """Remove what is there; whether that gave room back."""
        try:
            names = os.listdir(self.folder)
        except OSError:
            return False
        for name in names:
            self._ops.unlink(self.folder / name)
        return bool(names)

    def close(self) -> None:
        """Remove the pool: nobody saves any more."""
        try:
            self._ops.rmtree(self.folder)
        except OSError as error:  # the next job's `take` does it
            log.warning("cannot remove %s (%s)", self.folder, error)
