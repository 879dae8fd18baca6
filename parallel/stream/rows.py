"""Hidden rows on their way to logits, not computed yet: `Rows` stands where a model expects its logits tensor.

A head treats each row alone: final norm, linear layer, perhaps a scale or a soft cap. While streaming is on, the norm
and the head of a model record themselves on a `Rows` instead of running, and the loss runs the recorded `Pipeline` a
few rows at a time. Whoever does anything else with the object (indexing, torch functions, attributes) gets the plain
full tensor, with its autograd graph, as without streaming.

Legend: B batch, T tokens, N rows, d channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...dist.errors import UserError
from .deepspeed_zero import gathered, is_partitioned

RowFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pipeline:
    """Row-wise functions from [..., d] to [..., V]: `before`, then `head` (the large product), then `after`.

    `modules` own the parameters of `before` and `head` that want gradients.
    """

    before: tuple[RowFunction, ...] = ()
    head: RowFunction | None = None
    after: tuple[RowFunction, ...] = ()
    modules: tuple[nn.Module, ...] = ()
    weight: Callable[[], Tensor] | None = None  # the head's weight [V, d] when the head is x @ weight.T, nothing more

    def __call__(self, rows: Tensor) -> Tensor:
        for function in self.steps():
            rows = function(rows)
        return rows

    def steps(self) -> tuple[RowFunction, ...]:
        return (*self.before, *(() if self.head is None else (self.head,)), *self.after)

    def parameters(self) -> list[nn.Parameter]:
        unique = {id(p): p for module in self.modules for p in module.parameters() if p.requires_grad}
        return list(unique.values())

    def weights(self) -> list[nn.Parameter]:
        """All of them, frozen ones too."""
        return [p for module in self.modules for p in module.parameters()]

    def then(self, function: RowFunction, module: nn.Module | None = None) -> Pipeline:
        """This pipeline with one more function; a `Linear` takes the place of the head."""
        modules = self.modules if module is None else (*self.modules, module)
        if self.head is not None:
            return replace(self, after=(*self.after, function), modules=modules)
        if _is_head(module):
            weight = _plain_weight(module)
            return replace(self, head=function, modules=modules, weight=weight)
        return replace(self, before=(*self.before, function), modules=modules)


def _is_head(module: nn.Module | None) -> bool:
    return module is not None and any(isinstance(m, nn.Linear) for m in module.modules())


def _plain_weight(module: nn.Module | None) -> Callable[[], Tensor] | None:
    """For an exact `nn.Linear` without bias and hooks: how to get its weight."""
    if not isinstance(module, nn.Linear) or type(module) is not nn.Linear or module.bias is not None:
        return None
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    return lambda: module.weight


class Rows:
    """What `pipeline` makes of x [B, T, d], one row at a time, when somebody asks."""

    def __init__(self, x_BTd: Tensor, pipeline: Pipeline) -> None:
        self.x, self.pipeline = x_BTd, pipeline
        self._tensor: Tensor | None = None

    def then(self, function: RowFunction, module: nn.Module | None = None) -> Rows:
        if self._tensor is not None:
            raise RuntimeError("these rows have been materialised")
        return Rows(self.x, self.pipeline.then(function, module))

    def tensor(self) -> Tensor:
        """The plain tensor, computed on first use with whatever gradient mode is on."""
        if self._tensor is None:
            weights = self.pipeline.weights()
            if is_partitioned(weights) and torch.is_grad_enabled():
                raise UserError(
                    "full logits with gradients, but ZeRO stage 3 has taken the head's weights away",
                    remedy="use token_log_probs, map_rows or causal_loss of undertow.parallel.stream on them",
                )
            with gathered(weights):
                self._tensor = self.pipeline(self.x)
        return self._tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> Any:
        whole = (slice(None), slice(0, None), slice(0, None, None))
        parts = index if isinstance(index, tuple) else (index,)
        if all(isinstance(part, slice) and part in whole for part in parts) and len(parts) <= 3:
            return self
        return self.tensor()[index]

    def __len__(self) -> int:
        return self.x.shape[0]

    def __iter__(self) -> Any:
        raise TypeError("iterate over rows.tensor()")

    def float(self) -> Rows:
        return self  # losses are formed in float32 anyway

    def contiguous(self) -> Rows:
        return self

    def __mul__(self, other: Any) -> Any:
        return _recorded(torch.mul, self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return _recorded(torch.div, self, other)

    def __add__(self, other: Any) -> Any:
        return self.tensor() + _tensor(other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self.tensor() - _tensor(other)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.mul, torch.div, torch.tanh) and isinstance(args[0], Rows) and not kwargs:
            return _recorded(func, *args)
        args, kwargs = pytree.tree_map(_tensor, (tuple(args), dict(kwargs)))
        return func(*args, **kwargs)


def _tensor(value: Any) -> Any:
    return value.tensor() if isinstance(value, Rows) else value


def _recorded(func: Any, rows: Rows, *others: Any) -> Any:
    """Record an elementwise function of numbers; anything else runs on the plain tensor."""
    if any(not isinstance(other, (int, float)) for other in others):
        return func(rows.tensor(), *map(_tensor, others))
    return rows.then(lambda z: func(z, *others))
