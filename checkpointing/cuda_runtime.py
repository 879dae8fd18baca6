"""Calls of the CUDA runtime that torch has loaded and does not expose: copies by address, pinning with an error code.

Found by ctypes in the library that is mapped already, so nothing is linked, loaded or compiled.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import numpy as np

DEVICE_TO_HOST, WITHIN_DEVICE = 2, 3  # cudaMemcpyKind
IN_STREAM_ORDER = 1  # cudaMemcpySrcAccessOrderStream
PREFER_OVERLAP = 1  # cudaMemcpyFlagPreferOverlapWithCompute


class _Attributes(ctypes.Structure):
    """cudaMemcpyAttributes."""

    _fields_ = [
        ("order", ctypes.c_int),
        ("source_hint", ctypes.c_int * 2),
        ("target_hint", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    ]


class CudaRuntime:
    """Asynchronous copies from a device. Raises `RuntimeError` with CUDA's error number."""

    def __init__(self) -> None:
        maps = Path("/proc/self/maps").read_text()
        found = re.findall(r"\s(/\S*libcudart\S*\.so\S*)", maps)
        library = ctypes.CDLL(found[0] if found else None)
        version = ctypes.c_int(0)
        library.cudaRuntimeGetVersion(ctypes.byref(version))
        self._one = library.cudaMemcpyAsync
        self._one.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
        self._library = library
        self._batch = getattr(library, "cudaMemcpyBatchAsync", None)
        self._reports_index = version.value < 13000  # until CUDA 13 the call had one more argument
        self._attributes = _Attributes(IN_STREAM_ORDER, (0, 0), (0, 0), PREFER_OVERLAP)

    def register(self, address: int, nbytes: int) -> int:
        """Pin host memory; CUDA's error number, cleared, or 0."""
        code = self._library.cudaHostRegister(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), ctypes.c_uint(0))
        if code:
            self._library.cudaGetLastError()  # or torch would raise it at its next call
        return code

    def unregister(self, address: int) -> None:
        if self._library.cudaHostUnregister(ctypes.c_void_p(address)):
            self._library.cudaGetLastError()  # the process is ending, and the driver with it

    def copy(self, target: int, source: int, nbytes: int, stream: int, kind: int = DEVICE_TO_HOST) -> None:
        """Copy from device address `source` to host address `target`, or as `kind` says, in the order of `stream`."""
        code = self._one(target, source, nbytes, kind, stream)
        if code:
            raise RuntimeError(f"cudaMemcpyAsync of {nbytes} bytes failed with CUDA error {code}")

    def copy_many(
        self, targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray, stream: int, kind: int = DEVICE_TO_HOST
    ) -> None:
        """The same for arrays of int64 addresses and sizes, in one call where the runtime has it (which finds out
        by itself where an address lies)."""
        if self._batch is None or self._copy_batch(targets, sources, sizes, stream):
            self._batch = None
            for target, source, nbytes in zip(targets.tolist(), sources.tolist(), sizes.tolist()):
                self.copy(target, source, nbytes, stream, kind)

    def _copy_batch(self, targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray, stream: int) -> int:
        assert self._batch is not None
        arrays = [np.ascontiguousarray(array) for array in (targets, sources, sizes)]
        index, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
        more = [ctypes.byref(failed)] if self._reports_index else []
        return self._batch(
            *(ctypes.c_void_p(array.ctypes.data) for array in arrays),
            ctypes.c_size_t(len(sizes)),
            ctypes.byref(self._attributes),
            ctypes.byref(index),
            ctypes.c_size_t(1),
            *more,
            ctypes.c_void_p(stream),
        )
