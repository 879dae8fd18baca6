"""Has anything been replaced since the last plan? The fast path of a save, which may cost a millisecond at most.

Listing a model's state through state_dict takes tens of milliseconds for a few thousand tensors, and a checkpoint every
step cannot afford that. Tensors are updated in place and rarely replaced, so it is enough to ask each dictionary that
holds them whether it still holds the same objects, at the same addresses. What is not a tensor of a module or an
optimizer (options, RNG, users' objects) is read anew each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .state import AppState, Leaf, local_tensor


class Watch:
    """Watches the tensors of `leaves`, which `state` has just listed. `usable` is False when a module makes its
    state_dict from something else than its own parameters and buffers: then every save lists the state anew."""

    def __init__(self, state: AppState, leaves: Sequence[Leaf]) -> None:
        self._held: list[tuple[dict[Any, Any], Any, Any]] = []
        self._sizes: list[tuple[Any, int]] = []
        for module in state.modules.values():
            for part in module.modules():
                for owner in (part._parameters, part._buffers, part._modules):
                    self._add(owner)
        self._optimizers = [(o, o.state, o.param_groups) for o in state.optimizers.values()]
        for optimizer in state.optimizers.values():
            self._add(optimizer.state)
            self._sizes.append((optimizer.param_groups, len(optimizer.param_groups)))
            for group in optimizer.param_groups:
                self._sizes.append((group["params"], len(group["params"])))
            for values in optimizer.state.values():
                self._add(values)
        fixed = [leaf for leaf in leaves if leaf.path[0] in state.modules or _is_state(state, leaf)]
        held = {id(value) for _, _, value in self._held} | {
            value.data_ptr() for _, _, value in self._held if isinstance(value, torch.Tensor)
        }
        self.usable = all(
            isinstance(leaf.value, torch.Tensor)
            and (id(leaf.value) in held or local_tensor(leaf.value).data_ptr() in held or leaf.value.numel() == 0)
            for leaf in fixed
        )
        self._tensors = [local_tensor(leaf.value) for leaf in fixed if isinstance(leaf.value, torch.Tensor)]
        self._live = [value for _, _, value in self._held if isinstance(value, torch.Tensor)]
        self._places = [_place(tensor) for tensor in self._live]
        self.fixed = {leaf.key: tensor for leaf, tensor in zip(fixed, self._tensors)}

    def _add(self, owner: dict[Any, Any]) -> None:
        self._sizes.append((owner, len(owner)))
        self._held.extend((owner, key, value) for key, value in owner.items())

    def unchanged(self) -> bool:
        """Whether every watched dictionary holds the same objects as before, at the same addresses."""
        return (
            self.usable
            and all(o.state is state and o.param_groups is groups for o, state, groups in self._optimizers)
            and all(len(owner) == size for owner, size in self._sizes)
            and all(owner.get(key) is value for owner, key, value in self._held)
            and [_place(tensor) for tensor in self._live] == self._places
        )


def _place(tensor: torch.Tensor) -> tuple[int, torch.Size]:
    """Where a live tensor's data lies: `.data` may be given another storage, or another shape of the same one."""
    return local_tensor(tensor).data_ptr(), tensor.shape


def _is_state(state: AppState, leaf: Leaf) -> bool:
    return leaf.path[0] in state.optimizers and leaf.path[1] == "state"
