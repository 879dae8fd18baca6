"""Which way of computing a block is fastest here: the first call of each kind times all of them, later calls know.

Small blocks may reverse what large ones show, and so may a window, float32 or another GPU, so nothing is assumed: the
ways take turns on the tensors of the call itself, and another than the first in `select.ORDER` must win by 3 % in the
median. That happens on CUDA only, once per kind and process; in a schedule it falls into the rehearsal, before any
message is posted, and while one is being queued nothing is measured and the first way is taken. Lengths of one power
of two are one kind: documents whose ends differ in every batch must not be measured in every batch. A way that fails,
or whose answer is another than the first one's, is left out with a warning. Ranks may choose apart: all ways are
exact, though they round in different places. Under `torch.use_deterministic_algorithms(True)` nothing is measured and
the first way is taken, so that runs repeat.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ...comms.queue_run import queueing
from ...dist.log import get_logger
from . import select
from .types import Backend

log = get_logger(__name__)

ROUNDS = 5
WIN = 1.03  # least median speed-up over the first
MOST_ROWS = 1 << 14  # of queries and of keys, that a measurement computes with
APART = 2**-5  # of the largest number: what rounding to 16 bits on the way cannot explain
Way = Callable[[], Sequence[Tensor]]
_found: dict[Hashable, str] = {}
_backends: dict[Hashable, Backend] = {}  # what `_found` says, for calls of backends
_lines: list[str] = []


def fastest(key: Hashable, ways: Mapping[str, Way], device: torch.device, label: str) -> str:
    """The name of the way for calls like this one, measured when `key` is seen first. The ways give equal results.

    `label`: what `report` calls such calls.
    """
    if key not in _found:
        names = list(ways)
        if len(names) == 1 or queueing() or not may_measure(device):
            return names[0]  # not kept: it may be measured later
        speeds = _measure(ways, device, label)
        best = max(speeds, key=speeds.__getitem__)
        _found[key] = best if speeds[best] >= WIN else names[0]
        others = ", ".join(f"{name} {speed:.2f}×" for name, speed in speeds.items() if name != names[0])
        _lines.append(f"{label}: {_found[key]} (measured: {others} as fast as {names[0]})")
    return _found[key]


def size_class(length: int) -> int:
    """What of a length makes a kind of call: its power of two."""
    return length.bit_length()


def may_measure(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )


def _measure(ways: Mapping[str, Way], device: torch.device, label: str) -> dict[str, float]:
    """How many times as fast as the first way each is: medians of interleaved calls, after two that compile."""
    names = iter(ways)
    first = next(names)
    wanted = [x.clone() for x in ways[first]()]
    right = {first: ways[first]}
    for name in names:
        if reason := _wrong(ways[name], wanted):
            log.warning("attention %s: %s is left out: %s", label, name, reason)
        else:
            right[name] = ways[name]
    for call in right.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in right}
    for _ in range(ROUNDS if len(right) > 1 else 1):
        for name, call in right.items():
            seconds[name].append(_once(call, device))
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return {name: medians[first] / median for name, median in medians.items()}


def _wrong(call: Way, wanted: Sequence[Tensor]) -> str:
    """'' or why a way is of no use here."""
    try:
        found = call()
        for got, want in zip(found, wanted):
            same = torch.isfinite(got) == torch.isfinite(want)
            off = (got.double() - want.double()).nan_to_num(0, 0, 0).abs().amax()
            if not bool(same.all()) or off > APART * want.double().nan_to_num(0, 0, 0).abs().amax():
                return f"its answer is off by {float(off):.3g}"
    except Exception as error:  # a compiler's or a kernel's: the first way remains
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def _once(call: Way, device: torch.device) -> float:
    if device.type != "cuda":
        began_s = time.perf_counter()
        call()
        return time.perf_counter() - began_s
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()  # this call alone, and only while it is being measured
    return begin.elapsed_time(end) / 1e3


def _last_rows(x: Tensor) -> Tensor:
    return x if x.shape[2] <= MOST_ROWS else x[:, :, -MOST_ROWS:].clone()  # which keeps the order of dimensions


class Measured:
    """A backend that hands each call to the fastest of those that accept it. `compiled`: FlexAttention among them."""

    NAME = "measured"

    def __init__(self, *, compiled: bool = False) -> None:
        self.compiled = compiled

    def supports(self, q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, causal: bool, window: int | None) -> bool:
        return True

    def forward(
        self, q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, scale: float, causal: bool, window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._run("forward", (q_BHLD, k_BGLD, v_BGLE), (), scale, causal, window)

    def backward(
        self,
        dout_BHLE: Tensor,
        q_BHLD: Tensor,
        k_BGLD: Tensor,
        v_BGLE: Tensor,
        out_BHLE: Tensor,
        lse_BHL: Tensor,
        *,
        scale: float,
        causal: bool,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = q_BHLD, k_BGLD, v_BGLE
        return self._run("backward", given, (dout_BHLE, out_BHLE, lse_BHL), scale, causal, window)

    def _run(
        self, phase: str, given: tuple[Tensor, ...], rest: tuple[Tensor, ...], scale: float, causal: bool,
        window: int | None,
    ) -> Any:  # fmt: skip
        q, k, v = given
        how: Any = {"causal": causal, "window": window}
        sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[3], v.shape[3], *map(size_class, (q.shape[2], k.shape[2])))
        key = (phase, self.compiled, q.device, q.dtype, sizes, causal, window,
               torch.backends.cuda.cudnn_sdp_enabled(), torch.are_deterministic_algorithms_enabled())  # fmt: skip
        args = (rest[0], *given, *rest[1:]) if rest else given
        backend = _backends.get(key)
        if backend is None:
            ways = {b.NAME: b for b in select.candidates(*given, **how, compiled=self.compiled)}
            last = [_last_rows(x) for x in args]  # the last query stays at the last key
            calls = {name: partial(getattr(b, phase), *last, scale=scale, **how) for name, b in ways.items()}
            mask = f"causal, window {window}" if window else "causal" if causal else "full"
            label = f"{phase} {list(q.shape)} × {list(k.shape)} {str(q.dtype)[6:]} {mask}"
            backend = ways[fastest(key, calls, q.device, label)]
            if key in _found or len(ways) == 1:
                _backends[key] = backend
        elif not backend.supports(*given, **how):  # another length of its kind
            backend = select.choose(*given, **how)
        return getattr(backend, phase)(*args, scale=scale, **how)


_MEASURED, _WITH_FLEX = (cast(Backend, Measured(compiled=compiled)) for compiled in (False, True))


def choose(q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, causal: bool, window: int | None) -> Backend:
    """The measured backend on CUDA, elsewhere the first that accepts the call (a CPU has one kernel)."""
    return _MEASURED if q_BHLD.is_cuda else select.choose(q_BHLD, k_BGLD, v_BGLE, causal=causal, window=window)


def choose_or_compile(q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, causal: bool, window: int | None) -> Backend:
    """As `choose`, with FlexAttention among what is measured."""
    return _WITH_FLEX if q_BHLD.is_cuda else select.choose(q_BHLD, k_BGLD, v_BGLE, causal=causal, window=window)


def report() -> list[str]:
    """What has been measured in this process: a line for each kind of call."""
    return list(_lines)
