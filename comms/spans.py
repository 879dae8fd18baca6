"""Messages as places in memory: a GPU waits for the host that queues them, and a view costs it as much as a copy.

A tensor is asked for its address once for each call; a message of it is a first number and how many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..dist.errors import UndertowError


class Memory:
    """A contiguous tensor: its address, bytes of a number, and where it begins in its storage, in bytes."""

    __slots__ = ("address", "offset", "size", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        if not tensor.is_contiguous():
            raise UndertowError(
                f"shape {tuple(tensor.shape)} and strides {tensor.stride()} are not one piece of memory"
            )
        self.tensor, self.address, self.size = tensor, tensor.data_ptr(), tensor.element_size()
        self.offset = int(tensor.storage_offset()) * self.size


class Span(NamedTuple):
    """Numbers [start, start + count) of a memory, as if it had one dimension."""

    memory: Memory
    start: int
    count: int

    @property
    def address(self) -> int:
        return self.memory.address + self.start * self.memory.size

    @property
    def nbytes(self) -> int:
        return self.count * self.memory.size

    def numbers(self) -> torch.Tensor:
        return self.memory.tensor.view(-1).narrow(0, self.start, self.count)


Spans = Sequence[tuple[Span, int]]  # (numbers, the other rank)
