"""A safetensors file whose tensors leave the device later, as `lazy_file` does for `torch.save`.

The format is a length, a JSON header and the tensors' bytes in a row. The library's own writer wants the whole file in
memory or writes past our checksums, so header and bytes are written here, and the library reads them in the tests.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..dist.errors import UserError
from .lazy_file import HostBuffers, LazyFile
from .safetensors_export import NAMES


class LazySafetensors(LazyFile):
    """The file `path` with the named `tensors` (contiguous, no two sharing memory) and string `metadata`."""

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str],
        lazy: Callable[[tuple[Any, ...]], bool],
        buffers: HostBuffers,
    ) -> None:
        for name, tensor in tensors.items():
            if _kind(tensor) not in NAMES:
                raise UserError(f"'{name}' has type {_kind(tensor)}, which safetensors cannot hold")
        self._metadata = dict(metadata)
        super().__init__(path, dict(tensors), lazy, buffers)

    def _dump(self, state: Any, file: Any) -> None:
        names = sorted(state, key=lambda name: (-state[name].dtype.itemsize, name))  # so that each is aligned
        table: dict[str, Any] = {"__metadata__": self._metadata} if self._metadata else {}
        position = 0
        for name in names:
            tensor = state[name]
            end = position + tensor.numel() * tensor.element_size()
            table[name] = {
                "dtype": NAMES[_kind(tensor)], "shape": list(tensor.shape), "data_offsets": [position, end]
            }  # fmt: skip
            position = end
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            if state[name].numel():
                file.write(state[name].contiguous().view(-1).view(torch.uint8).numpy())


def _kind(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
