"""Block attention: every backend against the written-out definition in float64, and the log-sum-exp merge."""

import itertools
from typing import Any

import pytest
import torch

from undertow.parallel.blocks import flex, measured, reference, select
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
        *itertools.product(["flex"], [torch.float64, torch.bfloat16], ["cpu"]),
        *(
            pytest.param(name, dtype, "cuda", marks=[pytest.mark.gpu, NO_GPU])
            for name, dtype in [
                ("tiled", torch.float32),
                ("flash2", torch.bfloat16),
                ("cudnn", torch.bfloat16),
                ("efficient", torch.float32),
                ("efficient", torch.bfloat16),
                ("flex", torch.float32),
                ("flex", torch.bfloat16),
            ]
        ),
    ],
)
def test_backends_equal_the_definition(name, dtype, device, seed, monkeypatch, flex_on_cpu):
    monkeypatch.setattr(tiled_module, "ROWS", 64)
    monkeypatch.setattr(tiled_module, "TILE_SCORES", 4096)
    backend, calls = select.backend(name), 0
    if name == "flex" and device == "cpu":
        flex_on_cpu()
    shapes = SHAPES[1:5:3] if name == "flex" else SHAPES  # it compiles each
    for shape, (causal, window) in itertools.product(shapes, [(False, None), (True, None), (True, 3), (True, 500)]):
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


def test_flex_gives_a_blocks_share_of_a_merged_result(seed, flex_on_cpu):
    """torch's interface takes no merged log-sum-exp; rows that see nothing here, or nothing anywhere, give zeros."""
    flex_on_cpu()
    q, k, v, dout = draw((1, 4, 2, 40, 200, 16, 24), torch.float64, "cpu")
    low, high = torch.randint(0, 200, (2, 40), dtype=torch.int32)
    at = torch.randperm(200, dtype=torch.int32)
    high[:3] = 0
    seen = (at >= low[:, None]) & (at < high[:, None])
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~seen, float("-inf"))
    other, other_lse = torch.randn(1, 4, 40, 24, dtype=torch.float64), torch.randn(1, 4, 40, dtype=torch.float64)
    other_lse[:, :, 1] = float("-inf")
    plan = flex.plan((low, high, at))
    out, lse = flex.forward_planned(q, k, v, plan, scale=0.3)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-12, rtol=0)
    weights = torch.exp(scores - lse[..., None]).nan_to_num(0)
    torch.testing.assert_close(out, weights @ v.repeat_interleave(2, 1), atol=1e-12, rtol=0)
    total, total_lse = merge(out, lse, other, other_lse)
    dq, dk, dv = flex.backward_planned(dout, q, k, v, total, total_lse, plan, scale=0.3)
    weights = torch.exp(scores - total_lse[..., None]).nan_to_num(0)
    delta = (dout * total).sum(-1, keepdim=True)
    dscores = weights * (dout @ v.repeat_interleave(2, 1).mT - delta) * 0.3
    torch.testing.assert_close(dq, dscores @ k.repeat_interleave(2, 1), atol=1e-12, rtol=0)
    for got, part in ((dk, dscores.mT @ q), (dv, weights.mT @ dout)):
        torch.testing.assert_close(got, part.unflatten(1, (2, 2)).sum(2), atol=1e-12, rtol=0)


