"""Streams that wait until a counter in device memory has grown, or write one: a copy starts while the kernel runs on.

`cuStreamWaitValue32` and `cuStreamWriteValue32` of the CUDA driver: both stand in the stream's front end and take no
processor; a write comes after all that its stream did before, for every observer. CUDA does not see such an order, so
what raises a counter must be queued before the wait, and an event from before a kernel that does is waited for too. The
comparison is cyclic (CU_STREAM_WAIT_VALUE_GEQ: `(int32)(counter - value) >= 0`), so counters may wrap.
Source: CUDA driver API, "Stream memory operations".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import cuda_driver


def can_wait() -> str:
    """Why streams cannot wait for a value here; '' when they can."""
    return cuda_driver.lacking()


def wait_value(stream: Any, counters: torch.Tensor, at: int, value: int) -> None:
    """What is queued on `stream` from now on waits until the int32 `counters`, flat, hold `value` or more at `at`."""
    cuda_driver.wait_until(stream, counters.data_ptr() + 4 * at, value)


def write_value(stream: Any, counters: torch.Tensor, at: int, value: int) -> None:
    """Set the int32 `counters`, flat, at `at` behind what is queued on `stream`; a peer's memory may be written to."""
    cuda_driver.write(stream, counters.data_ptr() + 4 * at, value)


@dataclass(frozen=True)
class Counted:
    """Behind `before` and until `counters[at]`, an int32 tensor on the device, has reached `value`. As an event is."""

    before: Any
    counters: torch.Tensor
    at: int
    value: int

    def wait(self, stream: Any) -> None:
        """What is queued on `stream` from now on waits."""
        self.before.wait(stream)
        wait_value(stream, self.counters, self.at, self.value)
