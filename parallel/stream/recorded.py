"""One call of an attention that is not ours (over ranks, for one), and what its backward needs kept apart from q, k, v.

Any differentiable function will do. While it runs, `saved_tensors_hooks` see what autograd saves: q, k and v are left
out, because backward of a layer computes them again; the rest (ring attention: output and log-sum-exp) is the stash,
which a slot may keep on the device or on the host. Given both, backward of the attention runs without its forward.

Legend: B batch, H query heads, G key heads, T rows, D and E head dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from .protocol import Attend, Unsupported


class _Source(torch.autograd.Function):
    """q, k and v as results of a node: leaves would be held by the graph."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.detach() for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError("the graph of an attention ends here")  # its gradients are asked for at this node


@dataclass(frozen=True)
class _View:
    """Where a saved tensor lies: in tensor `at` of `own` or, else, of the kept storages."""

    own: bool
    at: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[self.at].as_strided(self.size, self.stride, self.offset)


@dataclass
class _Shelf:
    """What the hooks of a graph hold on to. It knows nothing of the graph, so that nothing goes round in a circle."""

    own: Sequence[Tensor] = ()  # q, k, v while the attention or its backward runs
    kept: list[Tensor] = field(default_factory=list)  # whole storages, flat

    def pack(self, saved: Tensor) -> _View:
        where = _address(saved)
        for own, tensors in ((True, self.own), (False, self.kept)):
            for at, tensor in enumerate(tensors):
                if _address(tensor) == where and tensor.dtype == saved.dtype:
                    return _View(own, at, tuple(saved.shape), saved.stride(), int(saved.storage_offset()))
        flat = saved.untyped_storage().nbytes() // saved.element_size()
        self.kept.append(saved.detach().as_strided((flat,), (1,), 0))
        return _View(False, len(self.kept) - 1, tuple(saved.shape), saved.stride(), int(saved.storage_offset()))

    def unpack(self, view: _View) -> Tensor:
        return view.of(self.own if view.own else self.kept)


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr() or id(t)


def alone(t: Tensor, strides: tuple[int, ...] | None = None) -> Tensor:
    """`t` with these strides (None: its own) and nothing else in its storage; a copy only where it must be."""
    single = t.untyped_storage().nbytes() == t.numel() * t.element_size() and t.storage_offset() == 0
    if single and strides in (None, t.stride()):
        return t.detach()
    if strides is None:
        return t.detach().transpose(1, 2).contiguous().transpose(1, 2)
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t.detach())


class Recorded:
    """`attend(q, k, v, **how)`, run here, once; differentiated once by `gradients`.

    `Unsupported` when the result has no gradient. `tensors` of the methods: what `take` returned, wherever it has been.
    """

    def __init__(self, attend: Attend, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, how: dict[str, Any]) -> None:
        own = [alone(t) for t in (q_BHTD, k_BGTD, v_BGTE)]
        self._strides = [t.stride() for t in own]
        self._shelf = _Shelf(own)
        anchor = torch.zeros((), device=q_BHTD.device, requires_grad=True)
        with torch.enable_grad():
            sources = _Source.apply(anchor, *own)
            with saved_tensors_hooks(self._shelf.pack, self._shelf.unpack):
                out = attend(*sources, **how)
        if not out.requires_grad:
            raise Unsupported(f"the result of {attend} has no gradient")
        node = sources[0].grad_fn
        self._sources = [GradientEdge(node, i) for i in range(3)]
        self._edge = get_gradient_edge(out)
        self._out = self._shelf.pack(out.detach())
        if self._out.own:  # it is one of its arguments
            self._out = self._shelf.pack(out.detach().clone())
        self._shelf.own = ()

    def take(self) -> list[Tensor]:
        """What must be kept until `gradients`, besides q, k and v; not held here any longer."""
        tensors, self._shelf.kept = self._shelf.kept, []
        return tensors

    def out(self, tensors: Sequence[Tensor]) -> Tensor:
        """The result [B, H, T, E], without its graph."""
        return self._out.of(tensors)

    def gradients(
        self, q_BHTD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, tensors: Sequence[Tensor], dout_BHTE: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv from the same values of q, k and v, computed again."""
        self._shelf.own = [alone(t, strides) for t, strides in zip((q_BHTD, k_BGTD, v_BGTE), self._strides)]
        self._shelf.kept = list(tensors)
        try:
            dq, dk, dv = torch.autograd.grad([self._edge], self._sources, [dout_BHTE])
        finally:
            self._shelf.own, self._shelf.kept = (), []
        return dq, dk, dv


class Known(torch.autograd.Function):
    """The result of a `Recorded` attention, with gradients for q, k and v of this graph."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, recorded: Recorded, tensors: Sequence[Tensor]) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.recorded, ctx.tensors = recorded, tensors
        return recorded.out(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        tensors, ctx.tensors = ctx.tensors, ()
        return *ctx.recorded.gradients(*ctx.saved_tensors, tensors, dout), None, None