@pytest.mark.parametrize("rows", [1, 128, 300])
def test_flex_never_skips_a_block_that_is_seen(rows, seed):
    """The kernel trusts the lists: a block that is left out is not read, one that is 'whole' is not masked."""
    generator = torch.Generator().manual_seed(seed)
    skipped = whole_ones = 0
    for keys in (1, 128, 256, 517):
        for spread in (0, 40, 1000):
            at = torch.arange(keys).roll(keys // 3).to(torch.int32)  # two runs, as a zigzag shard
            low = torch.randint(0, spread + 1, (rows,), generator=generator).to(torch.int32)
            high = low + torch.randint(0, 2 * keys, (rows,), generator=generator).to(torch.int32)
            if spread <= 40:
                high[:] = keys
            some, whole = flex.blocks((low, high, at))
            seen = (
                torch.nn.functional.pad(
                    (at >= low[:, None]) & (at < high[:, None]), (0, -keys % flex.BLOCK, 0, -rows % flex.BLOCK)
                )
                .unflatten(1, (-1, flex.BLOCK))
                .unflatten(0, (-1, flex.BLOCK))
            )
            assert (some >= seen.any(3).any(1)).all() and (whole <= seen.all(3).all(1)).all()
            assert (whole <= some).all()
            skipped, whole_ones = skipped + int((~some).sum()), whole_ones + int(whole.sum())
            counts: Any = flex.plan((low, high, at)).lists[::2]  # by rows, then by columns: in part, whole
            assert sum(map(int, (x.sum() for x in counts[:2]))) == int(some.sum())
            assert [int(x.sum()) for x in counts[:2]] == [int(x.sum()) for x in counts[2:]]
    assert skipped and (whole_ones or rows < flex.BLOCK)


def test_flex_is_refused_on_a_cpu_by_name(seed):
    from undertow.dist.errors import UserError
    from undertow.parallel import token_ring_attention

    x = torch.randn(1, 9, 2, 16)
    for name in ("flex", "cudnn"):
        with pytest.raises(UserError, match=f"kernel='{name}'.*on cpu"):
            token_ring_attention(x, x, x, kernel=name)
    with pytest.raises(UserError, match="no attention backend"):
        token_ring_attention(x, x, x, kernel="fast")
    torch.testing.assert_close(*(token_ring_attention(x, x, x, causal=True, kernel=n) for n in ("tiled", "auto")))


def test_the_fastest_way_is_measured_once_and_must_win_by_three_percent(monkeypatch):
    seconds = {"first": 1.0, "second": 0.9, "third": 0.99, "wrong": 0.1, "broken": 0.1}
    called: list[str] = []
    warned: list[str] = []

    def way(name):
        def call():
            called.append(name)
            if name == "broken":
                raise RuntimeError("no such kernel")
            return [torch.tensor([1.0 + (name == "wrong"), float("-inf")])]

        return call

    ways = {name: way(name) for name in seconds}
    cpu, allowed = torch.device("cpu"), False
    monkeypatch.setattr(measured, "may_measure", lambda device: allowed)
    monkeypatch.setattr(measured, "_found", {})
    monkeypatch.setattr(measured, "_lines", [])
    monkeypatch.setattr(measured, "_once", lambda call, device: call() and seconds[called[-1]])
    monkeypatch.setattr(measured.log, "warning", lambda text, *parts: warned.append(text % parts))
    assert measured.fastest("a", ways, cpu, "a") == "first" and not called
    allowed = True
    with monkeypatch.context() as while_queueing:  # what a call reads may not have come yet: waiting could last
        while_queueing.setattr(measured, "queueing", lambda: True)
        assert measured.fastest("a", ways, cpu, "a") == "first" and not called
    assert measured.fastest("a", ways, cpu, "a") == "second"
    assert called.count("second") == 2 + measured.ROUNDS and called.count("wrong") == called.count("broken") == 1
    assert ["off by 1" in warned[0], "no such kernel" in warned[1]] == [True, True] and len(warned) == 2
    called.clear()
    assert measured.fastest("a", ways, cpu, "a") == "second" and not called
    seconds["second"] = 0.98
    assert measured.fastest("b", ways, cpu, "b") == "first"
    assert [line.split(" (")[0] for line in measured.report()] == ["a: second", "b: first"]
    assert "second 1.11×" in measured.report()[0]


def test_calls_go_to_the_backend_that_was_found(seed, monkeypatch):
    """Each phase and kind of call on its own; under deterministic algorithms the first of the order."""
    fake = {"forward": "tiled", "backward": "cpu_flash"}
    monkeypatch.setattr(measured, "_found", {})
    monkeypatch.setattr(measured, "_backends", {})
    asked: list[int] = []

    def candidates(*given, **how):
        asked.append(1)
        return [select.backend("cpu_flash"), select.backend("tiled")]

    monkeypatch.setattr(select, "candidates", candidates)

    def found(key, ways, device, label):
        measured._found[key] = fake[key[0]]
        assert set(ways) == {"cpu_flash", "tiled"} and "[1, 4, 7, 8]" in label
        return fake[key[0]]

    monkeypatch.setattr(measured, "fastest", found)
    q, k, v, dout = draw(SHAPES[0], torch.float64, "cpu")
    q, k, v, dout = (x[:1] for x in (q, k, v, dout))
    both: dict[str, list[str]] = {}
    for name in ("cpu_flash", "tiled"):
        module = select.backend(name)
        for phase in ("forward", "backward"):
            plain = getattr(module, phase)
            spy = lambda *a, _p=plain, _n=name, _f=phase, **how: both.setdefault(_f, []).append(_n) or _p(*a, **how)  # noqa: E731
            monkeypatch.setattr(module, phase, spy)
    how = {"scale": 0.3, "causal": True, "window": None}
    for _ in range(2):
        out, lse = measured._MEASURED.forward(q, k, v, **how)
        grads = measured._MEASURED.backward(dout, q, k, v, out, lse, **how)
    assert both == {"forward": ["tiled"] * 2, "backward": ["cpu_flash"] * 2}
    assert len(asked) == 2  # once for each phase
    measured._MEASURED.forward(q[:, :, 1:], k, v, **how)  # documents are of other lengths in every batch
    assert len(asked) == 2 and both["forward"] == ["tiled"] * 3
    monkeypatch.setattr(select.backend("tiled"), "supports", lambda *given, **how: False)
    measured._MEASURED.forward(q[:, :, 2:], k, v, **how)
    assert both["forward"][3:] == ["cpu_flash"], "a length that the way found for its kind does not take"
    monkeypatch.undo()
    exact = reference.backward(dout, q, k, v, out, lse, **how)
    assert all(relative(a, b) < 1e-12 for a, b in zip(grads, exact))


def test_long_blocks_are_measured_by_their_last_rows(seed, monkeypatch):
    """The rows keep their order in memory and, at its end, their mask; the call itself computes all of them."""
    monkeypatch.setattr(measured, "MOST_ROWS", 16)
    monkeypatch.setattr(measured, "_backends", {})
    tiled = select.backend("tiled")
    monkeypatch.setattr(select, "candidates", lambda *given, **how: [tiled, select.backend("cpu_flash")])
    q, k, v = (torch.randn(1, rows, 2, 8, dtype=torch.float64).transpose(1, 2) for rows in (24, 40, 40))
    shapes: list[Any] = []

    def fastest(key, ways, device, label):
        out, lse = ways["tiled"]()
        shapes.append((out.shape, lse.shape))
        wanted = reference.forward(*(x[:, :, -16:] for x in (q, k, v)), scale=0.3, causal=True)
        assert all(relative(a, b) < 1e-12 for a, b in zip((out, lse), wanted))
        return "tiled"

    monkeypatch.setattr(measured, "fastest", fastest)
    out, _ = measured._MEASURED.forward(q, k, v, scale=0.3, causal=True, window=None)
    assert shapes == [((1, 2, 16, 8), (1, 2, 16))] and out.shape == (1, 2, 24, 8)
    last = measured._last_rows(q)
    assert last.stride(2) > last.stride(1) and torch.equal(last, q[:, :, -16:])


@pytest.mark.parametrize(
    ("able", "rows", "wanted"),
    [
        ({"cudnn", "flash2", "efficient", "flex"}, 2048, ["cudnn", "flash2"]),
        ({"flash2", "efficient", "flex"}, 2048, ["flash2", "flex"]),  # a window
        ({"flash2", "efficient", "flex"}, 256, ["flash2"]),  # too small to compile for
        ({"efficient", "flex"}, 2048, ["tiled", "efficient", "flex"]),  # float32
        (set(), 2048, ["tiled"]),
    ],
)
def test_what_is_worth_a_measurement(able, rows, wanted, monkeypatch):
    """On a device where `able` can compute the call."""
    for name in ("cudnn", "flash2", "efficient", "flex", "cpu_flash"):
        monkeypatch.setattr(select.backend(name), "supports", lambda *given, _can=name in able, **how: _can)
    q = torch.empty(1, 2, rows, 16)
    call = dict(causal=True, window=None)
    assert [b.NAME for b in select.candidates(q, q, q, **call, compiled=True)] == wanted
    assert [b.NAME for b in select.candidates(q, q, q, **call)] == [name for name in wanted if name != "flex"]


def test_one_program_serves_all_blocks_of_a_kind(seed, flex_on_cpu):
    """One without and one with gradients, for every length and mask, traced inside of a custom operator, where nothing
    has gradients; another head dim is another kind. `report` tells."""
    programs = flex_on_cpu()

    @torch.library.custom_op("undertow_test::flex_both_phases", mutates_args=())
    def both(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> list[torch.Tensor]:
        how = {"scale": 0.3, "causal": window > 0, "window": 40 if window == 40 else None}
        out, lse = flex.forward(q, k, v, **how)
        return [out.clone(), *(x.clone() for x in flex.backward(out, q, k, v, out, lse, **how))]

    def right(rows, keys, width, window):
        q, k, v, _ = draw((1, 4, 2, rows, keys, width, width), torch.float64, "cpu")
        q, k, v = (x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in (q, k, v))  # as a ring's shards
        if rows == 389:  # whole, and a slice of a longer one: other strides of the one batch
            q, k = (torch.cat([x.transpose(1, 2)] * n, 1).transpose(1, 2)[:, :, :keys] for x, n in ((q, 1), (k, 2)))
        how = {"scale": 0.3, "causal": window > 0, "window": 40 if window == 40 else None}
        out, lse = reference.forward(q, k, v, **how)
        wanted = [out, *reference.backward(out, q, k, v, out, lse, **how)]
        return all(relative(got, want) < 1e-12 for got, want in zip(both(q, k, v, window), wanted))

    for rows, keys in ((389, 389), (130, 300), (256, 512), (1, 128), (400, 77)):
        for window in (0, 40, 300) if rows <= keys else (0,):  # full, a window, causal
            assert right(rows, keys, 16, window), (rows, keys, window)
    assert programs.count == 2
    assert right(300, 300, 32, 40)
    assert programs.count == 4
    *each, total = flex.report()
    assert len(each) == 4 and "forward, torch.float64, 4:2 heads of 32" in each[2]
    assert total.startswith("flex: 4 programs compiled in this process, ")


def test_flex_asks_no_other_thread_for_gradients(seed, flex_on_cpu, monkeypatch):
    """On CUDA torch runs a backward on a thread of the device: the one that waits in the operator's own backward."""
    flex_on_cpu()
    seen, plain = [], torch.autograd.grad

    def grad(*args, **how):
        seen.append(torch.autograd.is_multithreading_enabled())
        return plain(*args, **how)

    q, k, v, dout = draw((1, 4, 2, 300, 300, 16, 16), torch.float64, "cpu")
    how = {"scale": 0.3, "causal": True, "window": 40}
    out, lse = flex.forward(q, k, v, **how)
    monkeypatch.setattr(torch.autograd, "grad", grad)
    flex.backward(dout, q, k, v, out, lse, **how)  # compiles, which asks for gradients too
    assert len(seen) > 1
    flex.backward(dout, q, k, v, out, lse, **how)
    assert not any(seen) and torch.autograd.is_multithreading_enabled()


@pytest.mark.gpu
@NO_GPU
def test_flex_within_a_backward(seed):
    """`loss.backward()` calls the operator's backward on torch's thread for the device."""
    from undertow.parallel import token_ring_attention

    q, k, v = (torch.randn(1, 600, h, 64, device="cuda").bfloat16().requires_grad_() for h in (4, 2, 2))
    how = {"causal": True, "window": 50}
    wanted = torch.autograd.grad(token_ring_attention(q, k, v, **how, kernel="tiled").float().sum(), (q, k, v))
    token_ring_attention(q, k, v, **how, kernel="flex").float().sum().backward()
    for x, want in zip((q, k, v), wanted):
        assert x.grad is not None and relative(x.grad, want) < TOLERANCE[torch.bfloat16]


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
    from undertow.parallel.kernels.merge_rows import merge_into

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
    merge_into(out, lse, part, part_lse)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [2, 5, 9])
@pytest.mark.parametrize("into", ["apart", "the first"])
def test_many_parts_are_summed_at_once(into, count, device, seed):
    """The attention over all keys, and a sum whose every bit is that of adding one after the other in float32."""
    from undertow.parallel.kernels.sum_parts import add_parts_to, merge_parts_to

    outs = [torch.randn(37, 3, 40, device=device).to(torch.bfloat16 if n else torch.float32) for n in range(count)]
    lses = [torch.randn(37, 3, device=device) * 3 for _ in outs]
    for n in range(1, count, 2):  # as kernels leave them: heads first, and rows of a longer block
        lses[n] = (torch.randn(3, 41, device=device) * 3)[:, 2:39].t()
    for n, lse in enumerate(lses):
        lse[4:8] = float("-inf")  # rows that no part sees
        lse[8 + n, 1] = float("-inf")
        outs[n][torch.isneginf(lse)] = 0
    weights = torch.stack(lses).double().softmax(0).nan_to_num(0)
    expected = (torch.stack([out.double() for out in outs]) * weights[..., None]).sum(0)
    total, total_lse = (outs[0], lses[0]) if into == "the first" else map(torch.empty_like, (outs[0], lses[0]))
    expected_lse = torch.stack(lses).double().logsumexp(0)
    rounded = torch.empty_like(outs[1])
    add_parts_to(rounded, outs)
    one = outs[0].clone()
    for out in outs[1:]:
        one += out
    assert torch.equal(rounded, one.bfloat16())
    merge_parts_to(total, total_lse, outs, lses)
    assert (total[4:8] == 0).all() and torch.isneginf(total_lse[4:8]).all()
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total_lse.double(), expected_lse, rtol=1e-5, atol=1e-6)


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
