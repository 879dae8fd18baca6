"""Calls of the CUDA driver that torch does not offer, or that cost the host less: waits, writes and copies by address.

A copy by torch sets the current stream, looks at layouts and notes the stream for the allocator of pinned memory; to
queue one by address takes a fraction of that. Nobody keeps the memory then: it must live until the copy is done.
Source: CUDA driver API, "Memory management" and "Stream memory operations".
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from ..dist.errors import UndertowError

Copy = tuple[int, int, int]  # target, source, bytes
_GEQ, _RELAXED = 0, 2  # CU_STREAM_WAIT_VALUE_GEQ, CU_STREAM_CAPTURE_MODE_RELAXED
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING


@cache
def _driver() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    for call in (library.cuStreamWaitValue32_v2, library.cuStreamWriteValue32_v2):
        call.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
    library.cuStreamCreate.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint]
    library.cuGraphInstantiateWithFlags.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulonglong]
    library.cuGraphLaunch.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.cuGraphExecDestroy.argtypes = [ctypes.c_void_p]
    library.cuMemcpyAsync.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    if hasattr(library, "cuMemcpyBatchAsync_v2"):  # since CUDA 13
        arrays, size = [ctypes.c_void_p] * 3, ctypes.c_size_t
        library.cuMemcpyBatchAsync_v2.argtypes = [
            *arrays,
            size,
            ctypes.c_void_p,
            ctypes.c_void_p,
            size,
            ctypes.c_void_p,
        ]
    return library


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes: sources are read in the order of the stream; no hints where memory is."""

    _fields_ = (("order", ctypes.c_int), ("hints", ctypes.c_int * 4), ("flags", ctypes.c_uint))


_IN_ORDER, _FROM_THE_FIRST = _Attributes(1), ctypes.c_size_t(0)  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM


def lacking() -> str:
    """What the driver lacks here; '' when these calls can be made."""
    try:
        _driver()
    except (OSError, AttributeError) as error:
        return f"the CUDA driver offers no cuStreamWaitValue32 ({error})"
    return ""


def wait_until(stream: Any, address: int, value: int) -> None:
    """What is queued on `stream` from now on waits until the int32 at `address` is `value` or more, cyclically."""
    _check(_driver().cuStreamWaitValue32_v2(stream.cuda_stream, address, value % 2**32, _GEQ), "cuStreamWaitValue32")


def write(stream: Any, address: int, value: int) -> None:
    """Set the int32 at `address` behind what is queued on `stream`."""
    _check(_driver().cuStreamWriteValue32_v2(stream.cuda_stream, address, value % 2**32, 0), "cuStreamWriteValue32")


def copy(stream: Any, target: int, source: int, nbytes: int) -> None:
    """Queue a copy between two addresses on `stream`: in this or a peer GPU's memory, or the host's pinned one."""
    _check(_driver().cuMemcpyAsync(target, source, nbytes, stream.cuda_stream), "cuMemcpyAsync")


def copies(stream: Any, each: Sequence[Copy]) -> None:
    """Queue several, one after the other."""
    queue, handle = _driver().cuMemcpyAsync, stream.cuda_stream
    for target, source, nbytes in each:
        if code := queue(target, source, nbytes, handle):
            _check(code, "cuMemcpyAsync")


def copy_all(stream: Any, each: Sequence[Copy]) -> None:
    """Queue several, in no order among each other; in one call where the driver has one. Not into a CUDA graph."""
    batch = getattr(_driver(), "cuMemcpyBatchAsync_v2", None)
    if batch is None or len(each) < 2:
        copies(stream, each)
        return
    targets, sources, sizes = (array("Q", column) for column in zip(*each))
    code = batch(
        targets.buffer_info()[0], sources.buffer_info()[0], sizes.buffer_info()[0], len(each),
        ctypes.byref(_IN_ORDER), ctypes.byref(_FROM_THE_FIRST), 1, stream.cuda_stream,
    )  # fmt: skip
    _check(code, "cuMemcpyBatchAsync")


def new_stream(device: torch.device) -> torch.cuda.ExternalStream:
    """A stream that nobody else has, unlike torch's, of which it hands out 32 again and again. It lives as long as the
    process."""
    handle = ctypes.c_void_p()
    with torch.cuda.device(device):
        code = _driver().cuStreamCreate(ctypes.byref(handle), _NON_BLOCKING)
    _check(code, "cuStreamCreate")
    return torch.cuda.ExternalStream(handle.value, device)


class Launchable:
    """A graph (its handle), made ready to be launched."""

    def __init__(self, graph: int) -> None:
        handle = ctypes.c_void_p()
        code = _driver().cuGraphInstantiateWithFlags(ctypes.byref(handle), graph, 0)
        _check(code, "cuGraphInstantiateWithFlags")
        self.handle = handle.value or 0
        ending = weakref.finalize(self, _driver().cuGraphExecDestroy, self.handle)  # a launch on its way goes on
        ending.atexit = False

    def launch(self, stream: int) -> None:
        """Queue all of it on a stream, by its handle."""
        if code := _driver().cuGraphLaunch(self.handle, stream):
            _check(code, "cuGraphLaunch")


def let_capture() -> None:
    """From now on this thread may ask events while another one captures a CUDA graph, which fails otherwise."""
    mode = ctypes.c_int(_RELAXED)
    _check(_driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "cuThreadExchangeStreamCaptureMode")


def _check(code: int, what: str) -> None:
    if code:
        raise UndertowError(f"{what} gave CUDA driver error {code}")
