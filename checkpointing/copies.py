"""Asynchronous copies from where a tensor lives into host memory: memcpy for host tensors, a side stream for CUDA.

One `Copier` serves all saves of a run. A save has about a thousand copies; issued one by one from Python they cost the
training thread milliseconds, and issued by another thread each one fights for the interpreter lock, which was measured
to delay the last copy past the end of a step. So CUDA copies are handed to the driver many at once, by a thread of ours
(`cudaMemcpyBatchAsync`, CUDA 12.8), and one by one only where that call is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from .arena import copy_bytes
from .cuda_runtime import WITHIN_DEVICE, CudaRuntime


class HostCopier:
    """State in host memory. A copy is done when `copy` returns."""

    device = torch.device("cpu")
    chunks_at_once = 1  # how many chunks `Snapshot` hands over in one call
    queues = False  # whether `copy` returns at once: then all can be handed over in a row (`Snapshot.issue`)

    def begin(self) -> None:
        """Called by the training thread when a snapshot starts."""

    def copy(self, target: int, source: int, nbytes: int) -> None:
        copy_bytes(target, source, nbytes)

    def copy_many(self, targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray) -> None:
        """Copy sizes[i] bytes from address sources[i] to targets[i] for all i (int64 arrays of one length)."""
        for target, source, nbytes in zip(targets.tolist(), sources.tolist(), sizes.tolist()):
            self.copy(target, source, nbytes)

    def copy_within(self, targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray) -> None:
        """The same where the targets lie on the copier's device, too."""
        self.copy_many(targets, sources, sizes)

    def keep(self, tensor: torch.Tensor) -> None:
        """Copies go to and from `tensor`: when it is freed, its memory is used again only after those under way."""

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

    chunks_at_once = 16  # 256 MiB: few calls, and the first chunks reach the flush soon
    queues = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._runtime = CudaRuntime()

    def begin(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self._runtime.copy(target, source, nbytes, self.stream.cuda_stream)

    def copy_many(self, targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray) -> None:
        if len(sizes):
            self._runtime.copy_many(targets, sources, sizes, self.stream.cuda_stream)

    def copy_within(self, targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray) -> None:
        if len(sizes):
            self._runtime.copy_many(targets, sources, sizes, self.stream.cuda_stream, WITHIN_DEVICE)

    def keep(self, tensor: torch.Tensor) -> None:
        tensor.record_stream(self.stream)

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
        if not flag.is_cuda:
            return flag, self.mark()
        host = torch.empty_like(flag, device="cpu", pin_memory=True)
        host.copy_(flag, non_blocking=True)
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self.device))
        return host, event

    def side(self) -> Any:
        return torch.cuda.stream(self.stream)


def copier_for(tensors: Sequence[torch.Tensor]) -> HostCopier:
    """The copier for the device on which `tensors` live: the one CUDA device among them, else the host."""
    devices = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    if len(devices) > 1:
        raise ValueError(f"one process's state lies on several CUDA devices: {sorted(map(str, devices))}")
    return CudaCopier(devices.pop()) if devices else HostCopier()
