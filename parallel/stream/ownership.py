"""May a backward function overwrite the gradient it was given?

A layer's dX has the shape and type of its dY, and row chunk i of dY is dead once row chunk i of dX exists, so writing
dX over dY saves T x C of memory. Autograd makes no promise about who else holds dY: the other branch of a sum, a
tensor hook that kept it, the caller of `backward(gradient)`. Both reference counts tell: that of the tensor in C++
and that of its Python object, the latter compared with what the very same kind of call shows when nobody else looks.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Probe(torch.autograd.Function):
    seen = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *rest: Any) -> Tensor:
        _Probe.seen = sys.getrefcount(dy)
        return dy


@functools.cache
def _unheld_count() -> int:
    with torch.enable_grad():
        x = torch.zeros(2, requires_grad=True)
        (_Probe.apply(x) * 1.0).sum().backward()  # type: ignore[operator]
    return _Probe.seen


def is_ours(dy: Tensor, references_of_caller: int) -> bool:
    """Whether nobody but the calling `backward(ctx, dy, *rest)` holds `dy`, a dense tensor.

    `references_of_caller` is `sys.getrefcount(dy)` taken in that function; in a statement of its own, and that
    function must be a once_differentiable one.
    """
    count = getattr(dy, "_use_count", None)
    alone = count is not None and count() == 1 and references_of_caller <= _unheld_count()
    return alone and dy.is_contiguous() and dy.untyped_storage().nbytes() == dy.nbytes
