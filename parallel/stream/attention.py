"""Attention of one chunk of queries against all keys of its layer so far, with gradients that add up over chunks.

Chunks run backward in descending order, so when chunk i is differentiated, every later chunk has already added its
share to dK and dV of chunk i's rows. `_ChunkAttention.backward` adds the shares for earlier rows to the layer's
float32 buffers and returns the now complete rows of chunk i to autograd, which carries them into x and the weights in
the same pass: no second backward for keys and values. (StreamBP, Luo et al. 2025, recomputes K and V of the whole
prefix for every chunk instead.)

Legend: B batch, H query heads, G key/value heads, C rows of the chunk, T of the sequence, D and E head dims.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..blocks import flash2, select
from ..merge import empty_like, lse_dtype
from .layout import Layout, Span

KEY_TILE = 16384  # keys per call of a backward kernel


@dataclass(frozen=True)
class Mask:
    """What a chunk attends with: the layout of the batch, the chunk's rows [start, stop), scale and window."""

    layout: Layout
    start: int
    stop: int
    scale: float
    window: int | None
    backend: str | None = None

    def pick(self, q: Tensor, k: Tensor, v: Tensor, causal: bool):
        if self.backend is not None:
            return select.backend(self.backend)
        return select.choose(q, k, v, causal=causal, window=self.window if causal else None)


