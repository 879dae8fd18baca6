"""A device's memory as one row of words, so that one operation reads at many addresses.

What is done tensor by tensor costs the training thread about a microsecond each, at every save. A tensor that begins at
the lowest of many addresses and ends behind the highest lets one `index_select` read at all of them. Nothing between
them is touched, so it does not matter what lies there; whoever reads keeps the memory at its addresses alive.
"""

from __future__ import annotations

import numpy as np
import torch

_storage_at = getattr(torch._C, "_construct_storage_from_data_pointer", None)


def row_of_words(begins: np.ndarray, nbytes: int, dtype: torch.dtype, device: torch.device) -> tuple:
    """(flat tensor of `dtype`, int64 array of the shape of `begins`): where in it the `nbytes` at each address begin.
    `RuntimeError` where torch cannot, or where an address is not a whole number of elements from the others."""
    base = int(begins.min())
    places, rest = np.divmod(begins - base, dtype.itemsize)
    if _storage_at is None or rest.any() or base % dtype.itemsize:
        raise RuntimeError(f"addresses from {base:#x} do not make a row of {dtype}")
    storage = _storage_at(base, device, int(begins.max()) - base + nbytes)
    return torch.empty(0, dtype=dtype, device=device).set_(storage), places
