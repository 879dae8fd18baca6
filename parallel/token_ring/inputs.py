"""What a caller of `token_ring_attention` may pass: every wrong value is named, with what it should be. Pure.

Whatever passes here is alike on all ranks or is compared with what the layout gives this rank (`api`), so that a
mistake is an error on the rank that made it, before any message.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...dist.errors import UserError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Sizes = Sequence[int]


def refuse_what_kernels_lack(given: Mapping[str, Any]) -> None:
    """`given`: options by name; None, and the number 0, mean that they are off."""
    for name, value in given.items():
        if value is None or (isinstance(value, (int, float)) and value == 0):
            continue
        shown = f"{name} {value:g}" if isinstance(value, (int, float)) else name
        raise UserError(
            f"{shown} in token_ring_attention",
            expected="no dropout, no soft cap and no ALiBi: the block kernels have none of them with log-sum-exp",
            remedy=f"leave {name} out, or keep such layers on one rank",
        )


def check_are_tensors(q: Any, k: Any, v: Any) -> None:
    kinds = [type(x).__name__ for x in (q, k, v)]
    if not all(isinstance(x, torch.Tensor) for x in (q, k, v)):
        raise UserError(
            f"q, k, v are {', '.join(kinds)}", expected="three tensors", remedy="torch.as_tensor makes them"
        )


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """One float dtype and one device for all three."""
    dtypes = {x.dtype for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise UserError(
            f"q in {q.dtype}, k in {k.dtype}, v in {v.dtype}",
            expected=f"one of {', '.join(sorted(map(str, DTYPES)))} for all three",
            remedy="cast them, or call under torch.autocast, which does",
        )
    if len({x.device for x in (q, k, v)}) > 1:
        raise UserError(
            f"q on {q.device}, k on {k.device}, v on {v.device}",
            expected="one device for all three, that of this rank",
            remedy="move them with .to(device)",
        )


def check_shapes(q: Sizes, k: Sizes, v: Sizes) -> None:
    """q [B, L, H, D], k [B, M, G, D], v [B, M, G, E], and G a divisor of H."""
    shown, wanted = f"q {list(q)}, k {list(k)}, v {list(v)}", "[B, L, H, D], [B, M, G, D] and [B, M, G, E]"
    if not len(q) == len(k) == len(v) == 4:
        raise UserError(shown, expected=wanted, remedy="four dims each; heads come after the length")
    for differ, what in (
        (q[0] != k[0] or k[0] != v[0], "batches"),
        (k[1] != v[1], "numbers of keys and values"),
        (k[2] != v[2], "heads of keys and values"),
        (q[3] != k[3], "head dims of queries and keys"),
    ):
        if differ:
            raise UserError(f"{shown}: the {what} differ", expected=wanted)
    if not k[2] or q[2] % k[2] or not q[2]:
        raise UserError(
            f"{q[2]} query heads over {k[2]} key heads",
            expected="a whole ratio: each key head serves as many query heads",
            remedy="pass the heads in dim 2 ([batch, length, heads, head_dim]), or repeat the key heads",
        )


def check_numbers(
    causal: Any, window: Any, prefix: Any, scale: Any, lengths: Any, cu_q: Any, cu_k: Any, wire: Any
) -> None:
    """Types and ranges of what is no tensor; what masks allow beside each other is checked by `masks.Mask`."""
    for name, value, wanted, remedy in (
        ("causal", causal, isinstance(causal, (bool, int)), "True or False"),
        ("window", window, window is None or _whole(window), "None, or a whole number of keys ≥ 1"),
        ("prefix", prefix, _whole(prefix), "a whole number of keys ≥ 0"),
        ("scale", scale, scale is None or _finite(scale), "None (1/√head_dim), or a finite number"),
        ("lengths", lengths, lengths is None or _pair(lengths), "None, or the global (queries, keys), such as (n, n)"),
        ("wire_dtype", wire, wire is None or wire in DTYPES, "None, or a float type of 16 bits or more"),
    ):
        if not wanted:
            raise UserError(f"{name} {value!r}", expected=remedy)
    for name, bounds in (("cu_seqlens", cu_q), ("cu_seqlens_k", cu_k)):
        if bounds is not None and (len(bounds) < 2 or bounds[0] != 0):
            raise UserError(
                f"{name} {list(bounds)}", expected="the global bounds of the documents: 0, …, the number of tokens"
            )
    if cu_k is not None and cu_q is None:
        raise UserError(
            "cu_seqlens_k without cu_seqlens",
            expected="the bounds of the queries' documents too",
            remedy="pass cu_seqlens= as well",
        )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _pair(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(_whole(x) and x >= 0 for x in value)
