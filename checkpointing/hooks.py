"""Where others write the state, and the fence must come first: optimizer steps, and every load_state_dict.

A hook belongs to the object that it watches, and that object may be copied (an EMA of the model) or pickled whole; its
copy is not ours to watch, so there the hook does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class FenceHook:
    """Calls `fence` before the watched object is written; in copies and pickles of that object it does nothing."""

    def __init__(self, fence: Callable[[], None]) -> None:
        self._fence = fence

    def __call__(self, *unused: Any) -> None:
        self._fence()

    def __deepcopy__(self, memo: dict) -> FenceHook:
        return FenceHook(_nothing)

    def __reduce__(self) -> Any:
        return FenceHook, (_nothing,)


def _nothing() -> None:
    """What a copied hook does."""


def attach(
    fence: Callable[[], None], modules: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer]
) -> list[Any]:
    """Hook `fence` before every optimizer step and every load_state_dict; handles with `remove`."""
    hook = FenceHook(fence)
    handles: list[Any] = []
    for optimizer in optimizers:
        handles += [optimizer.register_step_pre_hook(hook), optimizer.register_load_state_dict_pre_hook(hook)]
    for module in modules:  # a part of the model may be loaded on its own
        handles += [part.register_load_state_dict_pre_hook(hook) for part in module.modules()]
    return handles
