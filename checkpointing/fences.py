"""Who waits for which part of the save in flight, on the training thread.

An optimizer that updates one parameter group after the other needs to wait, before each group, only for that group's
bytes. torch's own optimizers call `_init_group` before they touch a group, so that while a save is in flight it is
wrapped for one step, group by group. Where a step's inside is not known (another `step`, a compiled one, a wrapper
such as ZeRO 1), all of the optimizer's bytes are waited for before it begins.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from ..dist.trace import Trace
from .live import LiveState
from .save import Save
from .snapshot import Snapshot

GROUP = "_init_group"  # what torch.optim's `step` calls before it writes a group's parameters or state


class Fences:
    """The save in flight, until a fence has passed all of it. `live` knows where each group's bytes end."""

    def __init__(self, live: LiveState, trace: Trace) -> None:
        self._live, self._trace = live, trace
        self.current: Snapshot | None = None

    def begun(self, save: Save) -> None:
        """`save` is in flight from now on."""
        self._save, self.current = save, save.snapshot

    def all(self) -> None:
        """Wait until nothing that the caller does next can change the save in flight."""
        snapshot, self.current = self.current, None
        if snapshot is not None:
            self._wait(snapshot, None)
            snapshot.release_sources()

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """`optimizer` is about to step: wait for what it writes, or for its first group's part and arrange the rest."""
        vars(optimizer).pop(GROUP, None)  # of a step that raised
        self._live.state.stepped.setdefault(optimizer)
        if self.current is None:
            return
        ends = [self._live.end_of(optimizer, index) for index in range(len(optimizer.param_groups))]
        if len(set(ends)) > 1 and steps_by_groups(optimizer):
            vars(optimizer)[GROUP] = _GroupFence(self, optimizer, ends)
            self.through(ends[0])
        else:
            self.through(self._live.end_of(optimizer))

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """The step is over."""
        vars(optimizer).pop(GROUP, None)

    def through(self, chunk: int | None) -> None:
        """Wait for the chunks up to `chunk`; None: for all."""
        if chunk is None:
            self.all()
        elif self.current is not None:
            self._wait(self.current, chunk)

    def _wait(self, snapshot: Snapshot, chunk: int | None) -> None:
        began_s = time.monotonic()
        with self._trace.span("fence", step=snapshot.step):
            snapshot.fence(chunk)
        self._save.fence_s += time.monotonic() - began_s


class _GroupFence:
    """Stands for an optimizer's `_init_group` during one step."""

    def __init__(self, fences: Fences, optimizer: torch.optim.Optimizer, ends: list[int | None]) -> None:
        self._fences, self._inner = fences, getattr(optimizer, GROUP)
        self._ends = {id(group): end for group, end in zip(optimizer.param_groups, ends)}

    def __call__(self, group: dict[str, Any], *rest: Any, **named: Any) -> Any:
        self._fences.through(self._ends.get(id(group)))
        return self._inner(group, *rest, **named)


def steps_by_groups(optimizer: torch.optim.Optimizer) -> bool:
    """Whether each group of `optimizer` is left alone until `_init_group` is called with it, from Python."""
    kind = type(optimizer)
    own = [getattr(getattr(kind, name, None), "__module__", "") for name in ("step", GROUP)]
    return all(module.startswith("torch.optim.") for module in own) and not _compiling()


def _compiling() -> bool:
    """Whether torch's compiler looks at the frames that are called now: it asks `_init_group` once, not every step."""
    if torch.compiler.is_compiling():  # at these very frames
        return True
    if "torch._dynamo" not in sys.modules:
        return False
    frames = sys.modules.get("torch._C._dynamo.eval_frame")
    callback = getattr(frames, "get_eval_frame_callback", None)
    return callback is None or callback() is not None
