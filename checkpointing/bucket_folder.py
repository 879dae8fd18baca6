"""Checkpoints in an object store: names, the commit, and what a crash leaves. What `folder` is for a file system.

    prefix/step-000000120.1a2b3c4d-5/    one try to save step 120, by the job 1a2b3c4d: valid once COMMIT.json is in it
    prefix/step-000000110.…/COMMIT.bad.json   set aside by a restore; COMMIT.left.json: of a branch rolled back
    prefix/jobs/000007-1a2b3c4d          the seventh job that writes here; a later one has taken over
    prefix/LATEST                        a hint for people and scripts; restore never trusts it

A store has no rename and no lock. So each try has a name of its own and nothing is ever written over; the commit is one
small object, which a store writes whole or not at all, created by rank 0 after the vote when all else has been
acknowledged. Two jobs cannot both commit: each notes itself under the next number, and looks for a later one before
it commits. Where two commits of one step are there (a crash between writing one and removing the other), that of the
later job and try is meant.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..dist.errors import UserError
from ..dist.log import get_logger
from .bucket_reader import BucketReader, Spool, check_stored
from .folder import parse_manifest
from .manifest import COMMIT, LATEST, MANIFEST, METADATA, BadCheckpoint, Manifest, commit_bytes
from .object_store import ObjectStore

log = get_logger(__name__)
TRY = re.compile(r"^step-(\d{9,})\.([0-9a-f-]+)$")
ASIDE = re.compile(r"^COMMIT\.(bad|left)\.json$")
JOB = re.compile(r"^(\d{6,})-([0-9a-f]+)$")
LOOKS = 8  # requests at a time, where several are needed


class BucketOps:
    """What a committer does with files of its own, on keys: a `Path` is a key below the store's prefix."""

    syncs = False  # what the store has answered is durable

    def __init__(self, store: ObjectStore) -> None:
        self.store = store
        self.committed: set[str] = set()  # by this process: never removed as the rest of a failed try

    def write_file(self, path: Path, data: bytes) -> None:
        self.store.put(path.as_posix(), data)

    def fsync_dir(self, path: Path) -> None:
        """What a store has acknowledged is durable."""

    def rmtree(self, path: Path) -> None:
        """Remove what a failed try has left."""
        if path.name not in self.committed:
            self.remove(path.name)

    def remove(self, folder: str) -> None:
        """Remove a try: its commit first, so that a half-removed one is never taken for valid."""
        names = sorted(self.store.list(folder), key=lambda name: (name != COMMIT, name))
        if names[:1] == [COMMIT]:
            self.store.delete([f"{folder}/{COMMIT}"])
        self.store.delete([f"{folder}/{name}" for name in names if name != COMMIT])
        self.committed.discard(folder)


