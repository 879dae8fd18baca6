"""Where others write the state, and the fence must come first: optimizer steps, and every load_state_dict.

A hook belongs to the object that it watches, and that object may be copied (an EMA of the model) or pickled whole; its
copy is not ours to watch, so there the hook does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn


class Fence(Protocol):
    """What is called before the state is written: `fences.Fences`, or a `WholeFence`."""

    def all(self) -> None: ...
    def before_step(self, optimizer: torch.optim.Optimizer) -> None: ...
    def after_step(self, optimizer: torch.optim.Optimizer) -> None: ...


class WholeFence:
    """Waits for all of a save by `fence`, whoever writes."""

    def __init__(self, fence: Callable[[], None]) -> None:
        self.all = fence

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.all()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None: ...


class FenceHook:
    """Calls `fence` with the watched object before it is written; in copies and pickles of it, it does nothing."""

    def __init__(self, fence: Callable[[Any], None]) -> None:
        self._fence = fence

    def __call__(self, watched: Any, *unused: Any) -> None:
        self._fence(watched)

    def __deepcopy__(self, memo: dict) -> FenceHook:
        return FenceHook(_nothing)

    def __reduce__(self) -> Any:
        return FenceHook, (_nothing,)


def _nothing(watched: Any) -> None:
    """What a copied hook does."""


def attach(fences: Fence, modules: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer]) -> list[Any]:
    """Hook `fences` before every load_state_dict, and around every optimizer's step. Handles with `remove`."""
    hook = FenceHook(lambda thing: fences.all())
    before, after = FenceHook(fences.before_step), FenceHook(fences.after_step)
    handles: list[Any] = []
    for optimizer in optimizers:
        handles += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
        handles.append(optimizer.register_load_state_dict_pre_hook(hook))
    for module in modules:  # a part of the model may be loaded on its own
        handles += [part.register_load_state_dict_pre_hook(hook) for part in module.modules()]
    return handles
