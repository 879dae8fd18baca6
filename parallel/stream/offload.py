"""Layer inputs and attention outputs in host memory, copied beside the computation and back before they are needed.

Pinned memory comes from slabs that are allocated once and reused by every step (pinning costs 0.65 s per GiB, and
torch's own host allocator rounds each block up to a power of two; a slab is one). All copies run on one side stream, in
order, so a host block may be reused as soon as its last copy is enqueued. Device memory is never handed between streams
by the allocator: a source is released only after the compute stream has waited for its copy, and the destination of a
fetch is allocated on the compute stream, whose event the copy awaits. The price of a fetch is thus one event, and peak
memory does not depend on how far Python runs ahead of the device.

On a CPU the same code copies at once to plain memory; tests use that. Legend: as `store`.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from ...dist.errors import UserError
from .store import Bounds, Slot

SLAB_BYTES = 1 << 30
ALIGNMENT = 512


class HostPool:
    """Blocks of pinned (for CUDA) host memory by exact size, cut from slabs and never given back before `close`."""

    def __init__(self, device: torch.device, slab_bytes: int = SLAB_BYTES) -> None:
        self._pin = device.type == "cuda"
        self._slab_bytes = slab_bytes
        self._slabs: list[Tensor] = []
        self._used = 0  # of the last slab
        self._free: dict[int, list[Tensor]] = {}

    @property
    def nbytes(self) -> int:
        return sum(slab.nbytes for slab in self._slabs)

    def take(self, nbytes: int) -> Tensor:
        """A block of uint8 [nbytes]."""
        if self._free.get(nbytes):
            return self._free[nbytes].pop()
        step = -(-nbytes // ALIGNMENT) * ALIGNMENT
        if not self._slabs or self._used + step > self._slabs[-1].shape[0]:
            self._grow(max(self._slab_bytes, step))
        block = self._slabs[-1][self._used : self._used + nbytes]
        self._used += step
        return block

    def give(self, block: Tensor) -> None:
        self._free.setdefault(block.shape[0], []).append(block)

    def _grow(self, nbytes: int) -> None:
        try:
            slab = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pin)
        except RuntimeError as error:
            raise UserError(
                f"no host memory for {nbytes} more bytes of layer inputs ({self.nbytes} are in use)",
                remedy="a smaller host_budget_bytes, every=2, or a shorter sequence",
            ) from error
        self._slabs.append(slab)
        self._used = 0


class Courier:
    """Copies between the device and host blocks on a side stream; knows nothing of layers."""

    def __init__(self, device: torch.device, slab_bytes: int = SLAB_BYTES) -> None:
        self.device, self.pool = device, HostPool(device, slab_bytes)
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._leaving: dict[str, deque[tuple[Any, Tensor]]] = {}
        self.sent_bytes = self.fetched_bytes = 0

    def send(self, source: Tensor, queue: str, depth: int) -> tuple[Tensor, Tensor]:
        """Start copying `source` to the host: (block, typed view of it). At most `depth` sources per queue stay alive
        after the call; older ones are released in the order of the compute stream."""
        block = self.pool.take(source.numel() * source.element_size())
        view = block.view(source.dtype).view(source.shape)
        self.sent_bytes += block.shape[0]
        if self._stream is None:
            view.copy_(source)
            return block, view
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            view.copy_(source, non_blocking=True)
            done = self._stream.record_event()
        leaving = self._leaving.setdefault(queue, deque())
        leaving.append((done, source))
        self._settle(leaving, depth)
        return block, view

    def settle(self) -> None:
        """Every source sent so far may be reused by the compute stream."""
        for leaving in self._leaving.values():
            self._settle(leaving, 0)

    def _settle(self, leaving: deque[tuple[Any, Tensor]], depth: int) -> None:
        while len(leaving) > depth:
            done, _ = leaving.popleft()
            torch.cuda.current_stream(self.device).wait_event(done)

    def fetch(self, block: Tensor, view: Tensor) -> tuple[Tensor, Any]:
        """Start copying back: (device tensor, event to await before use). The block is free again at once."""
        target = torch.empty(view.shape, dtype=view.dtype, device=self.device)
        self.fetched_bytes += block.shape[0]
        done = None
        if self._stream is None:
            target.copy_(view)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                target.copy_(view, non_blocking=True)
                done = self._stream.record_event()
        self.pool.give(block)
        return target, done

    def ready(self, arriving: tuple[Tensor, Any]) -> Tensor:
        """The fetched tensor, in the order of the compute stream."""
        target, done = arriving
        if done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)
        return target


class HostSlot(Slot):
    """A slot whose input, attention output, or both wait in host memory, chunk by chunk."""

    def __init__(
        self, courier: Courier, bounds: Bounds, *, input_on_host: bool, attention: str, below: Slot | None
    ) -> None:
        super().__init__(bounds, attention != "none", below)
        self._courier = courier
        self._input_on_host, self._attention_on_host = input_on_host, attention == "host"
        self._rows_away: dict[int, tuple[Tensor, Tensor]] = {}
        self._rows_coming: dict[int, tuple[Tensor, Any]] = {}
        self._rows_here: dict[int, Tensor] = {}
        self._attention_away: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._attention_coming: dict[int, list[tuple[Tensor, Any]]] = {}
        self._orders: dict[int, list[list[int]]] = {}  # of the dimensions in memory

    def keep_input(self, x_BTd: Tensor) -> None:
        if not self._input_on_host:
            return super().keep_input(x_BTd)
        x = x_BTd.detach()
        for chunk, (start, stop) in enumerate(self._bounds):
            self._rows_away[chunk] = self._courier.send(x[:, start:stop], "rows", len(self._bounds))
        return None

    def keep_attention(self, chunk: int, *parts: Tensor) -> None:
        if not self._attention_on_host:
            return super().keep_attention(chunk, *parts)
        self._orders[chunk] = [sorted(range(t.dim()), key=lambda dim, t=t: -t.stride(dim)) for t in parts]
        dense = [t.permute(order).contiguous() for t, order in zip(parts, self._orders[chunk])]
        self._attention_away[chunk] = [self._courier.send(t, "attention", 4) for t in dense]
        return None

    def begin(self) -> None:
        self._courier.settle()
        if not self._input_on_host:
            super().begin()
        elif not (self._rows_away or self._rows_coming or self._rows_here):
            raise RuntimeError("a streamed layer was differentiated twice; retain_graph=True is not supported")
        for chunk in reversed(range(len(self._bounds))):
            self.prefetch(chunk)
        self._prefetch_attention(max(self._attention_away, default=0))

    def prefetch(self, chunk: int) -> None:
        if chunk in self._rows_away:
            self._rows_coming[chunk] = self._courier.fetch(*self._rows_away.pop(chunk))

    def rows(self, chunk: int) -> Tensor:
        if not self._input_on_host:
            return super().rows(chunk)
        self.prefetch(chunk)
        if chunk in self._rows_coming:
            self._rows_here[chunk] = self._courier.ready(self._rows_coming.pop(chunk))
        return self._rows_here[chunk]

    def _prefetch_attention(self, chunk: int) -> None:
        if chunk in self._attention_away:
            self._attention_coming[chunk] = [self._courier.fetch(*part) for part in self._attention_away.pop(chunk)]

    def attention(self, chunk: int) -> tuple[Tensor, ...] | None:
        if not self._attention_on_host:
            return super().attention(chunk)
        self._prefetch_attention(chunk)
        self._prefetch_attention(chunk - 1)
        here = [self._courier.ready(part) for part in self._attention_coming.pop(chunk)]
        orders = self._orders.pop(chunk)
        return tuple(t.permute([order.index(dim) for dim in range(t.dim())]) for t, order in zip(here, orders))

    def release(self, chunk: int) -> None:
        self._rows_here.pop(chunk, None)
        super().release(chunk)

    def __del__(self) -> None:
        """A forward whose backward never came: its blocks are for the next step."""
        for block, _ in (*self._rows_away.values(), *(p for parts in self._attention_away.values() for p in parts)):
            self._courier.pool.give(block)