def attend_forward(q_BHCD: Tensor, k_BGTD: Tensor, v_BGTE: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """out [B, H, C, E] and lse [B, H, C] of the chunk; k and v hold at least the rows before `mask.stop`."""
    if mask.layout.is_dense:
        k0 = 0 if mask.window is None else max(0, mask.start - mask.window + 1)
        q, k, v = _widened(q_BHCD, k_BGTD[:, :, k0 : mask.stop], v_BGTE[:, :, k0 : mask.stop])
        out, lse = mask.pick(q, k, v, True).forward(q, k, v, scale=mask.scale, causal=True, window=mask.window)
        return out.to(q_BHCD.dtype), lse
    out, lse = empty_like(q_BHCD, v_BGTE.shape[3])
    for group in _groups(mask, q_BHCD, k_BGTD, v_BGTE):
        rows, keys = _slices(group, mask)
        part = _packed(group, mask, *_widened(q_BHCD[rows], k_BGTD[keys], v_BGTE[keys]))
        out[rows], lse[rows] = part
    return out, lse


def _widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """On a CPU low precision is computed in float32: torch's kernel is no slower so, five times faster in backward,
    and parts that are merged or added are not rounded first. Elsewhere the tensors themselves."""
    low = tensors[0].device.type == "cpu" and tensors[0].dtype in (torch.bfloat16, torch.float16)
    return tuple(t.float() for t in tensors) if low else tensors


Share = Callable[[slice, slice, Tensor, Tensor], None]


def attend_backward(
    dout_BHCE: Tensor,
    q_BHCD: Tensor,
    k_BGTD: Tensor,
    v_BGTE: Tensor,
    out_BHCE: Tensor,
    lse_BHC: Tensor,
    mask: Mask,
    add: Share,
) -> Tensor:
    """dq; calls `add(batch rows, key rows, dk, dv)` for each block with what the chunk adds to those keys' gradients.

    Kernels return dk and dv of all their keys (some of them, once per query head), so the prefix is taken in tiles of
    `KEY_TILE` keys: with the merged out and lse each tile's gradients are exact by themselves.
    """
    if mask.layout.is_dense:
        k0 = 0 if mask.window is None else max(0, mask.start - mask.window + 1)
        tensors = dout_BHCE, q_BHCD, out_BHCE, lse_BHC
        return _block_backward(mask, tensors, k_BGTD, v_BGTE, slice(None), k0, mask.stop, True, add)
    dq = torch.zeros_like(q_BHCD)
    for group in _groups(mask, q_BHCD, k_BGTD, v_BGTE):
        rows, keys = _slices(group, mask)
        tensors = dout_BHCE[rows], q_BHCD[rows], out_BHCE[rows], lse_BHC[rows]
        if len(group) == 1:
            span = group[0]
            dq[rows] = _block_backward(mask, tensors, k_BGTD, v_BGTE, rows[0], span.k0, span.k1, span.causal, add)
        else:
            dq[rows], dk, dv = _packed_backward(group, mask, *tensors, k_BGTD[keys], v_BGTE[keys])
            add(rows[0], keys[2], dk, dv)
    return dq


def _block_backward(
    mask: Mask,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    k_BGTD: Tensor,
    v_BGTE: Tensor,
    rows: slice,
    k0: int,
    k1: int,
    causal: bool,
    add: Share,
) -> Tensor:
    dout, q, out, lse = (*_widened(*tensors[:3]), tensors[3])
    tiles = _tiles(q.shape[2], k0, k1, causal, mask.window)
    dq = None
    for a, b, diagonal in tiles:
        k, v = _widened(k_BGTD[rows, :, a:b], v_BGTE[rows, :, a:b])
        backend = mask.pick(q, k, v, diagonal)
        window = mask.window if diagonal else None
        part, dk, dv = backend.backward(dout, q, k, v, out, lse, scale=mask.scale, causal=diagonal, window=window)
        add(rows, slice(a, b), dk, dv)
        if len(tiles) == 1:
            return part.to(tensors[1].dtype)
        dq = part.to(lse.dtype) if dq is None else dq.add_(part)
        del k, v, dk, dv, part
    assert dq is not None
    return dq.to(tensors[1].dtype)


def _tiles(queries: int, k0: int, k1: int, causal: bool, window: int | None) -> list[tuple[int, int, bool]]:
    """Key ranges (start, stop, causal) for one block of queries: the square diagonal, then the prefix in tiles."""
    if window is not None and causal:
        return [(k0, k1, True)]
    end = k1 - queries if causal else k1
    prefix = [(a, min(a + KEY_TILE, end), False) for a in range(k0, end, KEY_TILE)]
    return [(end, k1, True), *prefix] if causal else prefix


def _groups(mask: Mask, q: Tensor, k: Tensor, v: Tensor) -> list[list[Span]]:
    """Spans to run together: neighbours in one row where a packed kernel exists, else each alone."""
    spans = mask.layout.spans(mask.start, mask.stop, mask.window)
    packs = mask.backend in (None, flash2.NAME) and flash2.supports(q, k, v, causal=True, window=mask.window)
    groups: list[list[Span]] = []
    for span in spans:
        last = groups[-1][-1] if groups else None
        adjacent = last and (last.row, last.q1, last.k1, last.causal) == (span.row, span.q0, span.k0, span.causal)
        if packs and adjacent and last and last.k1 - last.k0 <= KEY_TILE:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def _slices(group: list[Span], mask: Mask) -> tuple[Any, Any]:
    first, last = group[0], group[-1]
    row = slice(first.row, first.row + 1)
    everything = slice(None)
    queries = slice(first.q0 - mask.start, last.q1 - mask.start)
    return (row, everything, queries), (row, everything, slice(first.k0, last.k1))


def _bounds(group: list[Span], device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    """Cumulative starts of queries and keys, int32 on the device, and the longest of each."""
    q, k = [0], [0]
    for span in group:
        q.append(q[-1] + span.q1 - span.q0)
        k.append(k[-1] + span.k1 - span.k0)
    both = torch.tensor([q, k], dtype=torch.int32).to(device, non_blocking=True)
    longest = max(s.q1 - s.q0 for s in group), max(s.k1 - s.k0 for s in group)
    return both[0], both[1], *longest


def _packed(group: list[Span], mask: Mask, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    causal = group[0].causal
    how = {"scale": mask.scale, "causal": causal, "window": mask.window if causal else None}
    if len(group) == 1:
        return mask.pick(q, k, v, causal).forward(q, k, v, **how)
    out, lse = flash2.forward_packed(q[0], k[0], v[0], *_bounds(group, q.device), **how)
    return out.unsqueeze(0), lse.unsqueeze(0)


def _packed_backward(
    group: list[Span], mask: Mask, dout: Tensor, q: Tensor, out: Tensor, lse: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    causal = group[0].causal
    how = {"scale": mask.scale, "causal": causal, "window": mask.window if causal else None}
    bounds = _bounds(group, q.device)
    dq, dk, dv = flash2.backward_packed(dout[0], q[0], k[0], v[0], out[0], lse[0], *bounds, **how)
    return dq.unsqueeze(0), dk.unsqueeze(0), dv.unsqueeze(0)


class KeyValues:
    """Keys and values of one layer for all T rows, and their gradients in float32 while backward runs.

    Memory is [B, T, G, D], seen as [B, G, T, D]: the order in which projections write.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self._dk: Tensor | None = None
        self._dv: Tensor | None = None

    def write(self, start: int, k_BGCD: Tensor, v_BGCE: Tensor) -> None:
        if self.k is None or self.v is None:
            self.k, self.v = (self._room(t, t.dtype) for t in (k_BGCD, v_BGCE))
        stop = start + k_BGCD.shape[2]
        self.k[:, :, start:stop] = k_BGCD
        self.v[:, :, start:stop] = v_BGCE

    def _room(self, t: Tensor, dtype: torch.dtype, zero: bool = False) -> Tensor:
        make = torch.zeros if zero else torch.empty
        return make(t.shape[0], self.tokens, t.shape[1], t.shape[3], dtype=dtype, device=t.device).transpose(1, 2)

    def _sums(self) -> tuple[Tensor, Tensor]:
        assert self.k is not None and self.v is not None
        if self._dk is None or self._dv is None:
            self._dk, self._dv = (self._room(t, lse_dtype(t.dtype), zero=True) for t in (self.k, self.v))
        return self._dk, self._dv

    def add_gradients(self, rows: slice, keys: slice, dk: Tensor, dv: Tensor) -> None:
        for total, share in zip(self._sums(), (dk, dv)):
            total[rows, :, keys] += share

    def gradients(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """dk and dv of rows [start, stop), in the type of k; complete once all chunks from `start` on have added."""
        dk, dv = self._sums()
        assert self.k is not None and self.v is not None
        return dk[:, :, start:stop].to(self.k.dtype), dv[:, :, start:stop].to(self.v.dtype)


def with_sinks(out_BHCE: Tensor, lse_BHC: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with one more key per head, of score `sinks_H` and value zero (gpt-oss)."""
    joint = torch.logaddexp(lse_BHC, sinks_H.to(lse_BHC.dtype)[None, :, None])
    return (out_BHCE * torch.exp(lse_BHC - joint).unsqueeze(-1)).to(out_BHCE.dtype), joint


class ChunkAttention(torch.autograd.Function):
    """out [B, H, C, E] of a chunk with gradients for q, k, v and sinks.

    `keys` holds all rows of the layer, or is None when the chunk is the whole sequence. `known` is (out, lse) kept
    from the forward pass, so that no attention runs here at all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        mask: Mask,
        keys: KeyValues | None,
        known: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        all_k, all_v = (k, v) if keys is None else (keys.k, keys.v)
        assert all_k is not None and all_v is not None
        if known is None:
            out, lse = attend_forward(q, all_k, all_v, mask)
            if sinks is not None:
                out, lse = with_sinks(out, lse, sinks)
        else:
            out, lse = known
        ctx.mask, ctx.keys = mask, keys
        ctx.save_for_backward(q, out, lse, sinks, *((k, v) if keys is None else ()))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, out, lse, sinks, *own = ctx.saved_tensors
        mask, keys = ctx.mask, ctx.keys
        k, v = own if keys is None else (keys.k, keys.v)
        if keys is None and mask.layout.is_dense:
            found: list[tuple[Tensor, Tensor]] = []
            dq = attend_backward(dout, q, k, v, out, lse, mask, lambda _, __, dk, dv: found.append((dk, dv)))
            dk, dv = (t.to(k.dtype) for t in found[0])
        else:
            keys = keys or _holding(k, v)
            dq = attend_backward(dout, q, k, v, out, lse, mask, keys.add_gradients)
            dk, dv = keys.gradients(mask.start, mask.stop)
        dsinks = None
        if sinks is not None:
            delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
            weight = torch.exp(sinks.to(lse.dtype)[None, :, None] - lse)
            dsinks = -(weight * delta).sum((0, 2)).to(sinks.dtype)
        return dq, dk, dv, dsinks, None, None, None


def _holding(k: Tensor, v: Tensor) -> KeyValues:
    keys = KeyValues(k.shape[2])
    keys.k, keys.v = k, v
    return keys
