"""One save on its way, and what it cost: the nouns that committers, tiers, observers and the facade share.

A value that may change as soon as training goes on is pickled when the save begins; plain ones that nobody can change
are pickled in the background, and not again while they stay the same, as random generators do where nobody draws.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..dist.units import format_bytes, format_seconds
from .attempt import Attempt
from .plan import SavePlan
from .readable import Readable
from .snapshot import Snapshot
from .state import Fresh, Generators

OURS = (Fresh, Generators)  # nobody else holds what is in them
LATER = (*OURS, int, float, bool, str, type(None))  # values that nobody can change: pickled in the background


@dataclass(frozen=True)
class SaveReport:
    """What one save cost in one tier and how it ended. Times in seconds: `call_s` and `fence_s` blocked training,
    `durable_s` and `commit_s` run from the call to durable files on this rank and to the commit on all; `slowdown_s` is
    how much longer the steps beside it took in all, call and fence included (None: no step without a save to compare
    with). `heard`: the `reason` is rank 0's verdict, which rank 0 logs."""

    step: int
    tier: str
    ok: bool
    reason: str
    nbytes: int
    call_s: float
    fence_s: float
    durable_s: float
    commit_s: float
    slowdown_s: float | None = None
    heard: bool = False

    def __str__(self) -> str:
        times = f"call {format_seconds(self.call_s)}, fence {format_seconds(self.fence_s)}"
        if self.slowdown_s is not None:
            times += f", steps longer by {format_seconds(max(0.0, self.slowdown_s))}"
        end = f"committed after {format_seconds(self.commit_s)}" if self.ok else f"failed: {self.reason}"
        return f"step {self.step} ({self.tier}): {format_bytes(self.nbytes)}, {times}, {end}"


@dataclass
class Save:
    """One save on its way into one or two tiers. `objects` are the values to pickle, taken when the save began;
    `known` is what the saves before have pickled: key → (value, repr, bytes) of those that can be compared. `planned`:
    the plan was made for it, with all ranks; else it is that of the save before."""

    attempt: Attempt
    plan: SavePlan
    objects: Mapping[str, Any]
    known: dict[str, tuple[Any, str, bytes]]
    readable: Readable | None = None  # looks at the bytes of each object once
    planned: bool = True
    call_s: float = 0.0
    fence_s: float = 0.0
    snapshot: Snapshot = field(init=False)
    problem: str = ""  # why this rank votes against the save whatever becomes of its bytes
    _pickled: dict[str, bytes] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        for key, value in self.objects.items():
            if not isinstance(value, LATER):  # the value may change as soon as training goes on
                self._keep(key, value)

    @property
    def step(self) -> int:
        return self.attempt.step

    @property
    def began_s(self) -> float:
        return self.attempt.began_s

    def pickled(self) -> dict[str, bytes]:
        """Every object's bytes, in plan order; empty where one could not be pickled, and `problem` says why."""
        with self._lock:
            for key, value in self.objects.items():
                if key not in self._pickled:
                    known = self.known.get(key)
                    if known is not None and known[0] is value:  # nobody can have changed it
                        self._pickled[key] = known[2]
                    else:
                        self._keep(key, value)
                if self.readable is not None:
                    self.readable.look(key, self._pickled[key])
            return {key: self._pickled[key] for key in self.objects}

    def _keep(self, key: str, held: Any) -> None:
        known = self.known.get(key)
        text = repr(held) if _is_plain(held) else ""
        if known is not None and (known[1] == text if text else _same(held, known[0])):
            self._pickled[key] = known[2]
            self.known[key] = held, text, known[2]
            return
        value = held.value if isinstance(held, OURS) else held
        try:
            self._pickled[key] = _pickle(value)
        except Exception as error:  # whatever the user's object raises costs this save, not the training
            self._pickled[key] = b""
            self.problem = self.problem or f"'{key}' cannot be pickled ({type(error).__name__}: {error})"
            return
        if text or isinstance(held, OURS):
            self.known[key] = held, text, self._pickled[key]


def _is_plain(value: Any) -> bool:
    """Whether `repr` tells everything about a value."""
    parts = value if type(value) in (tuple, list) else (value,)
    return all(type(part) in (int, float, bool, str, type(None)) for part in parts)


def _same(a: Any, b: Any) -> bool:
    """Whether two values that nobody can have changed, such as the states of random generators, are alike bit for bit;
    False where that cannot be told."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Generators):
        return a.same(b)
    if isinstance(a, Fresh):
        return _same(a.value, b.value)
    if isinstance(a, torch.Tensor):
        whole = a.dtype in (torch.uint8, torch.int64) and a.device.type == "cpu"
        return whole and b.dtype == a.dtype and b.device == a.device and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(map(_same, a.values(), b.values()))
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return _is_plain(a) and repr(a) == repr(b)


def _pickle(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
