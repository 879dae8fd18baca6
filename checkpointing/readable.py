"""Whether the stored objects can be read again, asked at the first save and not only when a restore needs them.

Objects are pickled by `torch.save` and read by torch's restricted unpickler, which knows tensors and plain containers.
What else a pickle names is listed from its bytes, without loading it; a program's own types must be allowed by name.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pickle import UnpicklingError

import torch

from ..dist.log import get_logger

log = get_logger(__name__)


class Readable:
    """Warns once for each object whose pickle a restore with `allow_types` would refuse."""

    def __init__(self, allow_types: Sequence[type]) -> None:
        self._allowed = {f"{each.__module__}.{each.__qualname__}" for each in allow_types}
        self._seen: set[str] = set()

    def look(self, key: str, pickled: bytes) -> None:
        """The first time, list what object `key` names; any thread. Takes a second for some ten megabytes of pickle."""
        if key in self._seen or not pickled:
            return
        self._seen.add(key)
        try:
            named = set(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(pickled))) - self._allowed
        except UnpicklingError as error:
            named = {f"what torch's restricted unpickler does not know ({error})"}
        if named:
            log.warning(
                "the object '%s' is saved, but restore() will refuse it: it holds %s; expected plain values and "
                "tensors; to mend it: pass such classes in allow_types=[…] of Checkpointer (functions to "
                "torch.serialization.add_safe_globals), or let state_dict() return plain values",
                key,
                ", ".join(sorted(named)),
            )
