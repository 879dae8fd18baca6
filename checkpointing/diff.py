"""What differs between two checkpoints: tensor by tensor, bit by bit, in bounded memory and whatever their sharding.

Equal means equal bits, so a NaN equals the same NaN and 0.0 differs from -0.0. The size of a difference is taken in
float64, which is exact for every stored type but int64 beyond 2^53 and complex128, where it is rounded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .manifest import Manifest, ObjectRecord
from .tensor_stream import pieces


@dataclass(frozen=True)
class Difference:
    """How one name differs: `kind` 'equal', 'values', 'shape or type', 'only in A' or 'only in B'. For 'values':
    `count` of `total` elements, the largest absolute difference `largest` (NaN where one side is no number)."""

    key: str
    kind: str
    count: int = 0
    total: int = 0
    largest: float = 0.0
    note: str = ""


def compare_checkpoints(
    a: tuple[Path, Manifest], b: tuple[Path, Manifest], *, on_bytes: Callable[[int], None] = lambda nbytes: None
) -> list[Difference]:
    """Every tensor and object of both, in name order."""
    (path_a, manifest_a), (path_b, manifest_b) = a, b
    found = []
    for key in sorted(manifest_a.tensors.keys() | manifest_b.tensors.keys()):
        one, two = manifest_a.tensors.get(key), manifest_b.tensors.get(key)
        if one is None or two is None:
            found.append(Difference(key, "only in A" if two is None else "only in B"))
        elif (one.dtype, one.shape) != (two.dtype, two.shape):
            note = f"{one.dtype} {list(one.shape)} / {two.dtype} {list(two.shape)}"
            found.append(Difference(key, "shape or type", total=math.prod(one.shape), note=note))
        else:
            found.append(_compare_tensor(path_a, manifest_a, path_b, manifest_b, key, on_bytes))
    for key in sorted(manifest_a.objects.keys() | manifest_b.objects.keys()):
        thing, other = manifest_a.objects.get(key), manifest_b.objects.get(key)
        if thing is None or other is None:
            found.append(Difference(key, "only in A" if other is None else "only in B", note="object"))
        elif _object_bytes(path_a, thing) != _object_bytes(path_b, other):
            found.append(Difference(key, "values", 1, 1, math.nan, "object: its stored bytes differ"))
        else:
            found.append(Difference(key, "equal", total=1, note="object"))
    return found


def _compare_tensor(
    path_a: Path, manifest_a: Manifest, path_b: Path, manifest_b: Manifest, key: str, on_bytes: Callable[[int], None]
) -> Difference:
    count, largest = 0, 0.0
    for one, two in zip(pieces(path_a, manifest_a, key), pieces(path_b, manifest_b, key)):
        on_bytes(one.nbytes)
        width = one.element_size()
        different = (one.view(torch.uint8) != two.view(torch.uint8)).view(-1, width).any(dim=1)
        changed = int(different.sum())
        if changed:
            count += changed
            gap = (_wide(one[different]) - _wide(two[different])).abs().max().item()
            largest = math.nan if math.isnan(gap) or math.isnan(largest) else max(largest, gap)
    total = math.prod(manifest_a.tensors[key].shape)
    return Difference(key, "values" if count else "equal", count, total, largest)


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.complex128 if values.is_complex() else torch.float64)


def _object_bytes(path: Path, record: ObjectRecord) -> bytes:
    handle = os.open(path / record.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(handle, record.length, record.start)
    finally:
        os.close(handle)
