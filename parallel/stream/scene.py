"""What the layers of one pass share, and what a layer is answered when it asks for attention of one chunk.

A layer's own forward is run up to three times for a chunk: to write its keys and values, to get its output, and with
autograd. What its attention call means differs, and the layer must not notice; so the three purposes are told apart
here, behind one function that looks like attention.

Legend: B batch, H query heads, G key/value heads, C rows of the chunk, D and E head dims.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .attention import ChunkAttention, KeyValues, Mask, attend_forward, with_sinks
from .layout import Layout
from .protocol import Attend, Unsupported
from .store import Bounds, Slot


class KeysReady(BaseException):
    """Leaves a layer once its keys and values are written; a BaseException, so that no `except Exception` stops it."""


Runner = Callable[[nn.Module, "Answer", tuple, dict], tuple[Tensor, tuple[Tensor, ...]]]


@dataclass
class Scene:
    """What all layers of one forward share. `run(layer, attend, args, kwargs)` calls a layer's own forward on a chunk
    and returns its output [B, C, d] and further row-wise outputs ([B, C, …] or [B * C, …]) that may carry gradients."""

    layout: Layout
    bounds: Bounds
    run: Runner
    attention_backend: str | None = None
    replay_random: bool = False
    autocast: tuple[bool, torch.dtype] = (False, torch.bfloat16)
    out_of_memory: Callable[[], None] = lambda: None  # told before the error of a backward goes on
    unread: dict[int, frozenset[str]] = field(default_factory=dict)  # by id of a layer: see `unread`, kept over passes
    attend: Attend | None = None  # in place of attention here: ring attention, for one

    def precision(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The autocast state of the forward call. Its weight cache is off: a cast cached without gradients must not
        be met again with them."""
        enabled, dtype = self.autocast
        if not enabled:
            return torch.autocast(device.type, enabled=False) if _autocast_on(device) else contextlib.nullcontext()
        return torch.autocast(device.type, dtype=dtype, enabled=True, cache_enabled=False)


def _autocast_on(device: torch.device) -> bool:
    return torch.is_autocast_enabled(device.type)


@dataclass
class Answer:
    """The `Attend` that a layer is given for one chunk. `purpose`: 'keys', 'forward' or 'gradient'; where the scene has
    an attention of its own, `instead` answers, whatever the purpose."""

    scene: Scene
    purpose: str
    chunk: int
    keys: KeyValues | None
    slot: Slot | None = None
    instead: Callable[..., Tensor] | None = None
    calls: int = 0
    returns_tuple: bool = False  # set by the adapter: the layer wraps its output in a tuple

    def __call__(
        self,
        q_BHCD: Tensor,
        k_BGCD: Tensor,
        v_BGCE: Tensor,
        *,
        positions: Tensor | None = None,
        scale: float | None = None,
        window: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise Unsupported("the layer calls attention more than once")
        if self.scene.autocast[0]:  # as scaled_dot_product_attention does under autocast
            q_BHCD, k_BGCD, v_BGCE = (t.to(self.scene.autocast[1]) for t in (q_BHCD, k_BGCD, v_BGCE))
        if self.instead is not None:  # its rows may be those of several ranks
            if sinks is not None:
                raise Unsupported("attention sinks, which an attention of one's own is not told of")
            return self.instead(q_BHCD, k_BGCD, v_BGCE, positions=positions, scale=scale, window=window)
        start, stop = self.scene.bounds[self.chunk]
        if q_BHCD.shape[2] != stop - start or k_BGCD.shape[2] != stop - start:
            raise Unsupported(
                f"attention got {q_BHCD.shape[2]} queries and {k_BGCD.shape[2]} keys for {stop - start} rows"
            )
        factor = float(q_BHCD.shape[-1]) ** -0.5 if scale is None else scale
        mask = Mask(self.scene.layout, start, stop, factor, window, self.scene.attention_backend)
        if self.keys is not None:
            self.keys.write(start, k_BGCD.detach(), v_BGCE.detach())
        if self.purpose == "keys":
            raise KeysReady
        if self.purpose == "gradient":
            kept = self.slot.attention(self.chunk) if self.slot is not None else None
            known = None if kept is None else (kept[0], kept[1])
            return ChunkAttention.apply(q_BHCD, k_BGCD, v_BGCE, sinks, mask, self.keys, known)  # type: ignore
        all_k, all_v = (k_BGCD, v_BGCE) if self.keys is None else (self.keys.k, self.keys.v)
        assert all_k is not None and all_v is not None
        out, lse = attend_forward(q_BHCD, all_k, all_v, mask)
        if sinks is not None:
            out, lse = with_sinks(out, lse, sinks)
        if self.slot is not None and self.slot.keeps_attention:
            self.slot.keep_attention(self.chunk, out, lse)
        return out
