"""What an attention schedule computes beside attention: sums of results, and heads dealt and collected.

Parts of a result wait for each other and are summed at once (see `kernels.sum_parts`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...comms.ops import Ops
from ..kernels.sum_parts import add_parts_to, merge_parts_to

Tensors = Sequence[Tensor]


def _merge_lse(reads: Tensors, writes: Tensors) -> None:
    """out, lse of parts [N, B, H, E], [N, B, H] to those of their union; may write over the first.

    A merge knows nothing of batches, so these are more heads.
    """
    outs = [t.flatten(1, 2) for t in (writes[0], *reads[::2])]
    lses = [t.flatten(1) for t in (writes[1], *reads[1::2])]
    merge_parts_to(outs[0], lses[0], outs[1:], lses[1:])


def _add(reads: Tensors, writes: Tensors) -> None:
    """Sums of as many numbers as each group has; may write over the first group."""
    for at, write in enumerate(writes):
        add_parts_to(write, reads[at :: len(writes)])


def _split_heads(reads: Tensors, writes: Tensors) -> None:
    for part, write in zip(reads[0].chunk(len(writes), dim=2), writes):
        write.copy_(part)


def _join_heads(reads: Tensors, writes: Tensors) -> None:
    torch.cat(list(reads), dim=2, out=writes[0])


SUMS_AND_HEADS: Ops = {"merge_lse": _merge_lse, "add": _add, "split_heads": _split_heads, "join_heads": _join_heads}
