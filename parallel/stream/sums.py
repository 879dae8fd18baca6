"""Weight gradients of one layer, or of the head, added up over chunks in float32 and rounded to their type once.

The plain way rounds once, after one long product over all rows. A chunk's own product rounded to bfloat16 before it is
added would make the error of a weight's gradient 1.4 times as large, and would write and read a whole weight more per
chunk. So while a chunk runs, `F.linear` with one of the layer's weights, and the product of a norm's weight with rows,
are taken over by functions whose backward adds straight to the sum. Other uses of a weight (experts in one tensor) go
through autograd as they are, and so does everything under autocast and inside compiled code.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from .unread import zeros

LOW = (torch.bfloat16, torch.float16)
BLOCK_ROWS = 512  # rows that a CPU converts to float32 at a time
PRODUCT_ROWS = 16384  # rows of one product into a float32 sum on a GPU; as `memory_model` counts them


def add_product(total: Tensor, dy_ND: Tensor, x_Nd: Tensor) -> None:
    """total [D, d] += dy.T @ x; the sum is not rounded to the type of dy and x when `total` is float32."""
    if total.dtype == dy_ND.dtype:
        total.addmm_(dy_ND.T, x_Nd)
    elif total.is_cuda and _sums_in_float32(dy_ND.dtype):
        for dy, x in zip(dy_ND.split(PRODUCT_ROWS), x_Nd.split(PRODUCT_ROWS)):
            torch.addmm(total, dy.T, x, out_dtype=torch.float32, out=total)  # type: ignore[call-overload]
    elif total.is_cuda:
        total += dy_ND.T @ x_Nd
    else:
        for dy, x in zip(dy_ND.split(BLOCK_ROWS), x_Nd.split(BLOCK_ROWS)):
            total.addmm_(dy.T.to(total.dtype), x.to(total.dtype))


@functools.cache
def _sums_in_float32(dtype: torch.dtype) -> bool:
    """Whether this torch adds a low-precision product to a float32 sum in one call; tried once."""
    total, one = torch.ones(16, 16, device="cuda"), torch.ones(16, 16, dtype=dtype, device="cuda")
    try:
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


class WeightSums:
    """The sums for `params`; float32 for low types, the parameter's own type otherwise. `once`: there is one chunk, so
    nothing is added and autograd's own gradients are kept as they are."""

    def __init__(self, params: Sequence[nn.Parameter], once: bool = False) -> None:
        self._params, self._once = params, once
        self._parts: list[Tensor | None] = [None] * len(params)
        self._index = {id(p): i for i, p in enumerate(params)}
        self._low = any(p.dtype in LOW for p in params)

    def taking_over(
        self, autocast: bool = False, marked: Collection[int] = (), unread: Collection[int] = ()
    ) -> contextlib.AbstractContextManager:
        """While a chunk runs forward: linear maps and scales add to the sums in their backward. Of weights with the ids
        `marked`, products are known again in the graph, and those of `unread` ones are zeros (see `unread`)."""
        add = self._low and not self._once
        return _TakeOver(self, add, marked, unread) if (add or marked) and not autocast else contextlib.nullcontext()

    def holds(self, weight: Any, dim: int) -> bool:
        """Whether `weight` is one of `params`, of low precision and of `dim` dimensions."""
        return weight is not None and id(weight) in self._index and weight.dtype in LOW and weight.dim() == dim

    def total(self, weight: Tensor) -> Tensor:
        """The sum of `weight`, zeros at first; to be added to in place."""
        i = self._index[id(weight)]
        part = self._parts[i]
        if part is None:
            dtype = torch.float32 if weight.dtype in LOW else weight.dtype
            part = self._parts[i] = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        return part

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """What autograd found for `params` in one chunk."""
        for i, grad in enumerate(grads):
            part = self._parts[i]
            if grad is None:
                continue
            if part is None:
                self._parts[i] = grad.float() if grad.dtype in LOW and not self._once else grad
            else:
                part += grad

    def scale(self, factor: Tensor) -> None:
        """Multiply all sums in place."""
        for part in self._parts:
            if part is not None:
                part.mul_(factor)

    def rounded(self) -> list[Tensor | None]:
        """The gradients, in the types of their parameters; the sums are given up one by one."""
        for i, param in enumerate(self._params):
            part, self._parts[i] = self._parts[i], None
            self._parts[i] = None if part is None else part.to(param.dtype)
        return self._parts


_PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)


class _TakeOver(TorchFunctionMode):
    def __init__(self, sums: WeightSums, add: bool, marked: Collection[int], unread: Collection[int]) -> None:
        super().__init__()
        self._sums, self._add, self._marked, self._unread = sums, add, marked, unread

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if func is F.linear:
                x, weight, bias = _of_linear(*args, **kwargs)
                if self._add and self._sums.holds(weight, 2) and x.dtype == weight.dtype:
                    return Product.apply(x, weight, bias, self._sums, id(weight) in self._unread)
                if id(weight) in self._marked and weight.dim() == 2 and x.dtype == weight.dtype:
                    return Product.apply(x, weight, bias, None, id(weight) in self._unread)
            elif self._add and func in _PRODUCTS and len(args) == 2 and not kwargs:
                weight, x = args if self._sums.holds(args[0], 1) else reversed(args)
                if self._sums.holds(weight, 1) and _scales(weight, x):
                    return _Scale.apply(x, weight, self._sums)
        return func(*args, **kwargs)


def _of_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _scales(weight: Tensor, x: Any) -> bool:
    types = (weight.dtype, torch.float32)
    return isinstance(x, Tensor) and x.dim() > 1 and x.dtype in types and x.shape[-1:] == weight.shape


class Product(torch.autograd.Function):
    """F.linear that knows its weight again in the graph; with `unread` zeros stand in for the result. Gradients of
    weight and bias go to the sums, or to autograd without any."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sums: WeightSums | None, unread: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sums, ctx.bias, ctx.weight_id = sums, bias, id(weight)
        return zeros(x, weight) if unread else F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, sums, dweight, dbias = dy.flatten(0, -2), ctx.sums, None, None
        if sums is not None:
            add_product(sums.total(weight), rows, x.flatten(0, -2))
        elif ctx.needs_input_grad[1]:
            dweight = rows.T @ x.flatten(0, -2)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        if sums is not None and sums.holds(ctx.bias, 1):
            total = sums.total(ctx.bias)
            total += rows.sum(0, dtype=total.dtype)
        elif ctx.needs_input_grad[2]:
            dbias = rows.sum(0)
        return dx, dweight, dbias, None, None


class _Scale(torch.autograd.Function):
    """x * weight, row by row, likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sums: WeightSums) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sums = sums
        return x * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        total = ctx.sums.total(weight)
        total += (dy * x).flatten(0, -2).sum(0, dtype=total.dtype)
        return dy * weight if ctx.needs_input_grad[0] else None, None, None
