"""The folder in a machine's memory where ranks keep their own shards and those of the ranks whose partners they are.

    root/<job>-<plan>-own-00003-1/    rank 3's shard files, mapped; on rank 0 also the manifest and COMMIT.json
    root/<job>-<plan>-held-00001-0/   the same of rank 1, received; made by the rank that holds it
    root/read-<job>/                  what a restore brings from other machines
    root/ROOT.part                    the checkpoint folder that all of it belongs to

SAVE.json, written last and removed first, says of which save an entry is a whole part. Which entries make a checkpoint
is known only over all machines (`partner_restore`).
"""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .host_tier import ROOT_FILE, memory_name
from .manifest import COMMIT, MANIFEST, SAFE_NAME
from .memory_ops import MemoryOps

SAVE_FILE = "SAVE.json"
ENTRY = re.compile(r"^[0-9a-f]+-[0-9a-f]+-(own|held)-(\d{5,})-(\d+)$")
READ = "read-"
OPS = MemoryOps()


@dataclass(frozen=True)
class Entry:
    """One rank's whole part of a save in a machine's memory. `number` counts the tries of the job that saved;
    `commit` and `manifest` are there in entries of rank 0, once all ranks had voted for the save."""

    name: str
    kind: str
    rank: int
    save: str
    step: int
    number: int
    files: dict[str, int]
    commit: bytes = b""
    manifest: bytes = b""


class PartnerMemory:
    """The folder of this machine for the checkpoint folder `root`."""

    def __init__(self, memory: Path, root: Path) -> None:
        self._owner = root.resolve()
        self.memory, self.root = memory, memory / f"{memory_name(root)}-partner"

    def make(self) -> None:
        """Create it. `OSError` where that fails, or where something that is not this user's bears its name."""
        with suppress(FileExistsError):
            os.mkdir(self.root, 0o700)
        if not self._ours():
            raise PermissionError(f"{self.root} is not this user's folder: remove it, or pass host_every=0")
        if self._owner.exists():  # where it is on another machine's disk only, nobody here may take it for vanished
            (self.root / ROOT_FILE).write_text(f"{self._owner}\n")

    def _ours(self) -> bool:
        try:
            status = os.lstat(self.root)
        except OSError:
            return False
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()

    def free(self) -> int:
        return shutil.disk_usage(self.memory).free

    def entries(self) -> list[Entry]:
        """What is whole here; everything else is of no use to anybody."""
        return list(self._entries()) if self._ours() else []

    def _entries(self) -> Iterator[Entry]:
        for name in sorted(os.listdir(self.root)):
            if match := ENTRY.match(name):
                path = self.root / name
                with suppress(OSError, ValueError, KeyError, TypeError):
                    head = json.loads((path / SAVE_FILE).read_bytes())
                    files = {f: os.lstat(path / f).st_size for f in os.listdir(path) if SAFE_NAME.fullmatch(f)}
                    both = [(path / f).read_bytes() if (path / f).is_file() else b"" for f in (COMMIT, MANIFEST)]
                    known = (str(head["save"]), int(head["step"]), int(head["number"]))
                    yield Entry(name, match[1], int(match[2]), *known, files, *both)

    def path(self, entry: str, file: str) -> Path:
        """Where `file` of `entry` lies. `ValueError` for names that are none of ours: they come from other machines."""
        if not ENTRY.match(entry) or not SAFE_NAME.fullmatch(file):
            raise ValueError(f"{entry}/{file} is no part of a checkpoint")
        return self.root / entry / file

    def remove(self, entry: str) -> None:
        """Give an entry's memory back, once nobody maps it."""
        path = self.root / entry
        with suppress(OSError):  # another rank of this machine was faster
            invalidate(path)
            OPS.rmtree(path)

    def clear(self) -> None:
        """Remove what is of no use: parts of saves that did not end, what an interrupted restore has brought."""
        if self._ours():
            whole = {entry.name for entry in self._entries()}
            for name in os.listdir(self.root):
                if name.startswith(READ) or (ENTRY.match(name) and name not in whole):
                    self.remove(name)

    def remove_all(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def invalidate(path: Path) -> None:
    """From now on the entry at `path` is part of nothing."""
    for name in (SAVE_FILE, COMMIT):
        with suppress(FileNotFoundError):
            os.unlink(path / name)


def seal(path: Path, save: str, step: int, number: int) -> None:
    """The entry at `path` is a whole part of `save`."""
    text = json.dumps({"save": save, "step": step, "number": number}).encode()
    OPS.write_file(path / SAVE_FILE, text)


class Held:
    """Room for one save of another rank's shard file: mapped, so that bytes are received into it."""

    def __init__(self, path: Path, shard_name: str, nbytes: int) -> None:
        self.path, self.file, self.nbytes = path, path / shard_name, nbytes
        OPS.mkdir(path)
        rounded = max(1, -(-nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE
        handle = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(handle, 0, rounded)
            self._map = mmap.mmap(handle, rounded)
            os.ftruncate(handle, nbytes)  # its last page stays, and with it the mapping
        finally:
            os.close(handle)
        np.frombuffer(self._map, dtype=np.uint8)[: nbytes : mmap.PAGESIZE] |= 0  # have the pages now

    def view(self, begin: int, nbytes: int) -> memoryview:
        if not 0 <= begin <= begin + nbytes <= self.nbytes:
            raise ValueError(f"bytes [{begin}, {begin + nbytes}) of a shard of {self.nbytes}")
        return memoryview(self._map)[begin : begin + nbytes]
