"""One pass over the rows that a loss wants, a chunk of logits at a time, with gradients added up where they belong.

`loss` decides what is asked of each chunk's logits; this decides how many rows a chunk has, in which precision it runs,
and where its gradients go: rows of x in place, weights into float32 sums, the head's by a product of its own, so that
its gradient is never rounded between chunks.

Legend: R rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .rows import Pipeline
from .sums import WeightSums, add_product

CHUNK_BYTES = 512 << 20


def default_rows(vocabulary: int, element_size: int) -> int:
    """Rows of a chunk such that logits and their gradient take about `CHUNK_BYTES`; a multiple of 128, at least 128."""
    return max(128, CHUNK_BYTES // (2 * vocabulary * element_size) // 128 * 128)


class Sweep:
    """One pass over the selected rows of x, with the gradient of each chunk added up where it belongs."""

    def __init__(self, x: Tensor, index: Tensor | None, pipeline: Pipeline, rows: int | None) -> None:
        self.flat = x.detach().reshape(-1, x.shape[-1])
        self.index, self.pipeline = index, pipeline
        self.count = self.flat.shape[0] if index is None else index.shape[0]
        self.rows = rows
        self.weight = None if pipeline.weight is None else pipeline.weight()
        if self.weight is not None and self.weight.shape != (self.weight.shape[0], x.shape[-1]):
            self.weight = None
        self.params = pipeline.parameters()
        self.sums = WeightSums(self.params)
        self._x_shape, self._dx = x.shape, None
        self._device, self._autocast = x.device, torch.is_autocast_enabled(x.device.type)

    def chunks(self) -> Iterator[tuple[int, int]]:
        start = 0
        while start < self.count:
            rows = self.rows or 128  # one small chunk first when the vocabulary is not known yet
            yield start, min(start + rows, self.count)
            start += rows

    def know(self, logits: Tensor) -> None:
        """After the first chunk: choose the number of rows if the caller did not."""
        if self.rows is None:
            self.rows = default_rows(logits.shape[-1], logits.element_size())

    def take(self, start: int, stop: int) -> Tensor:
        return self.flat[start:stop] if self.index is None else self.flat.index_select(0, self.index[start:stop])

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        if not self._autocast:
            yield
            return
        kind = self._device.type
        with torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False):
            yield

    def logits(self, start: int, stop: int) -> Tensor:
        """Without gradients."""
        with torch.no_grad(), self.precision():
            return self.pipeline(self.take(start, stop))

    def gradient(self, start: int, stop: int, of_logits: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """Run the chunk, ask `of_logits` for (value [R], dlogits) and add the gradients of x and the weights."""
        x = self.take(start, stop).requires_grad_()
        if self.weight is None or self._autocast:
            with torch.enable_grad(), self.precision():
                z = self.pipeline(x)
            value, dz = of_logits(z.detach())
            self._add(torch.autograd.grad(z, [x, *self.params], dz, allow_unused=True), start, stop)
            return value
        with torch.enable_grad(), self.sums.taking_over():
            hidden = x
            for function in self.pipeline.before:
                hidden = function(hidden)
        z = hidden.detach() @ self.weight.detach().T
        value, dz = self._through_after(z, of_logits)
        if self.weight.requires_grad:
            add_product(self.sums.total(self.weight), dz, hidden.detach())
        dhidden = dz @ self.weight.detach()
        if hidden is x:
            self._add((dhidden,), start, stop)
        else:
            self._add(torch.autograd.grad(hidden, [x, *self.params], dhidden, allow_unused=True), start, stop)
        return value

    def _add(self, grads: tuple[Tensor | None, ...], start: int, stop: int) -> None:
        if grads[0] is not None:
            self._add_rows(grads[0], start, stop)
        self.sums.add(grads[1:])

    def _through_after(self, z: Tensor, of_logits: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        if not self.pipeline.after:
            return of_logits(z)
        z.requires_grad_()
        with torch.enable_grad():
            shown = z
            for function in self.pipeline.after:
                shown = function(shown)
        value, dshown = of_logits(shown.detach())
        return value, torch.autograd.grad(shown, z, dshown)[0]

    def _add_rows(self, grad: Tensor, start: int, stop: int) -> None:
        if self._dx is None:
            make = torch.empty if self.index is None else torch.zeros
            self._dx = make(self.flat.shape, dtype=self.flat.dtype, device=self.flat.device)
        if self.index is None:
            self._dx[start:stop] = grad
        else:
            self._dx.index_copy_(0, self.index[start:stop], grad.to(self._dx.dtype))

    def dx(self) -> Tensor:
        """The gradient of x, once all chunks have run."""
        return (torch.zeros_like(self.flat) if self._dx is None else self._dx).view(self._x_shape)
