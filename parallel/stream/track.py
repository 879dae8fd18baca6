"""Live tensor bytes and their peak, by watching every operator: the measure that the memory model is held against.

A dispatch mode sees each storage when an operator returns it and learns of its death from a finalizer, so the count is
of what tensors own, on any device, without an allocator's rounding or cache. Storages that existed before are not
counted. Kernel workspaces inside one operator are not seen.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class PeakBytes(TorchDispatchMode):
    """``with PeakBytes() as memory: …``; then `memory.peak`, `memory.live` in bytes, and `memory.largest` storage."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            leaf.untyped_storage()._cdata for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._born(leaf, before)
        return result

    def _born(self, tensor: Tensor, before: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._seen or key in before or not nbytes:
            return
        self._seen.add(key)
        self.live += nbytes
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, nbytes)
        weakref.finalize(storage, self._died, key, nbytes)

    def _died(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.live -= nbytes
