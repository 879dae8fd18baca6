"""Block attention: every backend against the written-out definition in float64, and the log-sum-exp merge."""

import itertools

import pytest
import torch

from undertow.parallel.blocks import reference, select
from undertow.parallel.blocks import tiled as tiled_module
from undertow.parallel.merge import empty_like, merge

NO_GPU = pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
SHAPES = [  # B, H, G, Lq, Lk, D, E
    (2, 4, 2, 7, 19, 8, 8),
    (1, 4, 1, 13, 13, 24, 8),
    (1, 2, 2, 1, 9, 8, 8),
    (1, 6, 2, 6, 6, 8, 16),
    (1, 8, 2, 160, 390, 64, 64),
    (1, 8, 2, 390, 160, 64, 64),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def draw(shape, dtype, device):
    b, h, g, lq, lk, d, e = shape
    sizes = (b, h, lq, d), (b, g, lk, d), (b, g, lk, e), (b, h, lq, e)
    return [torch.randn(*size, dtype=torch.float64).to(dtype).to(device) for size in sizes]


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize(
    ("name", "dtype", "device"),
    [
        *itertools.product(["tiled", "cpu_flash"], TOLERANCE, ["cpu"]),
        *(
            pytest.param(name, dtype, "cuda", marks=[pytest.mark.gpu, NO_GPU])
            for name, dtype in [
                ("tiled", torch.float32),
                ("flash2", torch.bfloat16),
                ("cudnn", torch.bfloat16),
                ("efficient", torch.float32),
                ("efficient", torch.bfloat16),
            ]
        ),
    ],
)
def test_backends_equal_the_definition(name, dtype, device, seed, monkeypatch):
    monkeypatch.setattr(tiled_module, "ROWS", 64)
    monkeypatch.setattr(tiled_module, "TILE_SCORES", 4096)
    backend, calls = select.backend(name), 0
    for shape, (causal, window) in itertools.product(SHAPES, [(False, None), (True, None), (True, 3), (True, 500)]):
        q, k, v, dout = draw(shape, dtype, device)
        if (causal and shape[3] > shape[4]) or not backend.supports(q, k, v, causal=causal, window=window):
            continue
        calls += 1
        how = {"scale": 0.3, "causal": causal, "window": window}
        exact = [t.double() for t in (q, k, v, dout)]
        out, lse = reference.forward(*exact[:3], **how)
        grads = reference.backward(exact[3], *exact[:3], out, lse, **how)
        mine, mine_lse = backend.forward(q, k, v, **how)
        mine_grads = backend.backward(dout, q, k, v, mine, mine_lse, **how)
        assert mine_lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for mine_t, exact_t in zip((mine, mine_lse, *mine_grads), (out, lse, *grads)):
            assert relative(mine_t, exact_t) <= TOLERANCE[dtype], (shape, how)
    assert calls, f"{name} takes no {dtype} on {device}"


@pytest.mark.gpu
@NO_GPU
@pytest.mark.parametrize("name", ["flash2", "cudnn"])
def test_backward_does_not_depend_on_how_out_lies_in_memory(name, seed):
    """cuDNN's plans are found again by the strides of q, k and v alone."""
    backend = select.backend(name)
    q, k, v, dout = draw((1, 4, 2, 323, 323, 64, 64), torch.bfloat16, "cuda")
    how = {"scale": 0.125, "causal": True, "window": None}
    out, lse = backend.forward(q, k, v, **how)
    longer = torch.zeros(1, 4, 400, 64, dtype=q.dtype, device="cuda")
    longer[:, :, 77:] = out
    order = out.transpose(1, 2).contiguous().transpose(1, 2)
    exact = reference.backward(*(t.double() for t in (dout, q, k, v, out, lse)), **how)
    for other in (out, longer[:, :, 77:], order, out.contiguous()):
        for got, want in zip(backend.backward(dout, q, k, v, other, lse, **how), exact):
            assert relative(got, want) < TOLERANCE[torch.bfloat16], other.stride()


@pytest.mark.gpu
@NO_GPU
def test_deterministic_algorithms_repeat_bit_for_bit(seed):
    """torch's switch puts cuDNN aside, whose backward has none, and reaches FlashAttention-2's."""
    q, k, v, dout = draw((1, 8, 2, 2048, 2048, 64, 64), torch.bfloat16, "cuda")
    how = {"scale": 0.125, "causal": True, "window": None}
    torch.use_deterministic_algorithms(True)
    try:
        backend = select.choose(q, k, v, causal=True, window=None)
        out, lse = backend.forward(q, k, v, **how)
        first, *others = (backend.backward(dout, q, k, v, out, lse, **how) for _ in range(50))
    finally:
        torch.use_deterministic_algorithms(False)
    assert backend.NAME == "flash2"
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


@pytest.mark.parametrize("device", DEVICES)
def test_split_keys_and_merged_backward_are_exact(device, seed):
    """Gradients of each part, computed with the merged out and lse, are that part's share of the whole."""
    q, k, v, dout = draw((1, 4, 2, 12, 30, 8, 8), torch.float64, device)
    how = {"scale": 0.4, "causal": False, "window": None}
    out, lse = reference.forward(q, k, v, **how)
    dq, dk, dv = reference.backward(dout, q, k, v, out, lse, **how)
    for name, cuts in itertools.product(["tiled", "cpu_flash"], [(0, 11, 30), (0, 1, 29, 30)]):
        backend = select.backend(name)
        spans = list(itertools.pairwise(cuts))
        if not backend.supports(q, k, v, causal=False, window=None):
            continue
        total, total_lse = empty_like(q)
        for a, b in spans:
            total, total_lse = merge(total, total_lse, *backend.forward(q, k[:, :, a:b], v[:, :, a:b], **how))
        parts = [
            backend.backward(dout, q, k[:, :, a:b], v[:, :, a:b], total, total_lse, scale=0.4, causal=False)
            for a, b in spans
        ]
        assert relative(total, out) < 1e-13 and relative(total_lse, lse) < 1e-13
        assert relative(sum(p[0] for p in parts), dq) < 1e-12
        assert relative(torch.cat([p[1] for p in parts], 2), dk) < 1e-12
        assert relative(torch.cat([p[2] for p in parts], 2), dv) < 1e-12


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_in_place_equals_merge_and_keeps_empty_rows(dtype, device, seed):
    from undertow.parallel.kernels.merge_rows import merge_into, merge_to

    # [B, T, H, D] memory seen as [B, H, T, D]: the layout of a layer's attention output
    out, part = (torch.randn(2, 33, 3, 40, device=device).to(dtype).transpose(1, 2) for _ in range(2))
    lse, part_lse = (torch.randn(2, 3, 33, device=device) * 3 for _ in range(2))
    lse[:, :, 4:8] = float("-inf")
    part_lse[:, :, 6:12] = float("-inf")
    expected, expected_lse = merge(out, lse, part, part_lse)
    assert not expected.isnan().any() and not expected_lse.isnan().any()
    assert (expected[:, :, 6:8] == 0).all() and torch.isneginf(expected_lse[:, :, 6:8]).all()
    torch.testing.assert_close(expected[:, :, 4:6], part[:, :, 4:6])
    torch.testing.assert_close(expected[:, :, 8:12], out[:, :, 8:12])
    apart, apart_lse = torch.empty_like(out, dtype=torch.float32), torch.empty_like(lse)
    merge_to(apart, apart_lse, out, lse, part, part_lse)
    torch.testing.assert_close(apart.to(dtype), expected)
    torch.testing.assert_close(apart_lse, expected_lse)
    merge_into(out, lse, part, part_lse)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_unknown_backend_is_a_user_error():
    from undertow.dist.errors import UserError

    with pytest.raises(UserError, match="no attention backend"):
        select.backend("fast")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_row_products_equal_the_formulas(dtype, device, seed):
    """Also for rows whose squares vanish in float32, rows of zeros, and widths that no power of two is."""
    from undertow.parallel.kernels.row_products import row_dot, standing_out

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dout, out = (torch.randn(37, 2, 3, 40, dtype=torch.float64).to(dtype).to(device) for _ in range(2))
    dout[3], dout[4] = 0, dout[4] * 1e-25
    delta = row_dot(dout, out, wide)
    exact = (dout.double() * out.double()).sum(-1)
    assert delta.dtype == wide and relative(delta, exact) < 1e-6
    stand = standing_out(dout, delta)
    assert stand.dtype == dtype and (stand[3] == 0).all() and stand.isfinite().all()
    # each entry is rounded once, to 2^-9 of itself in bfloat16: so the sum is off by less than 2^-8 of its terms' sizes
    terms = (dout.double() * stand.double()).abs().sum(-1)
    assert ((dout.double() * stand.double()).sum(-1) - delta.double()).abs().le(2**-8 * terms + 1e-300).all()
    assert ((exact[4] / exact[4].abs().clamp_min(1e-60)).abs() > 0.5).all()
