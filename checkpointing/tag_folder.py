"""Checkpoints as DeepSpeed lays them out, made atomic: DIR/TAG/files, and DIR/latest with the name of the newest.

A tag is valid when it holds undertow.json, which lists every file with checksums and is written last; `latest` follows
it. Files are renamed into place only when every rank's are durable, so a tag that is written again stays as it was
until then. Other tools see ordinary files and one more.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from .files import FileOps
from .lazy_file import check_file, sum_file
from .manifest import BadCheckpoint, FileRecord, checksum

RECORD = "undertow.json"
OPTIMIZER_FILE = re.compile(r"(?:[a-z0-9]+_)?zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt")
FORMAT = 1


@dataclass(frozen=True)
class TagRecord:
    """What undertow.json says: the tag's files and when it was committed (seconds since 1970; only for order)."""

    tag: str
    files: Mapping[str, FileRecord]
    epoch_s: float

    def dumps(self) -> bytes:
        body = {
            "format": FORMAT,
            "tag": self.tag,
            "epoch_s": self.epoch_s,
            "files": {name: asdict(record) for name, record in sorted(self.files.items())},
        }
        text = json.dumps(body, sort_keys=True)
        return json.dumps({**body, "checksum": checksum(text.encode())}, sort_keys=True).encode()


def read_record(folder: Path) -> TagRecord | None:
    """The record of the tag in `folder`, None when there is none; `BadCheckpoint` when it cannot be trusted."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        body = json.loads(path.read_bytes())
        promised = body.pop("checksum")
        if body["format"] != FORMAT:
            raise BadCheckpoint(f"{path} has format {body['format']}, which this version cannot read")
        if checksum(json.dumps(body, sort_keys=True).encode()) != promised:
            raise BadCheckpoint(f"{path} is damaged")
        files = {str(n): FileRecord(int(r["nbytes"]), tuple(r["chunks"])) for n, r in body["files"].items()}
        return TagRecord(str(body["tag"]), files, float(body["epoch_s"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCheckpoint(f"{path} is damaged ({type(error).__name__}: {error})") from error


def problems(folder: Path, *, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the tag in `folder`; of its files the `part`-th of `parts` are read."""
    try:
        record = read_record(folder)
    except BadCheckpoint as error:
        return [str(error)]
    if record is None:
        return [f"{folder} has no {RECORD}: it was not committed by undertow"]
    names = sorted(record.files)[part::parts]
    return [problem for name in names if (problem := check_file(folder / name, record.files[name]))]


def publish(root: Path, tag: str, files: Mapping[str, FileRecord], ops: FileOps, *, latest: bool) -> None:
    """The last steps of a commit, when every file is durable under its own name: the record, then `latest`."""
    folder = root / tag
    ops.fsync_dir(folder)
    ops.write_file(folder / RECORD, TagRecord(tag, files, time.time()).dumps())
    ops.fsync_dir(folder)
    if latest:
        ops.write_file(root / "latest", tag.encode())
    ops.fsync_dir(root)


def seal_folder(folder: Path, written: Mapping[Path, FileRecord], ops: FileOps) -> None:
    """Make `folder` whole before it gets its name: sums of the `written` files and of all others, durable."""
    records = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            records[path.relative_to(folder).as_posix()] = written.get(path) or sum_file(path)
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        ops.fsync_dir(path)
    ops.write_file(folder / RECORD, TagRecord(folder.name, records, time.time()).dumps())
    ops.fsync_dir(folder)


def candidates(root: Path) -> list[str]:
    """The tags to try, best first: the one that `latest` names, then committed ones, the newest before the older."""
    try:
        named = (root / "latest").read_text().strip()
    except OSError:
        named = ""
    found = []
    for path in root.iterdir() if root.is_dir() else []:
        try:
            record = read_record(path) if path.is_dir() else None
        except BadCheckpoint:
            continue
        if record is not None:
            found.append((record.epoch_s, path.name))
    limit = next((epoch_s for epoch_s, name in found if name == named), float("inf"))
    older = [name for epoch_s, name in sorted(found, reverse=True) if name != named and epoch_s <= limit]
    return ([named] if named else []) + older


def zero_ranks(folder: Path) -> int:
    """Over how many data-parallel ranks the optimizer of this tag is partitioned; 0 when it is whole."""
    found = [match for path in folder.glob("*.pt") if (match := OPTIMIZER_FILE.fullmatch(path.name))]
    return max((int(match[1]) + 1 for match in found), default=0)
