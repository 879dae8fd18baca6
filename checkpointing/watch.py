"""Has anything been replaced since the last plan? The fast path of a save, which may cost a millisecond at most.

Listing a model's state through state_dict takes tens of milliseconds for a few thousand tensors, and a checkpoint every
step cannot afford that. Tensors are updated in place and rarely replaced, so it is enough to ask each dictionary that
holds them whether it still holds the same objects, at the same addresses, in loops that the interpreter runs in C: this
runs on the training thread at every save. What is not a tensor of a module or an
optimizer (options, RNG, users' objects) is read anew each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from .spread import own_part
from .state import AppState, Leaf, local_tensor
from .whereabouts import INLINE, SWITCH, Whereabouts, why_not


class Watch:
    """Watches the tensors of `leaves`, which `state` has just listed. `usable` is False when a module makes its
    state_dict from something else than its own parameters and buffers: then every save lists the state anew."""

    def __init__(self, state: AppState, leaves: Sequence[Leaf]) -> None:
        self._owners: list[dict[Any, Any]] = []
        self._lists: list[list[Any]] = []
        for module in state.modules.values():
            for part in module.modules():
                self._owners += [part._parameters, part._buffers, part._modules]
        optimizers = list(dict.fromkeys([*state.optimizers.values(), *map(own_part, state.optimizers.values())]))
        self._optimizers = [(o, o.state, o.param_groups) for o in optimizers]
        for optimizer in optimizers:
            self._owners += [optimizer.state, *optimizer.state.values()]
            self._lists += [optimizer.param_groups, *(group["params"] for group in optimizer.param_groups)]
        plain = all(isinstance(owner, dict) for owner in self._owners)  # a scripted module's are not
        if not plain:
            self._owners = [dict(owner.items()) for owner in self._owners]
        self._empty = [owner for owner in self._owners if not owner]  # most of a model's
        self._owners = [owner for owner in self._owners if owner]
        self._sizes = [*map(len, self._owners)], [*map(len, self._lists)]
        self._keys, held = list(chain.from_iterable(self._owners)), list(_held(self._owners))
        self._values = held
        fixed = [leaf for leaf in leaves if leaf.path[0] in state.modules or _is_state(state, leaf)]
        tensors = [value for value in held if isinstance(value, torch.Tensor)]
        known = {*map(id, held), *(local_tensor(tensor).data_ptr() for tensor in tensors)}
        self.usable = plain and all(
            isinstance(leaf.value, torch.Tensor)
            and (id(leaf.value) in known or local_tensor(leaf.value).data_ptr() in known or leaf.value.numel() == 0)
            for leaf in fixed
        )
        parts = [local_tensor(leaf.value) for leaf in fixed if isinstance(leaf.value, torch.Tensor)]
        self.fixed = {leaf.key: part for leaf, part in zip(fixed, parts)}
        saved = {part.data_ptr() for part in parts if part.numel()}
        once = {id(tensor): tensor for tensor in tensors}.values()  # the same one may have several holders
        once = [tensor for tensor in once if not tensor.numel() or local_tensor(tensor).data_ptr() in saved]
        self._sharded = [tensor for tensor in once if isinstance(tensor, DTensor)]
        self._parts = list(map(_local, self._sharded))  # to_local() would cost 5 µs each
        whole = [*(tensor for tensor in once if not isinstance(tensor, DTensor)), *self._parts]
        near = [tensor for tensor in whole if tensor.dim() <= INLINE]
        self._where = Whereabouts.of(near, self._sharded, self._parts)
        if self._where is not None:
            whole = [tensor for tensor in whole if tensor.dim() > INLINE]
        self._whole = whole
        self._rows = [tensor for tensor in whole if tensor.dim() in (1, 2)]
        self._flat = [tensor for tensor in whole if tensor.dim() == 2]
        self._deep = [tensor for tensor in whole if tensor.dim() > 2 or (tensor.dim() == 2 and not len(tensor))]
        self._facts = [fact() for fact in self._shapes()]
        self._count = len(near), len(near) + sum(tensor.dim() > INLINE for tensor in whole)

    @property
    def way(self) -> str:
        """How it is seen that nothing was replaced, and why so; one line."""
        if not self.usable:
            return "listed anew at each save: a module makes its state_dict of more than its parameters and buffers"
        read, count = self._count
        if self._where is None:
            return f"{count} tensors, each asked where it lies: {why_not() if read else 'there is nothing to read'}"
        rest = f", {count - read} asked" if count > read else ""
        return f"{read} tensors, looked up at offsets found in this torch{rest} ({SWITCH}=0 asks each)"

    def unchanged(self) -> bool:
        """Whether every watched dictionary holds the same objects as before, at the same addresses."""
        return (
            self.usable
            and all(o.state is state and o.param_groups is groups for o, state, groups in self._optimizers)
            and not any(self._empty)
            and ([*map(len, self._owners)], [*map(len, self._lists)]) == self._sizes
            and all(map(is_, chain.from_iterable(self._owners), self._keys))
            and all(map(is_, _held(self._owners), self._values))
            and (
                all(map(is_, map(_local, self._sharded), self._parts))
                if self._where is None
                else self._where.unchanged()
            )
            and all(fact() == known for fact, known in zip(self._shapes(), self._facts))
        )

    def _shapes(self) -> tuple[Callable[[], list], ...]:
        """Where the tensors' data lie and in what shape, fact by fact: `.data` may be given another storage, or another
        shape of the same one. A list of all shapes would make hundreds of tuples, and the garbage collector run at
        every save; the numbers of dimensions, of rows and of elements tell the same of most tensors, and whether it
        lies in one piece what matters of its strides. Asked of those that `Whereabouts` does not look after."""
        return (
            lambda: list(map(torch.Tensor.data_ptr, self._whole)),
            lambda: list(map(torch.Tensor.dim, self._whole)),
            lambda: list(map(_rows, self._rows)),
            lambda: list(map(torch.Tensor.numel, self._flat)),
            lambda: list(map(_shape, self._deep)),
            lambda: list(map(torch.Tensor.is_contiguous, self._whole)),
        )


_shape, _local = attrgetter("shape"), attrgetter("_local_tensor")
_rows = torch._C.TensorBase.__len__  # type: ignore[attr-defined]  # its stub lacks it; Tensor.__len__ is Python


def _held(owners: Sequence[dict[Any, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, owners))


def _is_state(state: AppState, leaf: Leaf) -> bool:
    return leaf.path[0] in state.optimizers and leaf.path[1] == "state"
