"""Streams that wait until a counter in device memory has grown: what starts a copy while the kernel still runs.

`cuStreamWaitValue32` of the CUDA driver: the wait stands in the stream's front end and takes no processor. CUDA does
not see such an order, so the kernel must be queued before the wait, and an event from before the kernel is waited for
too. The comparison is cyclic (CU_STREAM_WAIT_VALUE_GEQ: `(int32)(counter - value) >= 0`), so counters may wrap.
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
    call = library.cuStreamWaitValue32_v2
    call.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
    return call


def can_wait() -> str:
    """Why streams cannot wait for a value here; '' when they can."""
    try:
        _driver()
    except (OSError, AttributeError) as error:
        return f"the CUDA driver offers no cuStreamWaitValue32 ({error})"
    return ""


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
        address = self.counters.data_ptr() + 4 * self.at
        code = _driver()(stream.cuda_stream, address, self.value % 2**32, _GEQ)
        if code:
            raise UndertowError(f"cuStreamWaitValue32 gave CUDA driver error {code}")
