"""What every block attention backend offers, and how its arguments are read.

A backend is a module with three functions: `supports`, `forward`, `backward`. The mask is described, never given as a
tensor: `causal` aligns the last query with the last key (query i of Lq stands at position Lk - Lq + i), which is the
alignment of a chunk of queries against its prefix; torch's own `is_causal` aligns the first ones instead. `backward`
takes `out` and `lse` as they are after merging with other blocks, which makes its three gradients this block's exact
share of the whole.

Legend: B batch, H query heads, G key/value heads (H % G == 0), Lq and Lk rows, D head dim of q and k, E that of v.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Backend(Protocol):
    """One implementation. All tensors of one call share device and dtype, except `lse` (see `merge.lse_dtype`)."""

    NAME: str

    def supports(self, q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, causal: bool, window: int | None) -> bool:
        """Whether `forward` and `backward` accept such a call."""
        ...

    def forward(
        self, q_BHLD: Tensor, k_BGLD: Tensor, v_BGLE: Tensor, *, scale: float, causal: bool, window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns out [B, H, Lq, E] and lse [B, H, Lq]. `window` w (only with `causal`): position p sees p-w+1 … p.

        `causal` needs Lq <= Lk. Lq and Lk are at least 1, so no row is empty.
        """
        ...

    def backward(
        self,
        dout_BHLE: Tensor,
        q_BHLD: Tensor,
        k_BGLD: Tensor,
        v_BGLE: Tensor,
        out_BHLE: Tensor,
        lse_BHL: Tensor,
        *,
        scale: float,
        causal: bool,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns (dq, dk, dv), shaped as q, k, v, for the merged `out` and `lse`."""
        ...
