"""A model of a disk that forgets: record every operation on files, then rebuild what a power failure may leave.

SIGKILL leaves the page cache intact and so hides every missing fsync. Here a write, a change of size and a change of a
folder's entries is *pending* until the file or the folder has been synced. At a crash each pending write is kept, lost
or torn (a random part of its 512-byte sectors), and each pending change of a folder is kept or lost; changes that touch
a common name keep their order, as every file system's journal does, and renaming is atomic. A synced file whose folder
entry is pending may be lost: POSIX promises no more. After ALICE (Pillai et al., OSDI 2014).
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from undertow.checkpointing.files import FileOps

SECTOR = 512


class RecordingOps(FileOps):
    """Does everything for real, and keeps the list of what was done."""

    def __init__(self) -> None:
        super().__init__(direct=False)
        self.log: list[tuple] = []
        self.times_ns: list[int] = []
        self._paths: dict[int, Path] = {}
        self._lock = threading.Lock()

    def note(self, *entry: Any) -> None:
        with self._lock:
            self.log.append(entry)
            self.times_ns.append(time.monotonic_ns())

    def mkdir(self, path: Path) -> None:
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        super().mkdir(path)
        for folder in reversed(missing):
            self.note("mkdir", folder)

    def create(self, path: Path, nbytes: int) -> int:
        handle = super().create(path, nbytes)
        self._paths[handle] = path
        self.note("create", path)
        self.note("size", path, nbytes)
        return handle

    def reuse(self, path: Path, nbytes: int, like: tuple[int, ...]) -> int:
        before = path.stat().st_size
        handle = super().reuse(path, nbytes, like)
        if handle >= 0:
            self._paths[handle] = path
            self.note("size", path, max(before, nbytes))
        return handle

    def pwrite(self, handle: int, data: Any, offset: int) -> None:
        if handle in self._paths:
            self.note("write", self._paths[handle], offset, bytes(data))
        super().pwrite(handle, data, offset)

    def finish(self, handle: int, nbytes: int) -> None:
        path = self._paths.pop(handle)
        super().finish(handle, nbytes)
        self.note("size", path, nbytes)
        self.note("sync", path)

    def abandon(self, handle: int) -> None:
        self._paths.pop(handle, None)
        super().abandon(handle)

    def write_file(self, path: Path, data: bytes) -> None:
        scratch = path.with_name(path.name + ".part")
        self.note("create", scratch)
        self.note("write", scratch, 0, bytes(data))
        self.note("sync", scratch)
        super().write_file(path, data)  # its rename is noted below

    def write_hint(self, path: Path, data: bytes) -> None:
        scratch = path.with_name(path.name + ".part")
        self.note("create", scratch)
        self.note("write", scratch, 0, bytes(data))
        super().write_hint(path, data)

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self.note("rename", source, target)

    def fsync_dir(self, path: Path) -> None:
        super().fsync_dir(path)
        self.note("syncdir", path)

    def unlink(self, path: Path) -> None:
        there = os.path.lexists(path)
        super().unlink(path)
        if there:
            self.note("unlink", path)

    def rmtree(self, path: Path) -> None:
        there = path.is_dir() and not path.is_symlink()
        super().rmtree(path)
        if there:
            self.note("unlink", path)


@dataclass
class Op:
    """One operation on inodes. `entries`: (folder, name, inode or None) set together; else data or size of `inode`."""

    entries: tuple[tuple[int, str, int | None], ...] = ()
    inode: int = -1
    offset: int = 0
    data: bytes | None = None
    size: int | None = None
    sync: int | None = None
    mark: Any = None


@dataclass
class Disk:
    """The operations of a log under the folder `base`, which held `initial` (durable) when the log began."""

    base: Path
    log: Iterable[tuple]
    initial: dict[str, bytes | None] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._count = 0
        self._folders: dict[int, dict[str, int]] = {}
        self._root = self._new_folder()
        self._start: list[Op] = []
        for name, data in sorted(self.initial.items()):
            path = self.base / name
            if data is None:
                self._start += self._read(("mkdir", path))
            else:
                self._start += self._read(("create", path)) + self._read(("write", path, 0, data))
        for entry in self.log:
            self.ops += self._read(entry)

    def _new_folder(self) -> int:
        self._count += 1
        self._folders[self._count] = {}
        return self._count

    def _find(self, path: Path) -> tuple[int, str]:
        folder = self._root
        *parts, name = path.relative_to(self.base).parts
        for part in parts:
            folder = self._folders[folder][part]
        return folder, name

    def _inode(self, path: Path) -> int:
        if path == self.base:
            return self._root
        folder, name = self._find(path)
        return self._folders[folder][name]

    def _read(self, entry: tuple) -> list[Op]:
        """Translate one entry from paths to inodes, following all renames so far."""
        kind, *rest = entry
        if kind == "mark":
            return [Op(mark=rest)]
        path = rest[0]
        if kind == "syncdir" and path in self.base.parents:
            return []  # above what is modelled
        if kind == "mkdir":
            folder, name = self._find(path)
            if name in self._folders[folder]:
                return []  # another rank was first
            inode = self._new_folder()
            self._folders[folder][name] = inode
            return [Op(entries=((folder, name, inode),))]
        if kind == "create":
            folder, name = self._find(path)
            if name in self._folders[folder]:
                return [Op(inode=self._folders[folder][name], size=0)]
            self._count += 1
            self._folders[folder][name] = self._count
            return [Op(entries=((folder, name, self._count),))]
        if kind == "rename":
            (folder, name), (into, new) = self._find(path), self._find(rest[1])
            inode = self._folders[folder].pop(name)
            self._folders[into][new] = inode
            return [Op(entries=((folder, name, None), (into, new, inode)))]
        if kind == "unlink":
            folder, name = self._find(path)
            del self._folders[folder][name]
            return [Op(entries=((folder, name, None),))]
        inode = self._inode(path)
        if kind == "write":
            return [Op(inode=inode, offset=rest[1], data=rest[2])]
        if kind == "size":
            return [Op(inode=inode, size=rest[1])]
        assert kind in ("sync", "syncdir"), kind
        return [Op(sync=inode)]

    def marks(self, count: int) -> list[Any]:
        """The marks among the first `count` operations."""
        return [op.mark for op in self.ops[:count] if op.mark is not None]

    def after_crash(self, count: int, rng: random.Random, keep: float) -> dict[str, bytes | None]:
        """What a disk may hold when power fails after `count` operations: path → content (None: a folder).

        `keep`: the share of pending operations that reached it; 1.0 is a crash of the process alone.
        """
        synced: set[int] = set()
        durable = [False] * count
        for index in range(count - 1, -1, -1):
            op = self.ops[index]
            if op.sync is not None:
                synced.add(op.sync)
            durable[index] = op.inode in synced or bool(op.entries and all(f in synced for f, _, _ in op.entries))
        folders: dict[int, dict[str, int]] = {}
        files: dict[int, bytearray] = {}
        lost: set[tuple[int, str]] = set()
        for op, safe in [(op, True) for op in self._start] + list(zip(self.ops[:count], durable)):
            if op.entries:
                names = {(folder, name) for folder, name, _ in op.entries}
                if not safe and (names & lost or rng.random() >= keep):
                    lost |= names
                    continue
                for folder, name, inode in op.entries:
                    if inode is None:
                        folders.setdefault(folder, {}).pop(name, None)
                    else:
                        folders.setdefault(folder, {})[name] = inode
            elif op.data is not None:
                _write(files.setdefault(op.inode, bytearray()), op, safe, rng, keep)
            elif op.size is not None and (safe or rng.random() < keep):
                content = files.setdefault(op.inode, bytearray())
                del content[op.size :]
                content.extend(bytes(op.size - len(content)))
        found: dict[str, bytes | None] = {}
        self._walk(self._root, "", folders, files, found)
        return found

    def _walk(self, inode: int, prefix: str, folders: dict, files: dict, found: dict) -> None:
        for name, child in sorted(folders.get(inode, {}).items()):
            path = f"{prefix}{name}"
            if child in self._folders:
                found[path] = None
                self._walk(child, f"{path}/", folders, files, found)
            else:
                found[path] = bytes(files.get(child, b""))


def _write(content: bytearray, op: Op, safe: bool, rng: random.Random, keep: float) -> None:
    assert op.data is not None
    content.extend(bytes(max(0, op.offset + len(op.data) - len(content)))) if safe else None
    fate = "kept" if safe or keep == 1.0 else rng.choices(["kept", "lost", "torn"], [keep, 1 - keep, 0.3])[0]
    if fate == "lost":
        return
    content.extend(bytes(max(0, op.offset + len(op.data) - len(content))))
    for begin in range(0, len(op.data), SECTOR if fate == "torn" else max(1, len(op.data))):
        if fate == "torn" and rng.random() < 0.5:
            continue
        end = begin + SECTOR if fate == "torn" else len(op.data)
        piece = op.data[begin:end]
        content[op.offset + begin : op.offset + begin + len(piece)] = piece


def merge(logs: Iterable[list[tuple[int, tuple]]]) -> list[tuple]:
    """The logs of several ranks of one host as one: an operation is noted before its rank tells others that it is done,
    so times keep every order that the ranks have made."""
    return [entry for _, entry in sorted((item for log in logs for item in log), key=lambda item: item[0])]


def build(image: dict[str, bytes | None], root: Path) -> None:
    """Put an image on the real disk."""
    root.mkdir(parents=True)
    for name, data in image.items():
        if data is None:
            (root / name).mkdir(parents=True, exist_ok=True)
        else:
            (root / name).write_bytes(data)


def read_image(root: Path) -> dict[str, bytes | None]:
    """The opposite of `build`."""
    found: dict[str, bytes | None] = {}
    for path in sorted(root.rglob("*")):
        found[str(path.relative_to(root))] = None if path.is_dir() else path.read_bytes()
    return found
