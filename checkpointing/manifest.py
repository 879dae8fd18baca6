"""The manifest: what a checkpoint consists of, in JSON, with a checksum for every 16 MiB chunk of every file.

It is all that restore needs to trust: it is read and verified before any other byte is interpreted, it says where each
tensor's payload lies, and nothing in it can run code. COMMIT.json holds the manifest's own checksum.
The layout of both is specified in docs/checkpoint-format.md.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from ..dist.errors import UndertowError, UserError

FORMAT = 1
MANIFEST, COMMIT, METADATA, LATEST = "manifest.json", "COMMIT.json", ".metadata", "LATEST"
SAFE_NAME = re.compile(r"\.metadata|__\d+_\d+\.distcp")


class BadCheckpoint(UndertowError):
    """A checkpoint is incomplete, damaged or not ours; the message says where."""


class NewerFormat(UserError):
    """A whole checkpoint that a later version of undertow wrote: to be left alone, not set aside as damaged."""


@dataclass(frozen=True)
class FileRecord:
    """One file: its length and the xxh3-128 of each chunk, in hex. No checksums at all: it was never on a disk."""

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
    """A checkpoint's contents. `rendered` is `render(tensors, paths)` where the writer has made it before: those two
    do not change from save to save, and making JSON of thousands of tensors would hold the interpreter lock for tens of
    milliseconds of a training step each time."""

    step: int
    world_size: int
    chunk_bytes: int
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]
    objects: dict[str, ObjectRecord]
    paths: dict[str, tuple[str | int, ...]]
    facts: dict[str, Any] = field(default_factory=dict)
    rendered: bytes = b""

    def dumps(self) -> bytes:
        changing = {
            "format": FORMAT,
            "step": self.step,
            "world_size": self.world_size,
            "chunk_bytes": self.chunk_bytes,
            "files": self.files,
            "objects": self.objects,
            "facts": self.facts,
        }
        return b"".join((_json(changing)[:-1], b",", self.rendered or render(self.tensors, self.paths), b"}"))

    @classmethod
    def loads(cls, data: bytes, where: Path) -> Manifest:
        """Parse and check; `BadCheckpoint` names what is wrong, `NewerFormat` that another version is needed. What
        comes back names nothing outside the folder, no byte outside its files and no box outside its tensor."""
        try:
            raw = json.loads(data)
            require_known_format(raw["format"], where)
            manifest = cls(
                step=_count(raw["step"]),
                world_size=_count(raw["world_size"]),
                chunk_bytes=_count(raw["chunk_bytes"]),
                files={name: FileRecord(_count(f["nbytes"]), _texts(f["chunks"])) for name, f in raw["files"].items()},
                tensors={key: _tensor(value) for key, value in raw["tensors"].items()},
                objects={key: _object(value) for key, value in raw["objects"].items()},
                paths={key: _path(path) for key, path in raw["paths"].items()},
                facts=dict(raw["facts"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadCheckpoint(f"{where} is not a manifest ({type(error).__name__}: {error})") from error
        manifest._check(where)
        return manifest

    def _check(self, where: Path) -> None:
        if not self.chunk_bytes or not self.world_size:
            raise BadCheckpoint(f"{where} has chunks of {self.chunk_bytes} bytes from {self.world_size} ranks")
        for name, record in self.files.items():
            if not SAFE_NAME.fullmatch(name):
                raise BadCheckpoint(f"{where} names the file {name!r}; expected .metadata or __R_I.distcp")
            if record.chunks and len(record.chunks) != -(-record.nbytes // self.chunk_bytes):
                raise BadCheckpoint(f"{where}: {name} has {record.nbytes} bytes but {len(record.chunks)} checksums")
        spans = [(value.file, value.start, value.length) for value in self.objects.values()]
        for key, record in self.tensors.items():
            check_boxes(key, record, where)
            spans += [(shard.file, shard.start, shard.length) for shard in record.shards]
        for file, start, length in spans:
            if file not in self.files or start + length > self.files[file].nbytes:
                raise BadCheckpoint(f"{where} points to bytes [{start}, {start + length}) outside of {file!r}")
        if self.paths.keys() != self.tensors.keys() | self.objects.keys() or self.tensors.keys() & self.objects.keys():
            raise BadCheckpoint(f"{where} does not give every tensor and object one path")


def require_known_format(version: Any, where: Path) -> None:
    """`NewerFormat` for what a later version wrote, `BadCheckpoint` for what none has written."""
    if type(version) is int and version > FORMAT:
        raise NewerFormat(
            f"{where} has format {version}; this version of undertow reads formats 1 to {FORMAT}",
            remedy="install the version of undertow that wrote it, or a later one",
        )
    if type(version) is not int or version < 1:
        raise BadCheckpoint(f"{where} has format {version!r}; this version of undertow reads formats 1 to {FORMAT}")


def check_boxes(key: str, record: TensorRecord, where: Path) -> None:
    """The shards fill the tensor: boxes inside it, none twice, their volumes adding up; data inside their archives."""
    for shard in record.shards:
        ends = [offset + size for offset, size in zip(shard.offsets, shard.sizes)]
        if not len(shard.offsets) == len(shard.sizes) == len(record.shape) or any(map(int.__gt__, ends, record.shape)):
            raise BadCheckpoint(f"{where}: '{key}' {record.shape} has a part of {shard.sizes} at {shard.offsets}")
        least = math.prod(shard.sizes)  # a byte an element; `restore` knows the types
        if not shard.start <= shard.payload <= shard.start + shard.length - least:
            raise BadCheckpoint(f"{where}: the data of '{key}' at {shard.payload} lies outside of its archive")
    held = sum(math.prod(shard.sizes) for shard in record.shards)
    filled = {shard.offsets for shard in record.shards if math.prod(shard.sizes)}
    if held != math.prod(record.shape) or len(filled) != sum(math.prod(s.sizes) > 0 for s in record.shards):
        raise BadCheckpoint(f"{where}: the parts of '{key}' hold {held} of {math.prod(record.shape)} elements")


def _tensor(raw: dict[str, Any]) -> TensorRecord:
    shards = tuple(
        ShardRecord(
            _counts(shard["offsets"]),
            _counts(shard["sizes"]),
            _text(shard["file"]),
            _count(shard["start"]),
            _count(shard["length"]),
            _count(shard["payload"]),
        )
        for shard in raw["shards"]
    )
    return TensorRecord(_text(raw["dtype"]), _counts(raw["shape"]), shards)


def _object(raw: dict[str, Any]) -> ObjectRecord:
    return ObjectRecord(_text(raw["file"]), _count(raw["start"]), _count(raw["length"]))


def _path(raw: Any) -> tuple[str | int, ...]:
    if type(raw) is not list or not raw or not all(type(part) in (str, int) for part in raw):
        raise ValueError(f"{raw!r} is not a path of names and indices")
    return tuple(raw)


def _count(raw: Any) -> int:
    if type(raw) is not int or raw < 0:
        raise ValueError(f"{raw!r} is not a number of bytes, elements or steps")
    return raw


def _counts(raw: Any) -> tuple[int, ...]:
    return tuple(_count(value) for value in raw)


def _text(raw: Any) -> str:
    if type(raw) is not str:
        raise ValueError(f"{raw!r} is not a text")
    return raw


def _texts(raw: Any) -> tuple[str, ...]:
    return tuple(_text(value) for value in raw)


def render(tensors: Mapping[str, TensorRecord], paths: Mapping[str, tuple[str | int, ...]]) -> bytes:
    """The members "tensors" and "paths" of the manifest's JSON object."""
    return _json({"tensors": dict(tensors), "paths": dict(paths)})[1:-1]


def _json(value: Any) -> bytes:
    """Records are written as objects of their fields (`asdict` would copy every number in them first)."""
    return json.dumps(value, separators=(",", ":"), default=vars).encode()


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


def metrics_of(manifest: Manifest) -> dict[str, float]:
    """The metrics that were saved with a checkpoint."""
    stored = manifest.facts.get("metrics")
    pairs = stored.items() if isinstance(stored, dict) else ()
    return {str(name): float(value) for name, value in pairs if isinstance(value, (int, float))}
