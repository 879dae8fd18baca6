"""The device side from Python: pack and unpack between device addresses, without MPI; for tests and benchmarks.

A program under the preload never comes here. Addresses are integers (`tensor.data_ptr()`, `array.data.ptr`, a
CUdeviceptr); the caller keeps the memory alive, and has initialised CUDA (any library that made a context will do).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from .compile import CSRC, Unit, cache_folder, core_units, digest_of, link
from .core import Plan
from .errors import InterposeError
from .gpu_build import gpu_units

MEMORY = ("host", "device", "pinned", "managed")
PATHS = ("auto", "direct", "staged")
COUNTERS = ("launches", "pieces", "copies", "bytes", "slabs", "code_loads", "ptx_loads", "load_us")


@lru_cache(maxsize=1)
def library() -> Path:
    """Core and device side as one shared library, built into the cache on first use."""
    units = [*core_units(), Unit("capi", CSRC / "core" / "capi.cc"), *gpu_units()]
    units.append(Unit("gpu_capi", CSRC / "gpu" / "capi.cc"))
    target = cache_folder() / f"libundertow_mpi_gpu-{digest_of(units)}.so"
    return target if target.exists() else link(units, (), target, ("-ldl", "-lpthread"))


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library()))
    text, pointer, integer, small = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    for name, result, arguments in (
        ("core_plan", pointer, [text, integer]),
        ("core_free", None, [pointer]),
        ("core_size", integer, [pointer]),
        ("gpu_possible", small, []),
        ("gpu_memory", small, [pointer]),
        ("gpu_host_path", None, [small]),
        ("gpu_ring", None, [integer]),
        ("gpu_use_kernel", text, [text]),
        ("gpu_serves", small, [pointer, integer, ctypes.c_uint64, ctypes.c_uint64, small, text]),
        ("gpu_pack", text, [pointer, integer, pointer, pointer]),
        ("gpu_unpack", text, [pointer, integer, pointer, pointer, integer]),
        ("gpu_enqueue", text, [pointer, integer, pointer, pointer, small, pointer]),
        ("gpu_group_open", pointer, []),
        ("gpu_group_close", text, [pointer]),
        ("gpu_slab_get", pointer, [integer, pointer]),
        ("gpu_slab_put", None, [pointer, integer]),
        ("gpu_counters", None, [ctypes.POINTER(integer)]),
        ("gpu_direct_up_to", integer, [text, small, integer]),
        ("gpu_error", text, []),
        ("gpu_describe", text, [pointer, integer, ctypes.c_uint64, ctypes.c_uint64]),
    ):
        function = getattr(lib, f"undertow_{name}")
        function.restype, function.argtypes = result, arguments
    return lib


def memory(address: int) -> str:
    """What the driver says the address is: 'host', 'device', 'pinned' or 'managed'."""
    return MEMORY[load().undertow_gpu_memory(address)]


def host_path(name: str) -> None:
    """How kernels reach pinned memory from now on: 'direct', 'staged', or 'auto' (direct for small messages)."""
    load().undertow_gpu_host_path(PATHS.index(name))


def ring(half_bytes: int) -> None:
    """Staged messages of more than two halves go through a ring of two halves of device scratch; 0: never."""
    load().undertow_gpu_ring(half_bytes)


def use_kernel(name: str = "") -> None:
    """The kernel of the next launches of one piece where it serves, as 'nest 1x128'; '' as the library chooses.

    For measurements; the names are those of csrc/gpu/choose.hh, and InterposeError lists them.
    """
    _check(load().undertow_gpu_use_kernel(name.encode()))


def direct_up_to(text: str, packing: bool, block: int) -> int:
    """The most bytes of a message that a kernel moves over the bus itself, by a text as csrc/policy/gpu.txt is one."""
    found = load().undertow_gpu_direct_up_to(text.encode(), int(packing), block)
    if found < 0:
        raise InterposeError(f"paths of the device: {load().undertow_gpu_error().decode()}")
    return found


def counters() -> dict[str, int]:
    """So far: kernel launches, pieces in them, copies, bytes packed and pinned slabs handed out; in how many contexts
    the kernels were loaded as machine code and as PTX, and the microseconds that took."""
    values = (ctypes.c_int64 * len(COUNTERS))()
    load().undertow_gpu_counters(values)
    return dict(zip(COUNTERS, values))


@contextmanager
def group() -> Iterator[None]:
    """Packs and unpacks inside are only queued; they share launches and are complete at the end of the block."""
    lib = load()
    opened = lib.undertow_gpu_group_open()
    try:
        yield
    finally:
        error = lib.undertow_gpu_group_close(opened)
    _check(error)


def _check(error: bytes | None) -> None:
    if error is not None:
        raise InterposeError(f"device pack: {error.decode()}")


class GpuPlan(Plan):
    """A plan for device memory. `ir` is the text form (see spec.read), `extent` the bytes from element to element."""

    def __init__(self, ir: str, extent: int) -> None:
        super().__init__(load(), ir, extent)

    def pack(self, count: int, source: int, target: int) -> None:
        """count elements at `source` to count * size bytes at `target`; complete on return, either may be host."""
        _check(self._lib.undertow_gpu_pack(self._plan, count, source, target))

    def unpack(self, count: int, source: int, target: int, size: int | None = None) -> None:
        """The reverse; with `size` only that many bytes have arrived."""
        _check(self._lib.undertow_gpu_unpack(self._plan, count, source, target, size or count * self.size))

    def enqueue(self, count: int, user: int, packed: int, packing: bool, stream: int) -> None:
        """Queue a pack or unpack between device (or pinned) addresses on `stream`, a CUstream; returns at once."""
        _check(self._lib.undertow_gpu_enqueue(self._plan, count, user, packed, int(packing), stream))

    def served_by(self, kernel: str, count: int, user: int, packed: int, packing: bool) -> bool:
        """Whether this is one piece that the kernel named as for `use_kernel` serves; needs no device."""
        found = self._lib.undertow_gpu_serves(self._plan, count, user, packed, int(packing), kernel.encode())
        if found < 0:
            raise InterposeError(f"device pack: {self._lib.undertow_gpu_error().decode()}")
        return bool(found)

    def describe(self, count: int, user: int, packed: int) -> str:
        """The pieces a launch would get, one line each; needs no device."""
        return self._lib.undertow_gpu_describe(self._plan, count, user, packed).decode()
