"""Replace a module's forward on the instance, so that it can be put back exactly.

The class, the state dict and the module tree stay as they are. The replacement is a bound method that finds its
engine through the module itself, so a deep copy of the model (a reference policy, an averaged model) gets methods bound
to the copy and, because the link to the engine copies as an empty one, runs plainly.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

_LINK = "_undertow_stream"


class Link:
    """From a module to the function that replaces its forward; copies and pickles as a link to nothing."""

    def __init__(self, handler: Callable[..., Any] | None, original: Callable[..., Any] | None) -> None:
        self.handler, self.original = handler, original

    def __deepcopy__(self, memo: dict) -> Link:
        return Link(None, None)

    def __reduce__(self) -> tuple:
        return Link, (None, None)


def override(module: nn.Module, handler: Callable[[nn.Module, tuple, dict], Any], name: str = "forward") -> None:
    """`module.name(*args, **kwargs)` becomes `handler(module, args, kwargs)`; `original(module, name)` is the old one.

    `inspect.signature` of the method stays what it was.
    """
    before = module.__dict__.get(name)
    current = getattr(module, name)
    link_name = f"{_LINK}_{name}"

    @functools.wraps(getattr(type(module), name))
    def replaced(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        link = self.__dict__.get(link_name)
        if link is None or link.handler is None:
            return _class_method(self, name)(*args, **kwargs)
        if torch.compiler.is_compiling():  # a model compiled whole: what streams is run as it is
            return _untraced(link.handler, self, args, kwargs)
        return link.handler(self, args, kwargs)

    link = Link(handler, current)
    module.__dict__[link_name] = link
    module.__dict__[name] = types.MethodType(replaced, module)
    module.__dict__[f"{link_name}_before"] = (before, module.__dict__[name])


@_disable_dynamo  # torch's own form of `torch.compiler.disable`, which does not import Dynamo before it is needed
def _untraced(handler: Callable[..., Any], module: nn.Module, args: tuple, kwargs: dict) -> Any:
    return handler(module, args, kwargs)


def original(module: nn.Module, name: str = "forward") -> Callable[..., Any]:
    """What `module.name` was before `override`."""
    link = module.__dict__.get(f"{_LINK}_{name}")
    return _class_method(module, name) if link is None or link.original is None else link.original


def restore(module: nn.Module, name: str = "forward") -> None:
    """Undo `override`. If somebody wrapped the replacement meanwhile, it stays in place and only passes through."""
    link_name = f"{_LINK}_{name}"
    link = module.__dict__.pop(link_name, None)
    before, ours = module.__dict__.pop(f"{link_name}_before", (None, None))
    if link is None or module.__dict__.get(name) is not ours:
        return
    if before is None:
        del module.__dict__[name]
    else:
        module.__dict__[name] = before


def _class_method(module: nn.Module, name: str) -> Callable[..., Any]:
    return getattr(type(module), name).__get__(module)
