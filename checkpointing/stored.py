"""A checkpoint as a read-only mapping, name → tensor or object: `open_checkpoint(path)["model.weight"]`.

Only what is asked for is read. A tensor that lies in one piece is a view of the mapped file, without a copy; one that
several ranks wrote is put together. Checkpoints that stock DCP wrote are read too: their `.metadata` is a pickle, so it
goes through an unpickler that knows DCP's own record types and nothing else, and values are read as torch does with
`weights_only=True`.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from ..dist.errors import UserError
from .catalogue import locate
from .manifest import COMMIT, METADATA, BadCheckpoint, Manifest
from .object_store import is_url
from .places import find
from .reader import Reader
from .verify import check_content, check_lengths

DCP = "torch.distributed.checkpoint."
KNOWN = {
    DCP + "metadata": "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties "
    "MetadataIndex StorageMeta _MEM_FORMAT_ENCODING",
    DCP + "filesystem": "_StorageInfo",
    "torch": "Size",
    "torch.serialization": "_get_layout",
    "pathlib": "Path PosixPath PurePosixPath",
    "pathlib._local": "Path PosixPath PurePosixPath",
    "collections": "OrderedDict",
}


def open_checkpoint(
    path: Path | str, *, step: int | None = None, verify: bool = True, allow_types: Sequence[type] = ()
) -> Mapping[str, Any]:
    """The newest whole checkpoint under `path` (or that of `step`), or the one that `path` is, ours or DCP's. `verify`:
    compare every checksum first, which reads all of it; DCP's have none. `path` may be the URL of a bucket: then only
    what is asked for is downloaded, and always compared. Tensors live in host memory and may be written: the file is
    not. Raises `UserError` where nothing is, `BadCheckpoint` where it is damaged or hostile."""
    if is_url(path):
        found = find(str(path), step)
        assert found.bucket is not None
        reader = found.bucket.reader(found.manifest.step, found.manifest)
        return StoredCheckpoint(reader.path, found.manifest, allow_types, reader)
    path = Path(path)
    if (path / METADATA).is_file() and not (path / COMMIT).exists():
        return DcpCheckpoint(path, allow_types)
    folder, manifest = locate(path, step)
    check_lengths(folder, manifest)
    if verify:
        check_content(folder, manifest)
    return StoredCheckpoint(folder, manifest, allow_types)


class StoredCheckpoint(Mapping[str, Any]):
    """One of ours; `manifest` tells its step, shapes and metrics."""

    def __init__(self, path: Path, manifest: Manifest, allowed: Sequence[type], reader: Reader | None = None) -> None:
        self.path, self.manifest, self._allowed = path, manifest, allowed
        self._reader = reader or Reader(path, manifest)

    def __getitem__(self, key: str) -> Any:
        if key in self.manifest.objects:
            return self._reader.object(key, self._allowed)
        if (record := self.manifest.tensors.get(key)) is None:
            raise _unknown(key, self)
        pieces = [(shard.offsets, self._reader.shard(key, shard)) for shard in record.shards]
        return _joined(record.shape, pieces)

    def __contains__(self, key: object) -> bool:  # the mapping's own would read it
        return key in self.manifest.paths

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.paths)

    def __len__(self) -> int:
        return len(self.manifest.paths)


class DcpCheckpoint(Mapping[str, Any]):
    """One that stock `torch.distributed.checkpoint` wrote to a folder."""

    def __init__(self, path: Path, allowed: Sequence[type]) -> None:
        self.path, self._allowed = path, tuple(allowed)
        self.metadata = _read_metadata(path / METADATA)
        self._maps: dict[str, mmap.mmap] = {}

    def __getitem__(self, key: str) -> Any:
        if (stored := self.metadata.state_dict_metadata.get(key)) is None:
            raise _unknown(key, self)
        if not isinstance(stored, TensorStorageMetadata):
            return self._load(MetadataIndex(key))
        pieces = [(tuple(c.offsets), self._load(MetadataIndex(key, c.offsets))) for c in stored.chunks]
        return _joined(tuple(stored.size), pieces)

    def _load(self, index: MetadataIndex) -> Any:
        place = self.metadata.storage_data[index]
        name = place.relative_path
        if Path(name).name != name or (self.path / name).is_symlink():
            raise BadCheckpoint(f"{self.path / METADATA} names the file {name!r}, outside of its folder")
        if getattr(place, "transform_descriptors", None):
            raise UserError(f"'{index.fqn}' is stored compressed", remedy="read it with torch.distributed.checkpoint")
        try:
            if name not in self._maps:
                with open(self.path / name, "rb") as file:
                    self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            data = self._maps[name][place.offset : place.offset + place.length]
            with torch.serialization.safe_globals(list(self._allowed)):
                return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            raise BadCheckpoint(f"'{index.fqn}' of {self.path} cannot be read safely ({error})") from error

    def __contains__(self, key: object) -> bool:
        return key in self.metadata.state_dict_metadata

    def __iter__(self) -> Iterator[str]:
        return iter(self.metadata.state_dict_metadata)

    def __len__(self) -> int:
        return len(self.metadata.state_dict_metadata)


def _joined(shape: tuple[int, ...], pieces: Sequence[tuple[tuple[int, ...], torch.Tensor]]) -> torch.Tensor:
    if len(pieces) == 1 and tuple(pieces[0][1].shape) == tuple(shape):
        return pieces[0][1]
    if sum(math.prod(piece.shape) for _, piece in pieces) != math.prod(shape):
        raise BadCheckpoint(f"the pieces of a tensor of shape {tuple(shape)} do not make it up")
    whole = torch.empty(shape, dtype=pieces[0][1].dtype)
    for offsets, piece in pieces:
        target = whole
        for dim, offset in enumerate(offsets):
            target = target.narrow(dim, offset, piece.shape[dim])
        target.copy_(piece)
    return whole


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in KNOWN.get(module, "").split():
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout)):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unknown(key: str, checkpoint: StoredCheckpoint | DcpCheckpoint) -> KeyError:
    near = [name for name in checkpoint if key in name or name in key][:3] or list(checkpoint)[:3]
    return KeyError(f"{key!r} is not in {checkpoint.path}; it holds {len(checkpoint)} names such as {', '.join(near)}")


def _read_metadata(path: Path) -> Metadata:
    try:
        with open(path, "rb") as file:
            found = _Unpickler(file).load()
    except Exception as error:  # a pickle may fail in any way
        raise BadCheckpoint(f"{path} is not what DCP writes ({error})") from error
    if not isinstance(found, Metadata) or not isinstance(found.storage_data, dict):
        raise BadCheckpoint(f"{path} holds no DCP metadata of a folder")
    return found
