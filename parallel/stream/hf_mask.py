"""What a Hugging Face model's own mask function says, asked at a few queries instead of written out as T x T.

transformers hands each attention interface a mask function. Streaming needs to know which keys a query sees, as the
intervals of `layout`, so a dozen queries of every row are put to that function, and their answers are compared with the
intervals that the caller's arguments mean. A model that means something else (a mask function of its own, a window that
no layer names, holes) is found out here, and refused or followed, instead of being trained with the wrong mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .layout import Layout
from .protocol import Unsupported

SAMPLES = 12


@dataclass
class Witness:
    """What the model's own mask function says about sampled queries: keys [low, high) for each, or None for a mask
    that is no interval. Stands where the attention mask would be."""

    sampled: dict[tuple[int, int], tuple[int, int] | None]
    _agreed: dict[int | None, int | None] = field(default_factory=dict)

    def window(self, layout: Layout, claimed: int | None) -> int | None:
        """The sliding window that explains the samples: the one the layer claims, or one that only the mask knows."""
        if claimed not in self._agreed:
            self._agreed[claimed] = self._explain(layout, claimed)
        return self._agreed[claimed]

    def _explain(self, layout: Layout, claimed: int | None) -> int | None:
        for window in dict.fromkeys((claimed, None, self.widest)):
            if self.fits(layout, window):
                return window
        raise Unsupported("the attention mask is not causal, sliding, packed or padded in a form that is known")

    @property
    def widest(self) -> int | None:
        """The most keys that a sampled query sees: the window, if there is one."""
        return max((seen[1] - seen[0] for seen in self.sampled.values() if seen is not None), default=0) or None

    def fits(self, layout: Layout, window: int | None) -> bool:
        return all(self._fits(layout, at, seen, window) for at, seen in self.sampled.items())

    @staticmethod
    def _fits(layout: Layout, at: tuple[int, int], seen: tuple[int, int] | None, window: int | None) -> bool:
        if seen is None:
            return False
        segment = next(s for s in layout.rows[at[0]] if s.start <= at[1] < s.stop)
        padding = segment.keys_stop < segment.stop
        return padding or layout.sees(*at, window) == seen or seen[0] == seen[1] == layout.sees(*at, window)[0]


def witness_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Any,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: Any = "cpu",
    **_: Any,
) -> Witness:
    """Registered as the mask interface: samples the mask function instead of writing the mask."""
    if use_vmap or q_length != kv_length:
        raise Unsupported("the model adds a mask function of its own")
    queries = torch.linspace(0, q_length - 1, min(SAMPLES, q_length), device=device).long().unique()
    row = torch.arange(batch_size, device=device)[:, None, None, None]
    head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
    keys = torch.arange(kv_length, device=device)[None, None, None, :]
    seen = mask_function(row, head, queries[None, None, :, None], keys)
    seen = seen.expand(batch_size, 1, queries.shape[0], kv_length)[:, 0]
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, :]
    count = seen.sum(-1)
    low = seen.int().argmax(-1)
    high = torch.where(count > 0, kv_length - seen.flip(-1).int().argmax(-1), low)
    facts = torch.stack((queries.expand(batch_size, -1), low, high, count), -1).tolist()
    return Witness(
        {(b, query): (a, z) if z - a == n else None for b, per_row in enumerate(facts) for query, a, z, n in per_row}
    )
