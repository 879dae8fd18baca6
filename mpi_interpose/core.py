"""The handle-free core from Python: normalise, describe, pack and unpack an IR given as text.

Used by `undertow mpi explain` and by the tests; a program under the preload never comes here.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

from .compile import core_library
from .errors import InterposeError


@lru_cache(maxsize=4)
def load(path: Path | None = None) -> ctypes.CDLL:
    """The core's library with its prototypes set; built on first use."""
    lib = ctypes.CDLL(str(path or core_library()))
    text, pointer, integer = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("parse", text, [text]),
        ("normalise", text, [text]),
        ("describe", text, [text, integer, integer]),
        ("kernels", text, []),
        ("processor", text, []),
        ("plan", pointer, [text, integer]),
        ("free", None, [pointer]),
        ("size", integer, [pointer]),
        ("pack", None, [pointer, integer, pointer, pointer]),
        ("unpack", None, [pointer, integer, pointer, pointer]),
        ("walk", None, [pointer, ctypes.c_int, integer, pointer, pointer, integer, integer]),
    ):
        function = getattr(lib, f"undertow_core_{name}")
        function.restype, function.argtypes = result, arguments
    return lib


def _text(answer: bytes) -> str:
    decoded = answer.decode()
    if decoded.startswith("!"):
        raise InterposeError(f"the core cannot use this datatype: {decoded[1:]}")
    return decoded


def normalise(ir: str) -> str:
    """The canonical form, as text."""
    return _text(load().undertow_core_normalise(ir.encode()))


def parse(ir: str) -> str:
    """The same text as the core prints it; InterposeError when it is not an IR."""
    return _text(load().undertow_core_parse(ir.encode()))


def describe(ir: str, lb: int, extent: int) -> str:
    """One line: class, sizes and copy operations of the plan."""
    return _text(load().undertow_core_describe(ir.encode(), lb, extent))


def processor() -> str:
    """The kind of this machine's processor, as measured tables name it (csrc/core/processor.hh)."""
    return load().undertow_core_processor().decode()


class Plan:
    """A plan that `lib` made of an IR and the bytes from element to element, and frees with this object."""

    def __init__(self, lib: ctypes.CDLL, ir: str, extent: int) -> None:
        self._lib = lib
        self._plan = lib.undertow_core_plan(ir.encode(), extent)
        if not self._plan:
            raise InterposeError(f"the core cannot plan this datatype: {ir[:80]}")

    def __del__(self) -> None:
        if getattr(self, "_plan", None):
            self._lib.undertow_core_free(self._plan)

    @property
    def size(self) -> int:
        return self._lib.undertow_core_size(self._plan)


class CorePlan(Plan):
    """A plan of the core; addresses are integers, the caller keeps the buffers alive."""

    def __init__(self, ir: str, extent: int, library: Path | None = None) -> None:
        super().__init__(load(library), ir, extent)

    def pack(self, count: int, source: int, target: int) -> None:
        self._lib.undertow_core_pack(self._plan, count, source, target)

    def unpack(self, count: int, source: int, target: int) -> None:
        self._lib.undertow_core_unpack(self._plan, count, source, target)

    def walk(self, unpacking: bool, count: int, source: int, target: int, start: int, stop: int) -> None:
        self._lib.undertow_core_walk(self._plan, int(unpacking), count, source, target, start, stop)
