"""Streams that wait until a counter in device memory has grown, or write one: a copy starts while the kernel runs on.

`cuStreamWaitValue32` and `cuStreamWriteValue32` of the CUDA driver: both stand in the stream's front end and take no
processor; a write comes after all that its stream did before, for every observer. CUDA does not see such an order, so
what raises a counter must be queued before the wait, and an event from before a kernel that does is waited for too. The
comparison is cyclic (CU_STREAM_WAIT_VALUE_GEQ: `(int32)(counter - value) >= 0`), so counters may wrap.
Source: CUDA driver API, "Stream memory operations".
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ..dist.errors import UndertowError

_GEQ = 0


@cache
def _driver() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    for call in (library.cuStreamWaitValue32_v2, library.cuStreamWriteValue32_v2):
        call.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
    return library


def can_wait() -> str:
    """Why streams cannot wait for a value here; '' when they can."""
    try:
        _driver()
    except (OSError, AttributeError) as error:
        return f"the CUDA driver offers no cuStreamWaitValue32 ({error})"
    return ""


def wait_value(stream: Any, counters: torch.Tensor, at: int, value: int) -> None:
    """What is queued on `stream` from now on waits until the int32 `counters`, flat, hold `value` or more at `at`."""
    _check(_driver().cuStreamWaitValue32_v2(stream.cuda_stream, _address(counters, at), value % 2**32, _GEQ), "Wait")


def write_value(stream: Any, counters: torch.Tensor, at: int, value: int) -> None:
    """Set the int32 `counters`, flat, at `at` behind what is queued on `stream`; a peer's memory may be written to."""
    _check(_driver().cuStreamWriteValue32_v2(stream.cuda_stream, _address(counters, at), value % 2**32, 0), "Write")


def _address(counters: torch.Tensor, at: int) -> int:
    return counters.data_ptr() + 4 * at


def _check(code: int, what: str) -> None:
    if code:
        raise UndertowError(f"cuStream{what}Value32 gave CUDA driver error {code}")


@dataclass(frozen=True)
class Counted:
    """Behind `before` and until `counters[at]`, an int32 tensor on the device, has reached `value`. As an event is."""

    before: Any
    counters: torch.Tensor
    at: int
    value: int

    def wait(self, stream: Any) -> None:
        """What is queued on `stream` from now on waits."""
        stream.wait_event(self.before)
        wait_value(stream, self.counters, self.at, self.value)
