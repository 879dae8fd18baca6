"""The manifest: what a checkpoint consists of, in JSON, with a checksum for every 16 MiB chunk of every file.

It is all that restore needs to trust: it is read and verified before any other byte is interpreted, it says where each
tensor's payload lies, and nothing in it can run code. COMMIT.json, written last, holds the manifest's own checksum.
The layout of both is specified in docs/checkpoint-format.md.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from ..dist.errors import UndertowError

FORMAT = 1
MANIFEST, COMMIT, METADATA, LATEST = "manifest.json", "COMMIT.json", ".metadata", "LATEST"
SAFE_NAME = re.compile(r"^(\.metadata|__\d+_\d+\.distcp)$")


class BadCheckpoint(UndertowError):
    """A checkpoint is incomplete, damaged or not ours; the message says where."""


@dataclass(frozen=True)
class FileRecord:
    """One file: its length and the xxh3-128 of each chunk, in hex."""

    nbytes: int
    chunks: tuple[str, ...]


@dataclass(frozen=True)
class ShardRecord:
    """One box of a tensor: global `offsets` and `sizes`, its archive [start, start + length) and payload offset."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int
    payload: int


@dataclass(frozen=True)
class TensorRecord:
    dtype: str
    shape: tuple[int, ...]
    shards: tuple[ShardRecord, ...]


@dataclass(frozen=True)
class ObjectRecord:
    """A pickled value: bytes [start, start + length) of `file`, readable with torch.load(weights_only=True)."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Manifest:
    step: int
    world_size: int
    chunk_bytes: int
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]
    objects: dict[str, ObjectRecord]
    paths: dict[str, tuple[str | int, ...]]
    facts: dict[str, Any] = field(default_factory=dict)

    def dumps(self) -> bytes:
        return json.dumps({"format": FORMAT, **asdict(self)}, separators=(",", ":")).encode()

    @classmethod
    def loads(cls, data: bytes, where: Path) -> Manifest:
        """Parse and check; `BadCheckpoint` names what is wrong. Nothing outside the folder can be named by it."""
        try:
            raw = json.loads(data)
            version = raw.pop("format")
            if not isinstance(version, int) or not 1 <= version <= FORMAT:
                raise BadCheckpoint(
                    f"{where} has format {version}; this version of undertow reads formats 1 to {FORMAT}"
                )
            manifest = cls(
                step=int(raw["step"]),
                world_size=int(raw["world_size"]),
                chunk_bytes=int(raw["chunk_bytes"]),
                files={name: FileRecord(int(f["nbytes"]), tuple(f["chunks"])) for name, f in raw["files"].items()},
                tensors={key: _tensor(value) for key, value in raw["tensors"].items()},
                objects={key: ObjectRecord(**value) for key, value in raw["objects"].items()},
                paths={key: tuple(path) for key, path in raw["paths"].items()},
                facts=raw["facts"],
            )
        except BadCheckpoint:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadCheckpoint(f"{where} is not a manifest ({type(error).__name__}: {error})") from error
        manifest._check(where)
        return manifest

    def _check(self, where: Path) -> None:
        for name, record in self.files.items():
            if not SAFE_NAME.match(name):
                raise BadCheckpoint(f"{where} names the file {name!r}; expected .metadata or __R_I.distcp")
            if len(record.chunks) != -(-record.nbytes // self.chunk_bytes):
                raise BadCheckpoint(f"{where}: {name} has {record.nbytes} bytes but {len(record.chunks)} checksums")
        spans = [(shard.file, shard.start, shard.length) for t in self.tensors.values() for shard in t.shards]
        spans += [(value.file, value.start, value.length) for value in self.objects.values()]
        for file, start, length in spans:
            if file not in self.files or start < 0 or length < 0 or start + length > self.files[file].nbytes:
                raise BadCheckpoint(f"{where} points to bytes [{start}, {start + length}) outside of {file!r}")


def _tensor(raw: dict[str, Any]) -> TensorRecord:
    shards = tuple(
        ShardRecord(
            tuple(map(int, shard["offsets"])),
            tuple(map(int, shard["sizes"])),
            shard["file"],
            int(shard["start"]),
            int(shard["length"]),
            int(shard["payload"]),
        )
        for shard in raw["shards"]
    )
    return TensorRecord(raw["dtype"], tuple(map(int, raw["shape"])), shards)


def checksum(data: Any) -> str:
    """xxh3-128 in hex. It finds damage, not malice: anyone who can write the folder can write a fitting checksum."""
    return xxhash.xxh3_128(data).hexdigest()


def checksums(data: bytes, chunk_bytes: int) -> FileRecord:
    """The record of a small file that is in memory as a whole."""
    view = memoryview(data)
    parts = [checksum(view[begin : begin + chunk_bytes]) for begin in range(0, len(data), chunk_bytes)]
    return FileRecord(len(data), tuple(parts))


def commit_bytes(manifest: bytes, step: int, epoch_s: float) -> bytes:
    return json.dumps({"format": FORMAT, "step": step, "manifest": checksum(manifest), "epoch_s": epoch_s}).encode()
