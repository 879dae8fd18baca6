"""The manifest against hostile JSON: whatever it says, the answer is a checked manifest or `BadCheckpoint`."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

from undertow.checkpointing.manifest import (
    BadCheckpoint,
    FileRecord,
    Manifest,
    NewerFormat,
    ObjectRecord,
    ShardRecord,
    TensorRecord,
    checksums,
)

WHERE = Path("here/manifest.json")


def good() -> Manifest:
    shards = (
        ShardRecord((0, 0), (2, 3), "__0_0.distcp", 0, 1000, 512),
        ShardRecord((2, 0), (2, 3), "__1_0.distcp", 0, 1000, 512),
    )
    return Manifest(
        step=7,
        world_size=2,
        chunk_bytes=4096,
        files={
            "__0_0.distcp": FileRecord(5000, ("a" * 32, "b" * 32)),
            "__1_0.distcp": FileRecord(4096, ("c" * 32,)),
            ".metadata": FileRecord(10, ("d" * 32,)),
        },
        tensors={"model.w": TensorRecord("float32", (4, 3), shards)},
        objects={"rng.rank-00000": ObjectRecord("__0_0.distcp", 2000, 100)},
        paths={"model.w": ("model", "w"), "rng.rank-00000": ("rng", "rank-00000")},
        facts={"torch": "2.13.0"},
    )


def test_round_trip():
    manifest = good()
    assert Manifest.loads(manifest.dumps(), WHERE) == manifest


def hostile(change: Any) -> bytes:
    raw = json.loads(good().dumps())
    change(raw)
    return json.dumps(raw).encode()


def put(*path: Any) -> Any:
    *where, last, value = path

    def change(raw: dict) -> None:
        for part in where:
            raw = raw[part]
        raw[last] = value

    return change


def rename_file(name: str) -> Any:
    def change(raw: dict) -> None:
        raw["files"][name] = raw["files"].pop("__0_0.distcp")
        raw["tensors"]["model.w"]["shards"][0]["file"] = name
        raw["objects"]["rng.rank-00000"]["file"] = name

    return change


SHARD = ("tensors", "model.w", "shards", 0)
BAD = {
    "a file above the folder": rename_file("../__0_0.distcp"),
    "an absolute file": rename_file("/etc/passwd"),
    "a file in a sub-folder": rename_file("x/__0_0.distcp"),
    "a name with a line break": rename_file("__0_0.distcp\n"),
    "a name with a null": rename_file("__0_0.distcp\0"),
    "an empty name": rename_file(""),
    "a shard in a file that is not listed": put(*SHARD, "file", "__9_0.distcp"),
    "a negative start": put(*SHARD, "start", -1),
    "a negative length": put(*SHARD, "length", -5),
    "a span beyond the file": put(*SHARD, "length", 5001),
    "data before its archive": put("tensors", "model.w", "shards", 0, "payload", -4),
    "data behind its archive": put(*SHARD, "payload", 1001),
    "data that crosses the end of its archive": put(*SHARD, "payload", 999),
    "a huge span": put(*SHARD, "length", 10**30),
    "an object beyond its file": put("objects", "rng.rank-00000", "start", 4999),
    "an object with a text offset": put("objects", "rng.rank-00000", "start", "0"),
    "an object that is a list": put("objects", "rng.rank-00000", []),
    "offsets outside of the tensor": put(*SHARD, "offsets", [3, 0]),
    "negative offsets": put(*SHARD, "offsets", [-2, 0]),
    "sizes with another number of dims": put(*SHARD, "sizes", [6]),
    "two parts at one place": put(*SHARD, "offsets", [2, 0]),
    "a part that is missing": lambda raw: raw["tensors"]["model.w"]["shards"].pop(),
    "no parts at all": put("tensors", "model.w", "shards", []),
    "a type that is a number": put("tensors", "model.w", "dtype", 5),
    "a shape of floats": put("tensors", "model.w", "shape", [4.0, 3.0]),
    "a step that is a text": put("step", "7"),
    "a step that is true": put("step", True),
    "a negative step": put("step", -7),
    "an infinite step": put("step", float("inf")),
    "a step that is NaN": put("step", float("nan")),
    "no chunk size": put("chunk_bytes", 0),
    "a negative chunk size": put("chunk_bytes", -4096),
    "no ranks": put("world_size", 0),
    "too few checksums": put("files", "__0_0.distcp", "chunks", ["a"]),
    "a checksum that is a number": put("files", "__1_0.distcp", "chunks", [3]),
    "a file that is null": put("files", "__0_0.distcp", None),
    "a negative length of a file": put("files", "__0_0.distcp", "nbytes", -1),
    "a tensor without a path": lambda raw: raw["paths"].pop("model.w"),
    "a path without a tensor": put("paths", "ghost", ["ghost"]),
    "an empty path": put("paths", "model.w", []),
    "a path that is a text": put("paths", "model.w", "model"),
    "a path of lists": put("paths", "model.w", [["model"]]),
    "a name that is tensor and object": put("objects", "model.w", {"file": "__0_0.distcp", "start": 0, "length": 1}),
    "no files": lambda raw: raw.pop("files"),
    "files that are a list": put("files", []),
    "facts that are a number": put("facts", 3),
    "format 0": put("format", 0),
    "a format that is true": put("format", True),
    "a format that is a text": put("format", "1"),
    "no format": lambda raw: raw.pop("format"),
}


@pytest.mark.parametrize("name", BAD)
def test_hostile_manifest_is_refused(name):
    with pytest.raises(BadCheckpoint, match="manifest.json"):
        Manifest.loads(hostile(BAD[name]), WHERE)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x00", b"null", b"[]", b"3", b'"x"', b"{", b"\xff\xfe", b"{}", b"[" * 200_000, b'{"format":' * 100_000],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_no_manifest_is_refused(data):
    with pytest.raises(BadCheckpoint):
        Manifest.loads(data, WHERE)


def test_a_later_format_is_not_taken_for_damage():
    with pytest.raises(NewerFormat, match="format 2.*install"):
        Manifest.loads(hostile(put("format", 2)), WHERE)


def test_random_changes_never_cause_another_error(seed):
    """Replace random parts of a good manifest by odd values: checked or refused, never a stray exception."""
    rng = random.Random(seed)
    odd = [None, True, -1, 0, 1, 10**40, 1.5, float("inf"), "", "..", "/", [], {}, [1], ["a"], {"a": 1}, "float32"]
    refused = 0
    for _ in range(3000):
        raw = json.loads(good().dumps())
        for _ in range(rng.randrange(1, 3)):
            spot: Any = raw
            while True:
                keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
                if not keys:
                    break
                key = rng.choice(keys)
                if isinstance(spot[key], (dict, list)) and spot[key] and rng.random() < 0.8:
                    spot = spot[key]
                    continue
                spot[key] = copy.deepcopy(rng.choice(odd))
                break
        try:
            manifest = Manifest.loads(json.dumps(raw).encode(), WHERE)
        except (BadCheckpoint, NewerFormat):
            refused += 1
            continue
        for record in manifest.tensors.values():
            for shard in record.shards:
                assert 0 <= shard.start <= shard.payload <= manifest.files[shard.file].nbytes
    assert 1500 < refused < 3000


def test_checksums_follow_the_chunks():
    data = bytes(range(256)) * 40
    record = checksums(data, 4096)
    assert record.nbytes == len(data)
    assert len(record.chunks) == 3
    assert record.chunks[0] == checksums(data[:4096], 4096).chunks[0]
    assert record.chunks[2] == checksums(data[8192:], 4096).chunks[0]
    assert checksums(b"", 4096).chunks == ()
