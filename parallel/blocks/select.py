"""Which backend runs a block: the first in a fixed order of speed that accepts the call.

The order is what one H100 measured (see docs/stream-backprop.md): cuDNN, FlashAttention-2, then plain tiles; on a CPU
torch's flash kernel, then plain tiles. `backend("tiled")` asks for one by name; `efficient` (float32 on CUDA) is had by
name only.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from ...dist.errors import UserError
from . import cpu_flash, cudnn, efficient, flash2, reference, tiled
from .types import Backend

ORDER = cast(tuple[Backend, ...], (cudnn, flash2, cpu_flash, tiled))
ALL = {module.NAME: module for module in (*ORDER, cast(Backend, efficient), cast(Backend, reference))}


def backend(name: str) -> Backend:
    """The backend called `name`; `UserError` for a name that does not exist."""
    if name not in ALL:
        raise UserError(f"no attention backend is called {name!r}", expected=f"one of {', '.join(ALL)}")
    return ALL[name]


def choose(q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, causal: bool, window: int | None) -> Backend:
    """The fastest backend that accepts this call; `tiled` accepts all."""
    return next(b for b in ORDER if b.supports(q_BHLD, k_BGLD, v_BGLE, causal=causal, window=window))
