"""A module's tensors from a checkpoint as Hugging Face safetensors: sharded, with index, in bounded memory.

The format is a length, a JSON header and the tensors' bytes in a row, so files are written as a stream, piece by piece
from the checkpoint's shards; `safetensors.save_file` would need a whole file's tensors in memory. The `safetensors`
library then opens every file and vouches for names, types and shapes. Files get their names only when all are whole.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..dist.errors import MissingPackage, UserError
from .files import FileOps
from .manifest import Manifest
from .reader import dtype_of
from .tensor_stream import pieces

NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL", "complex64": "C64",
}  # fmt: skip
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class ExportFile:
    """One file to write: `tensors` are (stored key, exported name, dtype written) in order."""

    name: str
    tensors: tuple[tuple[str, str, torch.dtype], ...]
    nbytes: int


def modules_of(manifest: Manifest) -> list[str]:
    """The labels under which modules are stored (optimizers have a `state` or `param_groups` level)."""
    labels = {str(path[0]) for key, path in manifest.paths.items() if key in manifest.tensors and len(path) == 2}
    inner = {str(path[0]) for path in manifest.paths.values() if len(path) > 2}
    return sorted(labels - inner - {"rng"})


def plan_export(
    manifest: Manifest, module: str, *, max_shard_bytes: int, dtype: torch.dtype | None = None
) -> list[ExportFile]:
    """The files to write, tensors in name order. `dtype` converts floating-point tensors. Pure."""
    if module not in modules_of(manifest):
        raise UserError(
            f"the checkpoint holds no module '{module}'",
            expected=f"one of {', '.join(modules_of(manifest)) or '(none)'}",
        )
    groups: list[list[tuple[str, str, torch.dtype]]] = [[]]
    sizes = [0]
    for key in sorted(key for key in manifest.tensors if manifest.paths[key][0] == module):
        record = manifest.tensors[key]
        stored = dtype_of(record.dtype)
        written = dtype if dtype is not None and stored.is_floating_point else stored
        if str(written).removeprefix("torch.") not in NAMES:
            raise UserError(f"'{key}' has type {written}, which safetensors cannot hold", remedy="pass --dtype")
        count = 1
        for size in record.shape:
            count *= size
        nbytes = count * written.itemsize
        if sizes[-1] and sizes[-1] + nbytes > max_shard_bytes:
            groups.append([])
            sizes.append(0)
        groups[-1].append((key, str(manifest.paths[key][1]), written))
        sizes[-1] += nbytes
    total = len(groups)
    names = [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    names = ["model.safetensors"] if total == 1 else names
    return [ExportFile(name, tuple(group), size) for name, group, size in zip(names, groups, sizes)]


def export(
    path: Path,
    manifest: Manifest,
    files: Sequence[ExportFile],
    out: Path,
    *,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Write `files` into the new or empty folder `out`."""
    try:
        import safetensors
    except ImportError as error:
        raise MissingPackage("safetensors", extra="hf", needed_for="export") from error
    ops = FileOps(direct=False)
    try:
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} is not empty", expected="a new or empty folder", remedy="pass another --out")
        ops.mkdir(out)
        for file in files:
            _write(ops, path, manifest, file, out / (file.name + ".part"), on_bytes)
            _vouch(safetensors, manifest, file, out / (file.name + ".part"))
        for file in files:
            ops.rename(out / (file.name + ".part"), out / file.name)
        if len(files) > 1:
            weights = {name: file.name for file in files for _, name, _ in file.tensors}
            index = {"metadata": {"total_size": sum(file.nbytes for file in files)}, "weight_map": weights}
            ops.write_file(out / INDEX, json.dumps(index, indent=2).encode())
        ops.fsync_dir(out)
    except OSError as error:
        raise UserError(
            f"cannot write to {out} ({error.strerror})", expected="a folder with room for the export"
        ) from error


def _write(
    ops: FileOps, path: Path, manifest: Manifest, file: ExportFile, target: Path, on_bytes: Callable[[int], None]
) -> None:
    head = _header(manifest, file)
    total = len(head) + file.nbytes
    handle = ops.create(target, total)
    try:
        ops.pwrite(handle, head, 0)
        position = len(head)
        for key, _, dtype in file.tensors:
            for piece in pieces(path, manifest, key):
                data = piece.to(dtype).view(torch.uint8).numpy()
                ops.pwrite(handle, data, position)
                position += data.nbytes
                on_bytes(data.nbytes)
    except BaseException:
        ops.abandon(handle)
        ops.unlink(target)
        raise
    ops.finish(handle, total)


def _header(manifest: Manifest, file: ExportFile) -> bytes:
    """8 bytes of length and the JSON, padded with spaces so that the data begins at a multiple of 8."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for key, name, dtype in file.tensors:
        shape = list(manifest.tensors[key].shape)
        nbytes = dtype.itemsize
        for size in shape:
            nbytes *= size
        kind = NAMES[str(dtype).removeprefix("torch.")]
        table[name] = {"dtype": kind, "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _vouch(safetensors, manifest: Manifest, file: ExportFile, target: Path) -> None:
    """Let the library read what was written; a difference is a defect of ours."""
    with safetensors.safe_open(str(target), framework="pt") as opened:
        found = {
            name: (opened.get_slice(name).get_dtype(), opened.get_slice(name).get_shape())
            for name in list(opened.keys())
        }
    wanted = {
        name: (NAMES[str(dtype).removeprefix("torch.")], list(manifest.tensors[key].shape))
        for key, name, dtype in file.tensors
    }
    if found != wanted:
        raise AssertionError(f"{target} does not hold what was written: {found} instead of {wanted}")
