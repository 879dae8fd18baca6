"""A folder of checkpoints: names, what is committed, the commit itself, and the clean-up after a crash.

    root/.step-000000120.tmp-1a2b3c4d/   being written
    root/step-000000120/                 renamed when every file is durable, COMMIT.json among them
    root/.step-000000140.bad-…/          damaged, set aside by a restore; `.left-…`: of a branch that a run rolled back
    root/RESTARTS.json                   how often a job has started from the newest checkpoint
    root/LATEST                          a hint for people and scripts; restore never trusts it
    root/.lock                           held by the job that writes here

Order: shard files, fsync, vote, metadata and manifest and COMMIT.json, fsync, folder fsync, rename, root fsync. Each
fsync waits for what is written beside, so they are few, and of several files at once. A crash at any point leaves the
older checkpoints as they were.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..dist.errors import UserError
from ..dist.log import get_logger
from .files import FileOps, together
from .manifest import (
    COMMIT,
    LATEST,
    MANIFEST,
    METADATA,
    BadCheckpoint,
    Manifest,
    NewerFormat,
    checksum,
    commit_bytes,
    require_known_format,
)
from .reader import Reader
from .recycle import Pool
from .verify import check_content, check_lengths

log = get_logger(__name__)
RESTARTS = "RESTARTS.json"
FINAL = re.compile(r"^step-(\d{9,})$")
OURS = re.compile(r"^(\.?step-\d{9,}(\.(tmp|old|bad|left)-[0-9a-f-]+)?|LATEST|RESTARTS\.json|\.lock|.*\.part)$")


class Folder:
    """The checkpoints under `root`. Only rank 0 of the job that holds the lock changes anything here."""

    unreachable = ""  # a disk that does not answer raises

    def __init__(self, root: Path, ops: FileOps) -> None:
        self.root, self.ops = root, ops
        self.pool: Pool | None = None  # where shard files of removed checkpoints go, to be written over
        self._lock = -1

    def final(self, step: int) -> Path:
        return self.root / f"step-{step:09d}"

    def scratch(self, step: int, token: str) -> Path:
        return self.root / f".step-{step:09d}.tmp-{token}"

    def committed(self) -> list[int]:
        """The steps that have a COMMIT.json, oldest first. Says nothing about their content."""
        if not self.root.is_dir():
            return []
        found = [FINAL.match(entry.name) for entry in os.scandir(self.root) if not entry.is_symlink()]
        steps = [int(match.group(1)) for match in found if match]
        return sorted(step for step in steps if (self.final(step) / COMMIT).is_file())

    def take(self) -> None:
        """Make the folder ours: create, lock, refuse somebody else's, clean up what a crash left."""
        self._refuse_strangers()
        try:
            self._make_root()
            self._lock = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UserError(
                f"cannot write to the checkpoint folder {self.root} ({error.strerror})",
                expected="a folder that this user may create or write",
                remedy="pass another folder",
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(self._lock, 200, 0).decode(errors="replace").strip()
            os.close(self._lock)
            self._lock = -1
            ours = owner.startswith(f"process {os.getpid()} on ")
            raise UserError(
                f"the checkpoint folder {self.root} is in use by {owner or 'another job'}" + ours * ", this very one",
                expected="one job at a time in a checkpoint folder",
                remedy="close() the Checkpointer made before" if ours else "stop that job or pass another folder",
            ) from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self._recover()

    def _refuse_strangers(self) -> None:
        try:
            names = os.listdir(self.root)
        except OSError:
            return  # not there yet, or `take` will say what is wrong with it
        strangers = sorted(name for name in names if not OURS.match(name))
        if strangers and not self.committed():
            raise UserError(
                f"{self.root} holds other files ({', '.join(strangers[:3])}{' …' if len(strangers) > 3 else ''})",
                expected="an empty folder or one that undertow wrote",
                remedy="pass a new folder; nothing was changed",
            )

    def _make_root(self) -> None:
        """Create the folder, durably: a checkpoint in a folder whose own name is lost would be lost with it."""
        missing = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
        self.ops.mkdir(self.root)
        for folder in missing:
            self.ops.fsync_dir(folder.parent)

    def release(self) -> None:
        """Give the lock back."""
        if self._lock >= 0:
            if self.pool is not None:
                self.pool.close()
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # closing is not enough: forked loader processes hold it open too
            os.close(self._lock)
            self._lock = -1

    def clear_scratch(self) -> None:
        """Remove what was being written; nobody writes any more."""
        for name in sorted(os.listdir(self.root)):
            if re.match(r"^\.step-\d+\.tmp-", name):
                self.ops.rmtree(self.root / name)

    def _recover(self) -> None:
        self.clear_scratch()
        for name in sorted(os.listdir(self.root)):
            path = self.root / name
            if match := re.match(r"^\.step-(\d+)\.old-", name):
                # a crash between the two renames of `commit`, or just after them
                final = self.final(int(match.group(1)))
                if _whole(final):
                    self.ops.rmtree(path)
                else:
                    if final.exists():
                        self.ops.rename(final, self._aside(final, "bad"))
                    self.ops.rename(path, final)
                    self.ops.fsync_dir(self.root)

    def commit(self, scratch: Path, manifest: Manifest, metadata: bytes) -> Path:
        """Publish `scratch`, whose shard files are durable already though their names may not be, as the checkpoint of
        the manifest's step. When that fails, an older checkpoint of the same step is put back."""
        data = manifest.dumps()
        final = self.final(manifest.step)
        small = {METADATA: metadata, MANIFEST: data, COMMIT: commit_bytes(data, manifest.step, time.time())}
        new = {name: text for name, text in small.items() if not self._has(scratch, name, text)}
        together(self.ops.syncs, *(partial(self.ops.write_file, scratch / name, text) for name, text in new.items()))
        self.ops.fsync_dir(scratch)
        self._leave_branch(manifest.step)
        replaced = self._aside(final, "old") if self.ops.exists(final) else None
        try:
            if replaced is not None:
                self.ops.rename(final, replaced)
            self.ops.rename(scratch, final)
            self.ops.fsync_dir(self.root)
        except OSError:
            self._undo(scratch, final, replaced)
            raise
        self._hint(final)
        if replaced is not None:
            self.ops.rmtree(replaced)
        return final

    def _has(self, scratch: Path, name: str, text: bytes) -> bool:
        """Whether a file of `scratch` is known to hold this `text` already."""
        return False

    def _hint(self, final: Path) -> None:
        self.ops.write_hint(self.root / LATEST, f"{final.name}\n".encode())

    def _leave_branch(self, step: int) -> None:
        """Set later checkpoints aside: a run that writes `step` after them was rolled back and goes on from there."""
        later = [other for other in self.committed() if other > step]
        for other in later:
            aside = self._aside(self.final(other), "left")
            log.warning("step %d was left by a rollback to before step %d; set aside as %s", other, step, aside)
            self.ops.rename(self.final(other), aside)
        if later:
            self.ops.fsync_dir(self.root)

    def _undo(self, scratch: Path, final: Path, replaced: Path | None) -> None:
        try:
            if not scratch.exists():
                self.ops.rmtree(final)
            if replaced is not None and replaced.exists():
                self.ops.rename(replaced, final)
            self.ops.fsync_dir(self.root)
        except OSError as error:  # the disk refuses this too: the next job's `take` does it
            log.warning("cannot clear away the failed checkpoint %s (%s)", final, error)

    def set_aside(self, step: int, why: str) -> Path:
        """Rename a checkpoint ('bad': damaged, 'left': of a branch that was rolled back) so that it is neither restored
        nor lost; its new path."""
        final = self.final(step)
        aside = self._aside(final, why)
        self.ops.rename(final, aside)
        self.ops.fsync_dir(self.root)
        return aside

    def count_start(self, step: int) -> int:
        """Note that a job starts from `step`; how often that has happened in a row. A run that dies before its next
        checkpoint again and again shows here."""
        path = self.root / RESTARTS
        try:
            before = json.loads(path.read_bytes())
        except (OSError, ValueError):
            before = {}  # the first start, or a note that a crash has torn: only counting begins anew
        again = isinstance(before, dict) and before.get("step") == step and isinstance(before.get("starts"), int)
        starts = before["starts"] + 1 if again else 1
        try:
            self.ops.write_file(path, json.dumps({"step": step, "starts": starts}).encode())
        except OSError as error:
            log.warning("cannot note the start in %s (%s)", path, error.strerror)
        return starts

    def invalidate(self, step: int) -> None:
        """From now on it is no checkpoint; `remove` gives its room back."""
        self.ops.unlink(self.final(step) / COMMIT)

    def remove(self, step: int) -> None:
        if self.pool is not None:
            try:
                self.pool.fill(self.final(step))
            except OSError as error:
                log.warning("cannot keep the files of step %d to write over them (%s)", step, error)
        self.ops.rmtree(self.final(step))

    def manifest(self, step: int) -> Manifest:
        """The manifest of `step`, after COMMIT.json has vouched for it; else `BadCheckpoint`."""
        path = self.final(step)
        found = read_manifest(path)
        if found.step != step:
            raise BadCheckpoint(f"{path} holds the checkpoint of step {found.step}")
        return found

    def check(self, step: int, manifest: Manifest, *, part: int, parts: int, on_bytes: Callable[[int], None]) -> None:
        """Lengths, then the checksums of every `parts`-th chunk beginning with `part`."""
        check_lengths(self.final(step), manifest)
        check_content(self.final(step), manifest, part=part, parts=parts, on_bytes=on_bytes)

    def reader(self, step: int, manifest: Manifest) -> Reader:
        return Reader(self.final(step), manifest)

    def _aside(self, final: Path, why: str) -> Path:
        stamp = time.time_ns()
        while (aside := self.root / f".{final.name}.{why}-{stamp:x}").exists():  # clocks stand still and go back
            stamp += 1
        return aside


def _whole(path: Path) -> bool:
    """Whether a checkpoint is committed with all its files, without reading their content."""
    try:
        check_lengths(path, read_manifest(path))
    except BadCheckpoint:
        return False
    except NewerFormat:
        return True
    return True


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint folder `path`, after COMMIT.json has vouched for it; else `BadCheckpoint`."""
    for name in (COMMIT, MANIFEST):
        if not (path / name).is_file():  # reading a pipe that somebody has planted would never end
            raise BadCheckpoint(f"{path / name} is missing or no regular file")
    try:
        commit, data = (path / COMMIT).read_bytes(), (path / MANIFEST).read_bytes()
    except OSError as error:
        raise BadCheckpoint(f"{path} has no readable commit ({type(error).__name__}: {error})") from error
    return parse_manifest(commit, data, path)


def parse_manifest(commit: bytes, data: bytes, path: Path) -> Manifest:
    """The manifest in `data`, after the bytes of COMMIT.json have vouched for it; `path` is for messages."""
    try:
        word = json.loads(commit)
        promised, version = word["manifest"], word["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"{path} has no readable commit ({type(error).__name__}: {error})") from error
    require_known_format(version, path / COMMIT)
    if checksum(data) != promised:
        raise BadCheckpoint(f"{path / MANIFEST} does not match the checksum in {COMMIT}")
    return Manifest.loads(data, path / MANIFEST)
