"""What a model must offer so that its backward can be streamed without transformers.

A decoder layer may mix tokens only through one call of `attend`; everything else in it (norms, projections, MLP) treats
each row of the sequence alone. That one property is what chunking needs: the engine then runs the layer on a slice of
rows and answers `attend` with attention over all keys up to that slice. A model shows its layers and a row-wise head,
and calls its own `loss`, which the engine replaces on the instance while streaming is on; nothing else changes, and
without streaming the model runs as it is written.

Shapes: B batch, T tokens, C channels, H query heads, G key/value heads (H a multiple of G), D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...dist.errors import UndertowError


class Unsupported(UndertowError):
    """This call cannot be streamed; the engine catches it, says why once, and uses plain checkpointing."""


class Attend(Protocol):
    """Causal attention of the rows at hand; the engine's version also sees the keys of all earlier rows."""

    def __call__(
        self,
        q_BHTD: Tensor,
        k_BGTD: Tensor,
        v_BGTD: Tensor,
        *,
        positions: Tensor | None = None,
        scale: float | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Returns [B, H, T, D]. `scale` defaults to D ** -0.5; `window` w lets token i see keys i-w+1 … i.

        `positions` [B, T] or [1, T] marks packed documents: a position that is not its left neighbour's plus one
        starts a new document, and no token sees another document.
        """
        ...


class Ranks(Protocol):
    """Those whose rows meet in an `Attend` over ranks: a `ContextParallel`, for one."""

    @property
    def size(self) -> int: ...

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers, on every rank; collective."""
        ...


@runtime_checkable
class StreamableLayer(Protocol):
    """A decoder layer. Further tensor arguments are allowed when dimension 1 is T (they are sliced like x)."""

    def forward(self, x_BTC: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Returns [B, T, C]. Calls `attend` exactly once; `attend` must have a default for the plain path."""
        ...


@runtime_checkable
class StreamableModel(Protocol):
    """A decoder whose forward calls each layer once, in order, then `self.loss(x, labels, …)` when it has labels."""

    stream_layers: Sequence[nn.Module]

    def token_logits(self, x_NC: Tensor) -> Tensor:
        """Final norm and head, row by row: [N, C] (or [..., C]) to [N, V]."""
        ...

    def loss(self, x_BTC: Tensor, labels_BT: Tensor, num_items: Tensor | int | None = None) -> Tensor:
        """Cross-entropy of row t against `labels_BT[:, t]` (already shifted), -100 ignored; the mean over the other
        rows, or their sum divided by `num_items`. `plain_loss` is a ready body for it."""
        ...


def plain_loss(logits: Tensor, labels: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """The definition of `StreamableModel.loss`, with all logits in memory, computed in float32 at least."""
    rows = logits.flatten(0, -2)
    rows = rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows
    reduction = "mean" if num_items is None else "sum"
    total = F.cross_entropy(rows, labels.flatten(), ignore_index=-100, reduction=reduction)
    return total if num_items is None else total / num_items


def documents_of(positions: Tensor) -> Tensor:
    """[B, T] positions to [B, T] document numbers, counted from zero in each row."""
    starts = positions[:, 1:] != positions[:, :-1] + 1
    return F.pad(starts.long().cumsum(1), (1, 0))


def causal_attention(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    *,
    positions: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The plain `Attend`: scaled_dot_product_attention, with a T x T mask only where documents or a window need it."""
    gqa = q_BHTD.shape[1] != k_BGTD.shape[1]
    documents = None if positions is None else documents_of(positions)
    if window is None and (documents is None or not bool(documents.any())):
        return F.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, is_causal=True, scale=scale, enable_gqa=gqa)
    row = torch.arange(q_BHTD.shape[2], device=q_BHTD.device)
    mask = (row[:, None] >= row)[None, None]
    if window is not None:
        mask = mask & (row[:, None] - row < window)
    if documents is not None:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    return F.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, attn_mask=mask, scale=scale, enable_gqa=gqa)
