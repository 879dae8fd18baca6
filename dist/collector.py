"""Holds Python's garbage collector off while it must not run.

A collection takes its time from whatever is being timed, and what it frees may ask a GPU, which a capture of a CUDA
graph forbids.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Nothing is collected inside, in any thread; what was on before is on again afterwards."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
