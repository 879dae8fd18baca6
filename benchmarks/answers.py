"""How many parts of an answer are wrong: the column `wrong`, after nccl-tests' column of the same name.

Equality is exact, bit for bit where there are bits: NaN equals the same NaN, and -0.0 is not 0.0. A case whose answer
has a derived tolerance passes a counter of its own, made by `within`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def count_wrong(answer: Any, reference: Any) -> int:
    """Number of elements of `answer` that differ from `reference`; torch tensors, arrays, containers or plain values.

    A missing, added or differently shaped part counts as all its elements, at least one.
    """
    if isinstance(reference, Mapping):
        if not isinstance(answer, Mapping):
            return len(reference) or 1
        return sum(count_wrong(answer.get(k), reference.get(k)) for k in {*answer, *reference})
    if isinstance(reference, (list, tuple)):
        if not isinstance(answer, (list, tuple)) or len(answer) != len(reference):
            return max(len(reference), 1)
        return sum(count_wrong(a, r) for a, r in zip(answer, reference))
    if hasattr(reference, "dtype") and hasattr(reference, "shape"):
        return _count_elements(answer, reference)
    return int(type(answer) is not type(reference) or answer != reference)


def within(atol: float, rtol: float = 0.0) -> Callable[[Any, Any], int]:
    """A counter for one tensor: an element is wrong when |answer - reference| > atol + rtol · |reference|.

    The comparison is done in float64; infinities and NaN must be the same ones. Say beside the call
    where the tolerance comes from.
    """

    def count(answer: Any, reference: Any) -> int:
        import torch

        a, r = torch.as_tensor(answer).detach().double().cpu(), torch.as_tensor(reference).detach().double().cpu()
        if a.shape != r.shape:
            return max(r.numel(), 1)
        good = a.isfinite() & r.isfinite() & ((a - r).abs() <= atol + rtol * r.abs())
        good |= (a == r) | (a.isnan() & r.isnan())
        return int((~good).sum())

    return count


def _count_elements(answer: Any, reference: Any) -> int:
    import torch

    if not hasattr(answer, "dtype") or tuple(answer.shape) != tuple(reference.shape):
        return max(int(torch.as_tensor(reference).numel()), 1)
    a, r = torch.as_tensor(answer).detach().cpu(), torch.as_tensor(reference).detach().cpu()
    if a.dtype != r.dtype:
        return max(r.numel(), 1)
    if r.numel() == 0:
        return 0
    # Compare the bytes of each element, so that NaN payloads and signed zeros count too.
    bits = [t.contiguous().reshape(-1).view(torch.uint8).reshape(r.numel(), -1) for t in (a, r)]
    return int((bits[0] != bits[1]).any(dim=1).sum())
