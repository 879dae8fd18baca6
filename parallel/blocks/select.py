"""Which backends a block may be run by, in a fixed order of speed, of which `choose` takes the first.

The order is what one H100 measured (see docs/stream-backprop.md): cuDNN, FlashAttention-2, then plain tiles; on a CPU
torch's flash kernel, then plain tiles. `backend("tiled")` asks for one by name. `candidates` are those that are worth a
measurement (see `measured`): also the memory-efficient kernel where no flash kernel takes the call (float32), and
with `compiled`, FlexAttention where cuDNN has no kernel and the block is large enough for a compilation to pay.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from ...dist.errors import UserError
from . import cpu_flash, cudnn, efficient, flash2, flex, reference, tiled
from .types import Backend

ORDER = cast(tuple[Backend, ...], (cudnn, flash2, cpu_flash, tiled))
_NAMED = cast(tuple[Backend, ...], (efficient, flex, reference))
ALL = {module.NAME: module for module in (*ORDER, *_NAMED)}
COMPILED_PAIRS = 1 << 20  # fewest (query, key) pairs for which FlexAttention is compiled and tried


def backend(name: str) -> Backend:
    """The backend called `name`; `UserError` for a name that does not exist."""
    if name not in ALL:
        raise UserError(f"no attention backend is called {name!r}", expected=f"one of {', '.join(ALL)}")
    return ALL[name]


def choose(q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, causal: bool, window: int | None) -> Backend:
    """The fastest backend that accepts this call; `tiled` accepts all."""
    return next(b for b in ORDER if b.supports(q_BHLD, k_BGLD, v_BGLE, causal=causal, window=window))


def candidates(
    q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, causal: bool, window: int | None, compiled: bool = False
) -> list[Backend]:
    """All that are worth a measurement for this call; first the one that `choose` takes."""
    given, how = (q_BHLD, k_BGLD, v_BGLE), {"causal": causal, "window": window}
    found = [choose(*given, **how)]
    fast = [b for b in (cudnn, flash2) if b.supports(*given, **how)]
    if not fast and efficient.supports(*given, **how):  # it repeats key heads, and is slower than those
        fast.append(efficient)
    large = q_BHLD.shape[2] * k_BGLD.shape[2] >= COMPILED_PAIRS
    if compiled and large and cudnn not in fast and flex.supports(*given, **how):
        fast.append(flex)
    return found + [b for b in cast(list[Backend], fast) if b is not found[0]]
