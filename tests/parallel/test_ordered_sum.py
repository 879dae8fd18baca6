"""The sum of the ranks' parts by one kernel: the bits of the plain one, wherever the parts lie."""

from __future__ import annotations

import pytest
import torch

from undertow.comms.overlap_engine import add_in_order
from undertow.parallel.kernels.ordered_sum import ordered_sum


def _same_bits(device: str, dtype: torch.dtype) -> None:
    """Parts of very different size, so that another order gives other bits; each is a part of wider rows."""
    for ranks in (1, 2, 3, 8):
        everyone = torch.randn(ranks, 7, 2100).mul(3.0 ** torch.arange(ranks).view(-1, 1, 1)).to(device, dtype)
        parts = [each[:, :1030] if at % 2 else each[:, :1030].contiguous() for at, each in enumerate(everyone)]
        want = torch.empty(7, 1030, dtype=dtype, device=device)
        add_in_order(parts, want)
        whole = torch.full((7, 1100), torch.nan, dtype=dtype, device=device)
        ordered_sum(parts, whole[:, 40:1070])
        assert torch.equal(whole[:, 40:1070], want) and bool(
            whole[:, :40].isnan().all() and whole[:, 1070:].isnan().all()
        )
        total = parts[0].double()
        for part in parts[1:]:
            total = total + part.double()
        # each of the float32 sums, and the one rounding, is within half a unit of what it rounds
        error = (want.double() - total).abs() / everyone[:, :, :1030].double().abs().sum(0)
        assert float(error.max()) <= ranks * 2**-24 + torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_a_gpu_it_is_the_plain_sum(seed, dtype):
    _same_bits("cpu", dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_kernel_gives_the_same_bits(seed, dtype):
    _same_bits("cuda", dtype)
