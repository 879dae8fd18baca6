"""Asynchronous copies from where a tensor lives into host memory: memcpy for host tensors, a side stream for CUDA.

One `Copier` serves all saves of a run. For CUDA the copies are issued through the runtime's own `cudaMemcpyAsync`
(found in the process by ctypes): a save issues hundreds of them, and torch's `copy_` costs ten times the host time per
call and holds the interpreter lock meanwhile.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from .arena import copy_bytes

DEVICE_TO_HOST = 2


class HostCopier:
    """State in host memory. A copy is done when `copy` returns."""

    device = torch.device("cpu")

    def begin(self) -> None:
        """Called by the training thread when a snapshot starts."""

    def copy(self, target: int, source: int, nbytes: int) -> None:
        copy_bytes(target, source, nbytes)

    def mark(self) -> Any:
        """A handle that `wait` and `order_after` take; None means that all copies so far are done."""
        return None

    def wait(self, mark: Any) -> None:
        """Block this thread until what came before `mark` is done."""

    def order_after(self, mark: Any) -> None:
        """Make what the training thread does next come after the copies before `mark`."""

    def bring(self, flag: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """`flag` in host memory, valid once `wait` on the mark beside it has returned."""
        return flag, None

    def side(self) -> Any:
        """A context in which torch operations come after the copies."""
        return nullcontext()


class CudaCopier(HostCopier):
    """State on one CUDA device. Copies run on a stream of their own, after what the training stream had queued."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._memcpy = _cuda_memcpy_async()

    def begin(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def copy(self, target: int, source: int, nbytes: int) -> None:
        code = self._memcpy(target, source, nbytes, DEVICE_TO_HOST, self.stream.cuda_stream)
        if code:
            raise RuntimeError(f"cudaMemcpyAsync of {nbytes} bytes failed with CUDA error {code}")

    def mark(self) -> torch.cuda.Event:
        # blocking=True: the waiting flush thread sleeps instead of spinning on a core
        event = torch.cuda.Event(blocking=True)
        event.record(self.stream)
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def order_after(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def bring(self, flag: torch.Tensor) -> tuple[torch.Tensor, Any]:
        host = torch.empty_like(flag, device="cpu", pin_memory=True)
        host.copy_(flag, non_blocking=True)
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self.device))
        return host, event

    def side(self) -> Any:
        return torch.cuda.stream(self.stream)


@lru_cache(maxsize=1)
def _cuda_memcpy_async():
    """The `cudaMemcpyAsync` of the CUDA runtime that torch has loaded."""
    maps = Path("/proc/self/maps").read_text()
    found = re.findall(r"\s(/\S*libcudart\S*\.so\S*)", maps)
    library = ctypes.CDLL(found[0] if found else None)
    function = library.cudaMemcpyAsync
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function


def copier_for(tensors: Sequence[torch.Tensor]) -> HostCopier:
    """The copier for the device on which `tensors` live: the one CUDA device among them, else the host."""
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    if len(devices) > 1:
        raise ValueError(f"one process's state lies on several CUDA devices: {sorted(map(str, devices))}")
    return CudaCopier(devices.pop()) if devices else HostCopier()
