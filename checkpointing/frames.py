"""The bytes around a tensor's payload in a DCP file, made once per (shape, dtype) by torch itself.

A DCP shard file is a row of torch.save archives, one per tensor. We let torch write each archive with its data left
out (`torch.serialization.skip_data`, a sparse file of a few kilobytes), keep what stands before and after the payload,
and afterwards copy only payloads. So the format is torch's own in every version, and stock `dcp.load` reads it.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


@dataclass(frozen=True)
class Frame:
    """`prefix` + payload of `nbytes` + `suffix` is one torch.save archive; the prefix is a multiple of 64 bytes."""

    prefix: bytes
    nbytes: int
    suffix: bytes

    @property
    def size(self) -> int:
        return len(self.prefix) + self.nbytes + len(self.suffix)


@lru_cache(maxsize=65536)
def frame(shape: tuple[int, ...], dtype: torch.dtype) -> Frame:
    """The frame of a contiguous CPU tensor of `shape` and `dtype`."""
    with tempfile.NamedTemporaryFile(prefix="undertow-frame-") as file:
        with FakeTensorMode():
            tensor = torch.empty(shape, dtype=dtype)
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(tensor, file.name)
        with FakeTensorMode():
            loaded = torch.load(file.name, weights_only=True)
        nbytes = tensor.numel() * tensor.element_size()
        start = loaded.untyped_storage()._checkpoint_offset if nbytes else os.path.getsize(file.name)
        handle = os.open(file.name, os.O_RDONLY)
        try:
            prefix = os.pread(handle, start, 0)
            suffix = os.pread(handle, os.path.getsize(file.name) - start - nbytes, start + nbytes)
        finally:
            os.close(handle)
    return Frame(prefix, nbytes, suffix)
