"""Device memory through the driver alone, so that the same programs run on a GPU and on the tests' stand-in for one."""

from __future__ import annotations

import ctypes

import numpy as np


class Device:
    """Opens libcuda.so.1 and makes a device's primary context current: that of `rank` mod the number of devices."""

    def __init__(self, rank: int = 0) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
        context, count = ctypes.c_void_p(), ctypes.c_int()
        self.must(self.cuda.cuInit(0))
        self.must(self.cuda.cuDeviceGetCount(ctypes.byref(count)))
        self.must(self.cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), rank % count.value))
        self.must(self.cuda.cuCtxSetCurrent(context))
        self.is_fake = hasattr(self.cuda, "fake_cuda_launches")

    @staticmethod
    def must(result: int) -> None:
        assert result == 0, f"CUDA error {result}"

    def empty(self, nbytes: int) -> Array:
        return Array(self, max(1, nbytes))

    def array(self, values: np.ndarray) -> Array:
        made = self.empty(values.nbytes)
        made.write(values)
        return made


class Array:
    """`nbytes` bytes of device memory, freed with the object."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self.device, self.nbytes = device, nbytes
        pointer = ctypes.c_uint64()
        device.must(device.cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(nbytes)))
        self.address = pointer.value

    def __del__(self) -> None:
        self.device.cuda.cuMemFree_v2(ctypes.c_uint64(self.address))

    def _copy(self, to: int, source: int, nbytes: int) -> None:
        copied = self.device.cuda.cuMemcpy(ctypes.c_uint64(to), ctypes.c_uint64(source), ctypes.c_size_t(nbytes))
        self.device.must(copied)
        self.device.must(self.device.cuda.cuCtxSynchronize())

    def write(self, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values)
        self._copy(self.address, data.ctypes.data, data.nbytes)

    def read(self, dtype: str = "u1") -> np.ndarray:
        out = np.empty(self.nbytes, np.uint8)
        self._copy(out.ctypes.data, self.address, self.nbytes)
        return out.view(dtype)
