"""Reading one verified checkpoint folder: mapped shard files, and objects by torch's restricted unpickler.

A tensor comes as a view of the mapping at the payload offset that the manifest names, so only the pages that are read
are fetched, and nothing is copied.
"""

from __future__ import annotations

import io
import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .manifest import BadCheckpoint, Manifest, ShardRecord


def dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise BadCheckpoint(f"the manifest names the dtype {name!r}, which this torch {torch.__version__} lacks")
    return dtype


class Reader:
    """Maps the shard files of the checkpoint folder `path`; tensors come as views of the mapping, without a copy."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._maps: dict[str, mmap.mmap] = {}
        for key, record in manifest.tensors.items():
            width = dtype_of(record.dtype).itemsize
            for shard in record.shards:
                if shard.payload + math.prod(shard.sizes) * width > shard.start + shard.length:
                    raise BadCheckpoint(f"{path}: the data of '{key}' does not fit into its archive")

    def _map(self, name: str) -> mmap.mmap:
        if name not in self._maps:
            with open(self.path / name, "rb") as file:
                self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[name]

    def shard(self, key: str, shard: ShardRecord) -> torch.Tensor:
        """One box of tensor `key`, a private copy-on-write view of the file."""
        dtype = dtype_of(self.manifest.tensors[key].dtype)
        count = math.prod(shard.sizes)
        if count == 0:
            return torch.empty(shard.sizes, dtype=dtype)
        flat = torch.frombuffer(self._map(shard.file), dtype=dtype, count=count, offset=shard.payload)
        return flat.view(shard.sizes)

    def object(self, key: str, allowed: Sequence[type] = ()) -> Any:
        """The value of `key`. `BadCheckpoint` when it holds a type that neither torch nor the user allows."""
        record = self.manifest.objects[key]
        data = self._map(record.file)[record.start : record.start + record.length]
        return load_object(data, key, self.path, allowed)


def load_object(data: bytes, key: str, where: Path, allowed: Sequence[type]) -> Any:
    """The value of `key` from its archive, by torch's restricted unpickler; `where` is for the message."""
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        reason = next((line for line in lines if "nsupported" in line or "Unpickler" in line), lines[0])
        raise BadCheckpoint(
            f"the object '{key}' of {where} cannot be read safely ({reason}); name its types in allow_types"
        ) from error
