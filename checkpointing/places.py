"""Where the checkpoints are that a command is asked for: in a folder here, or in an object store by its URL.

The tools read files. For a bucket they are given a temporary folder that holds the parts they need, downloaded and
checked, and holes for the rest; nothing else is fetched.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..dist.errors import UserError
from .bucket_folder import ASIDE, TRY, BucketFolder
from .bucket_reader import check_stored, download
from .catalogue import STATES, Entry, entries, locate
from .files import FileOps
from .folder import Folder, read_manifest
from .manifest import COMMIT, METADATA, BadCheckpoint, Manifest, metrics_of
from .object_store import ObjectStore, as_url, is_url
from .verify import check_content, check_lengths

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Found:
    """One checkpoint of a command: `where` for people, and how to have its files, or its parts that hold some names."""

    where: str
    manifest: Manifest
    folder: Path
    bucket: BucketFolder | None = None

    @contextmanager
    def files(self, keys: Collection[str] | None, on_bytes: OnBytes = lambda nbytes: None) -> Iterator[Path]:
        """A folder with its files, for as long as the block runs."""
        if self.bucket is None:
            yield self.folder
            return
        with tempfile.TemporaryDirectory(prefix="undertow-") as made, told():
            download(self.bucket.store, self.folder, self.manifest, Path(made), keys=keys, on_bytes=on_bytes)
            yield Path(made)


@contextmanager
def told() -> Iterator[None]:
    """What a store refuses, as one line for the person who asked."""
    try:
        yield
    except (OSError, BadCheckpoint) as error:
        raise UserError(str(error)) from error


def open_bucket(url: str) -> BucketFolder:
    """To look into; `UserError` when it does not answer."""
    folder = BucketFolder(ObjectStore(as_url(url)))
    folder.committed()
    if folder.unreachable:
        raise UserError(f"cannot read {folder.root} ({folder.unreachable})", expected="a bucket that may be read")
    return folder


def entries_of(place: str) -> list[Entry]:
    """Everything that is or was a checkpoint in a folder or bucket, oldest step first."""
    if not is_url(place):
        return entries(Path(place))
    folder = open_bucket(place)
    with told():
        names = [name for name in folder.store.folders() if TRY.match(name)]
        return sorted((_entry(folder, name) for name in names), key=lambda entry: (entry.step, entry.path.name))


def _entry(folder: BucketFolder, name: str) -> Entry:
    stored = folder.store.list(name)
    match = TRY.match(name)
    assert match is not None
    step, path, nbytes = int(match[1]), Path(name), sum(size for size, _ in stored.values())
    age_s = max(0.0, time.time() - max((when for _, when in stored.values()), default=time.time()))
    aside = next((found[1] for found in map(ASIDE.match, stored) if found), "")
    if COMMIT not in stored:
        return Entry(step, path, STATES[aside or "tmp"], "", nbytes, age_s)
    if folder.final(step) != path:
        return Entry(step, path, STATES["old"], "", nbytes, age_s)
    try:
        manifest = folder.manifest(step)
        check_stored(folder.store, path, manifest)
    except (BadCheckpoint, UserError) as error:
        return Entry(step, path, "damaged", str(error), nbytes, age_s)
    return Entry(step, path, "whole", "", nbytes, age_s, manifest.world_size, metrics_of(manifest))


def find(place: str, step: int | None = None) -> Found:
    """The newest whole checkpoint, or the one of `step`; in a folder also the one that it is itself."""
    if not is_url(place):
        folder, manifest = locate(Path(place), step)
        return Found(str(folder), manifest, folder)
    bucket = open_bucket(place)
    steps = bucket.committed()
    problem = ""
    for number in reversed([one for one in steps if step in (None, one)]):
        try:
            manifest = bucket.manifest(number)
            check_stored(bucket.store, bucket.final(number), manifest)
        except BadCheckpoint as error:
            problem = str(error)
            continue
        return Found(f"{bucket.root}/{bucket.final(number)}", manifest, bucket.final(number), bucket)
    which = "no whole checkpoint" if step is None else f"no checkpoint of step {step}"
    raise UserError(problem or f"{bucket.root} holds {which}", expected=f"one of {steps}" if steps else "checkpoints")


def look(place: str, entry: Entry) -> Found:
    """One of `entries_of`; `BadCheckpoint` when its manifest is damaged."""
    if not is_url(place):
        return Found(str(entry.path), read_manifest(entry.path), entry.path)
    bucket = open_bucket(place)
    return Found(f"{bucket.root}/{entry.path}", bucket.manifest(entry.step), entry.path, bucket)


def problem_of(found: Found, on_bytes: OnBytes = lambda nbytes: None) -> str:
    """Every byte is read and its checksum compared; what is wrong, or ''."""
    try:
        if found.bucket is None:
            check_lengths(found.folder, found.manifest)
            check_content(found.folder, found.manifest, on_bytes=on_bytes)
        else:
            found.bucket.check(found.manifest.step, found.manifest, keep=False, on_bytes=on_bytes)
    except BadCheckpoint as error:
        return str(error)
    return ""


def fetch(found: Found, out: Path, on_bytes: OnBytes = lambda nbytes: None) -> Path:
    """Copy a checkpoint from a bucket to the folder `out` of checkpoints, as one of its own: for `dcp.load`, and for a
    run that is to go on from there. `UserError` when `out` has that step or a later one, or is in use."""
    if found.bucket is None:
        raise UserError(f"{found.where} is a folder already", expected="a URL such as s3://bucket/run")
    folder = Folder(out, FileOps())
    folder.take()
    try:
        if newer := [step for step in folder.committed() if step >= found.manifest.step]:
            raise UserError(f"{out} holds step {newer[-1]}", expected=f"steps before {found.manifest.step}")
        scratch = folder.scratch(found.manifest.step, "0")
        folder.ops.mkdir(scratch)
        with told():
            download(found.bucket.store, found.folder, found.manifest, scratch, on_bytes=on_bytes)
        return folder.commit(scratch, found.manifest, (scratch / METADATA).read_bytes())
    finally:
        folder.release()


def remove(place: str, found: Collection[Entry]) -> None:
    """Remove these of `entries_of`. A folder is locked for it; a bucket has no lock, and a job that writes there goes
    on."""
    if is_url(place):
        bucket = open_bucket(place)
        with told():
            for entry in found:
                bucket.ops.remove(entry.path.name)
        return
    folder = Folder(Path(place), FileOps())
    folder.take()
    try:
        for entry in found:
            folder.ops.rmtree(entry.path)
        folder.ops.fsync_dir(folder.root)
    finally:
        folder.release()