class BucketFolder:
    """The checkpoints in `store`. `spool`: a local folder with room for what a restore downloads (None: the system's
    for temporary files). Only rank 0 of the job that was the last to begin changes anything here."""

    def __init__(self, store: ObjectStore, spool: Path | None = None, token: str = "0") -> None:
        self.store, self.ops, self.root = store, BucketOps(store), store.url
        self.unreachable = ""  # why the store did not answer when it was last asked what it holds
        self._token, self._spool_folder = token, spool
        self._valid: dict[int, Path] = {}
        self._known: set[str] = set()  # tries that have a commit, as of the last look
        self._refused: set[str] = set()
        self._leaving: dict[int, Path] = {}
        self._job = ""
        self._spool: Spool | None = None

    def scratch(self, step: int, token: str) -> Path:
        """The key of one try; all ranks give the same, new `token`."""
        return Path(f"step-{step:09d}.{token}")

    def final(self, step: int) -> Path:
        """The key of the valid try of `step`; one that is not there where there is none."""
        if step not in self._valid:
            self._look()
        return self._valid.get(step, Path(f"step-{step:09d}.none"))

    def committed(self) -> list[int]:
        """The steps that have a COMMIT.json, oldest first; says nothing about their content. What was seen last when
        the store does not answer; `unreachable` then says why."""
        try:
            self._look()
            self.unreachable = ""
        except OSError as error:
            self.unreachable = str(error)
            log.warning("cannot see which checkpoints %s holds (%s)", self.root, error)
        return sorted(self._valid)

    def _look(self) -> None:
        tries = [name for name in self.store.folders() if TRY.match(name)]
        unknown = [name for name in tries if name not in self._known]
        with ThreadPoolExecutor(LOOKS, thread_name_prefix="undertow-look") as pool:
            found = set(self._known) | {
                name for name, there in zip(unknown, pool.map(self._has_commit, unknown)) if there
            }
        self._known = found & set(tries)
        steps: dict[int, list[str]] = {}
        for name in sorted(self._known - self._refused):
            steps.setdefault(_step_of(name), []).append(name)
        self._valid = {
            step: Path(names[0] if len(names) == 1 else max(names, key=self._order)) for step, names in steps.items()
        }

    def _has_commit(self, name: str) -> bool:
        return self.store.exists(f"{name}/{COMMIT}")

    def _order(self, name: str) -> tuple[int, int, str]:
        """Of two commits of one step that of the later job, and of one job's that of the later try."""
        try:
            word = json.loads(self.store.get(f"{name}/{COMMIT}"))
            return int(word["job"]), int(word["try"]), name
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return -1, -1, name

    # -- a job takes the prefix ---------------------------------------------------------------------------------------

    def take(self) -> None:
        """Rank 0, before anything is written: take the next number among the jobs here, and remove what crashes have
        left. `UserError` where the bucket is missing or closed to us; a store that does not answer is asked again
        before the next commit."""
        try:
            self._enter()
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(
                f"cannot use the bucket {self.root} ({error.strerror})",
                expected="a bucket that is there, and credentials in the environment that may list, read, write and "
                "delete in it",
                remedy="create it, or mend AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT … (or those of your store)",
            ) from None
        except OSError as error:
            log.warning("the bucket %s does not answer (%s); saves to it will fail until it does", self.root, error)

    def _enter(self) -> None:
        jobs = [name for name in self.store.list("jobs") if JOB.match(name)]
        number = 1 + max((int(name.split("-")[0]) for name in jobs), default=0)
        job = f"{number:06d}-{self._token}"
        self.store.put(f"jobs/{job}", f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self.store.delete([f"jobs/{name}" for name in jobs])
        self._job = job
        self.clear_scratch()

    def _still_ours(self) -> None:
        if not self._job:
            self._enter()
        jobs = sorted(self.store.list("jobs"), key=lambda name: (int(name.split("-")[0]), name))
        if not jobs or jobs[-1] != self._job:
            raise RuntimeError(
                f"the job {jobs[-1] if jobs else '?'} has taken {self.root} over since this one, {self._job}, began"
            )

    def clear_scratch(self) -> None:
        """Remove tries that were never committed, but for this job's own."""
        self._look()
        for name in self.store.folders():
            unknown = TRY.match(name) and name not in self._known and self._token not in name
            if unknown and not any(ASIDE.match(found) for found in self.store.list(name)):
                self.ops.remove(name)

    def release(self) -> None:
        """The number stays noted, so that they go on rising."""
        self._drop_spool()

    # -- a commit -----------------------------------------------------------------------------------------------------

    def commit(self, scratch: Path, manifest: Manifest, metadata: bytes) -> Path:
        """Publish `scratch`, whose other objects the store has acknowledged, as the checkpoint of the manifest's step.
        When the answer to the last put is lost, the save counts as failed and its objects are removed; should that fail
        too, they are a valid checkpoint, for all ranks have voted for it."""
        data, step, name = manifest.dumps(), manifest.step, scratch.name
        self.store.put(f"{name}/{METADATA}", metadata)
        self.store.put(f"{name}/{MANIFEST}", data)
        self._still_ours()
        self._leave_branch(step)
        before = self._valid.get(step)
        number, attempt = int(self._job.split("-")[0]), int(name.split("-")[-1], 16)
        word = json.loads(commit_bytes(data, step, time.time())) | {"job": number, "try": attempt}
        self.store.create(f"{name}/{COMMIT}", json.dumps(word).encode())
        self.ops.committed.add(name)
        self._known.add(name)
        self._valid[step] = scratch
        try:
            if before is not None and before != scratch:
                self.ops.remove(before.name)
            self.store.put(LATEST, f"{name}\n".encode())
        except OSError as error:  # it is valid already, and the later of two is taken
            log.warning("step %d is committed, but %s refuses what follows (%s)", step, self.root, error)
        return scratch

    def _leave_branch(self, step: int) -> None:
        self._look()
        for later in [other for other in sorted(self._valid) if other > step]:
            aside = self.set_aside(later, "left")
            log.warning("step %d was left by a rollback to before step %d; set aside: %s", later, step, aside)

    def set_aside(self, step: int, why: str) -> Path:
        """Put a checkpoint aside ('bad' or 'left'): its commit gets another name. Where the store refuses that, this
        job at least does not take it again."""
        path = self.final(step)
        self._refused.add(path.name)
        self._valid.pop(step, None)
        try:
            word = self.store.get(f"{path}/{COMMIT}")
            self.store.put(f"{path}/COMMIT.{why}.json", word)
            self.store.delete([f"{path}/{COMMIT}"])
            self._known.discard(path.name)
        except OSError as error:
            log.warning("cannot set %s/%s aside (%s)", self.root, path, error)
        return path / f"COMMIT.{why}.json"

    def invalidate(self, step: int) -> None:
        """From now on it is no checkpoint; `remove` gives its room back."""
        path = self.final(step)
        self.store.delete([f"{path}/{COMMIT}"])
        self._known.discard(path.name)
        self._leaving[step] = self._valid.pop(step, path)

    def remove(self, step: int) -> None:
        self.ops.remove(self._leaving.pop(step, self.final(step)).name)

    # -- reading ------------------------------------------------------------------------------------------------------

    def manifest(self, step: int) -> Manifest:
        """The manifest of `step`, after COMMIT.json has vouched for it; else `BadCheckpoint`."""
        path = self.final(step)
        try:
            commit, data = self.store.get(f"{path}/{COMMIT}"), self.store.get(f"{path}/{MANIFEST}")
        except OSError as error:
            raise BadCheckpoint(f"{self.root}/{path} cannot be read ({error.strerror})") from error
        found = parse_manifest(commit, data, Path(path))
        if found.step != step:
            raise BadCheckpoint(f"{self.root}/{path} holds the checkpoint of step {found.step}")
        return found

    def check(
        self,
        step: int,
        manifest: Manifest,
        *,
        part: int = 0,
        parts: int = 1,
        keep: bool = True,
        on_bytes: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        """Lengths, then the checksums of every `parts`-th chunk beginning with `part`. With `keep` what was downloaded
        for it is not downloaded again by the `reader` of this step."""
        path = self.final(step)
        check_stored(self.store, path, manifest)
        chunks = [(name, at) for name, record in sorted(manifest.files.items()) for at in range(len(record.chunks))]
        spool = self._spool_of(path, manifest) if keep else Spool(self.store, path, manifest, None)
        spool.fetch(chunks[part::parts], on_bytes)

    def reader(self, step: int, manifest: Manifest) -> BucketReader:
        path = self.final(step)
        return BucketReader(Path(f"{self.root}/{path}"), manifest, self._spool_of(path, manifest))

    def _spool_of(self, path: Path, manifest: Manifest) -> Spool:
        if self._spool is None or self._spool.closed or self._spool.key != path.as_posix():
            self._drop_spool()
            self._spool = Spool.local(self.store, path, manifest, self._spool_folder)
        return self._spool

    def _drop_spool(self) -> None:
        if self._spool is not None:
            self._spool.close()
            self._spool = None


def _step_of(name: str) -> int:
    match = TRY.match(name)
    assert match is not None
    return int(match[1])
