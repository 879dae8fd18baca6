"""Arithmetic rates: matrix products and causal attention, forward and backward, in float32 and bfloat16.

Counted as papers do: a product of n³ takes 2n³ operations, its backward (two products) twice that; causal attention
2·B·H·L²·D forward (half of the full square) and two and a half times that backward. One row of the product is compared
with float64 before it is timed. These are the rates of torch's own kernels, which plans then count on; peak rates of
the hardware are not meant.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .measure import Effort, Measurement, Skipped, median_s

# Relative to the row's largest entry. float32: eps·√n for sums of n ≤ 8192 random terms is 1.1e-5, and ten times that.
# bfloat16: two and a half roundings of the result (eps 2⁻⁷). A wrong product is off by about 1.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def plan(device: torch.device, quick: bool) -> list[Measurement]:
    """GEMM and attention rates of `device`."""
    effort = Effort.of(quick)
    if device.type == "cuda":
        # long: a GPU loses 0.07 and 0.27 ms while an attention kernel starts and ends, which plans count by themselves
        n, (heads, length, width) = (4096, (16, 16384, 128)) if quick else (8192, (16, 32768, 128))
    else:
        n, (heads, length, width) = (256, (4, 256, 64)) if quick else (1024, (8, 1024, 64))
    measurements = []
    for dtype in TOLERANCE:
        name = str(dtype).removeprefix("torch.")
        runs: dict[str, Callable[[], float]] = {
            "gemm": lambda dtype=dtype: _gemm(n, dtype, device, effort),
            "gemm_backward": lambda dtype=dtype: _gemm_backward(n, dtype, device, effort),
            "attention_forward": lambda dtype=dtype: _attention(heads, length, width, dtype, device, effort, False),
            "attention_backward": lambda dtype=dtype: _attention(heads, length, width, dtype, device, effort, True),
        }
        measurements += [Measurement("flops", f"{kind}/{name}", run) for kind, run in runs.items()]
    return measurements


def _gemm(n: int, dtype: torch.dtype, device: torch.device, effort: Effort) -> float:
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    row, exact = (a @ b)[0].double(), a[0].double() @ b.double()
    worst = float((row - exact).abs().max() / exact.abs().max())
    if not worst <= TOLERANCE[dtype]:
        raise Skipped(f"the product is wrong by {worst:.3g}, relative to the largest entry")
    return 2 * n**3 / median_s(lambda: a @ b, effort, device)


def _gemm_backward(n: int, dtype: torch.dtype, device: torch.device, effort: Effort) -> float:
    x, weight, gradient = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(3))

    def backward() -> tuple[torch.Tensor, torch.Tensor]:
        return gradient @ weight.t(), x.t() @ gradient  # dX, dW

    return 4 * n**3 / median_s(backward, effort, device)


def _attention(
    heads: int, length: int, width: int, dtype: torch.dtype, device: torch.device, effort: Effort, backward: bool
) -> float:
    q, k, v = (torch.randn(1, heads, length, width, device=device, dtype=dtype) for _ in range(3))
    forward_flops = 2 * heads * length**2 * width
    if not backward:
        with torch.no_grad():
            seconds = median_s(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), effort, device)
        return forward_flops / seconds
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    output = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    gradient = torch.randn_like(output)
    seconds = median_s(lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True), effort, device)
    return 2.5 * forward_flops / seconds
