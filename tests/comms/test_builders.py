"""Every builder, at every size, passes `check` and computes the right answer in every interleaving that it allows."""

from __future__ import annotations

import pytest
import torch

from undertow.comms import local
from undertow.comms.actions import Send, Slice
from undertow.comms.builders.gemm_reduce_scatter import gemm_reduce_scatter
from undertow.comms.builders.reduce_scatter import direct_reduce_scatter, ring_reduce_scatter
from undertow.comms.builders.ring_attention import ring_attention
from undertow.comms.check import check, find_problems
from undertow.comms.schedule_text import parse
from undertow.comms.storage import Storage, layout_of
from undertow.dist.errors import UserError


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 8])
def test_every_builder_is_right(case_name, world, make_case, seed):
    for rows in (4, [(3 * rank + 1) % 5 for rank in range(world)]):  # ragged, with a rank that owns nothing
        case = make_case(case_name, world, rows)
        check(case.schedule, rendezvous=True)
        assert parse(str(case.schedule)) == case.schedule
        for interleaving in (None, seed, seed + 1):
            assert case.matches(local.run(case.schedule, case.inputs, case.ops, seed=interleaving))


def test_interleavings_give_the_same_bits(make_case, seed):
    case = make_case("attention", 4)
    first = local.run(case.schedule, case.inputs, case.ops)
    for interleaving in range(seed, seed + 8):
        again = local.run(case.schedule, case.inputs, case.ops, seed=interleaving, rendezvous=bool(interleaving % 2))
        assert all(torch.equal(a[name], b[name]) for a, b in zip(first, again) for name in a)


def test_direct_sum_has_the_bits_of_the_sum_in_rank_order(seed):
    x = [torch.randn(12, 5) for _ in range(4)]
    out = local.run(direct_reduce_scatter(4, 3, [5]), [{"x": t} for t in x], seed=seed)
    assert torch.equal(torch.cat([o["out"] for o in out]), ((x[0] + x[1]) + x[2]) + x[3])


def test_bfloat16_chunks_can_be_summed_in_float32(seed):
    x = [torch.randn(12, 5).bfloat16() for _ in range(4)]
    schedule = direct_reduce_scatter(4, 3, [5], "bfloat16", sum_dtype="float32")
    check(schedule)
    out = torch.cat([o["out"] for o in local.run(schedule, [{"x": t} for t in x])])
    wide = [t.float() for t in x]
    assert out.dtype == torch.bfloat16 and torch.equal(out, (((wide[0] + wide[1]) + wide[2]) + wide[3]).bfloat16())


def test_staggered_ranks_end_with_their_own_chunk_and_begin_apart():
    for algorithm in ("direct", "ring"):
        schedule = gemm_reduce_scatter(4, 2, 3, 3, algorithm=algorithm)
        orders = [[a.writes[0].start // 2 for a in p.lanes[0].actions] for p in schedule.programs]
        assert [order[-1] for order in orders] == [0, 1, 2, 3]
        assert all(len({order[step] for order in orders}) == 4 for step in range(4))


def test_sequential_is_the_overlapped_schedule_with_one_wait_per_rank():
    plain, held = (gemm_reduce_scatter(3, 2, 3, 3, overlap=overlap) for overlap in (True, False))
    extra = set(str(held).splitlines()) - set(str(plain).splitlines())
    assert extra == {"  wait (y[0:6])", "meta overlap = false"}


def test_causal_ring_sends_only_what_is_needed_further_on():
    sent = [
        p.rank
        for p in ring_attention(4, 4, causal=True).programs
        for ln in p.lanes
        for a in ln.actions
        if isinstance(a, Send)
    ]
    assert sent == [0, 1, 1, 2, 2, 2]  # rank 3 closes no ring: its keys lie in everybody's future


def test_a_ring_needs_two_buffers_whatever_its_length():
    for build in (lambda w: ring_reduce_scatter(w, 4), lambda w: ring_attention(w, 4)):
        small, large = build(4), build(8)
        slots = [{v.slot for v in s.values if v.slot} for s in (small, large)]
        assert slots[0] == slots[1]


def test_symbols_stand_for_sizes_until_they_are_bound():
    schedule = direct_reduce_scatter(2, 4, ["cols"], "bfloat16")
    assert find_problems(schedule) == () and parse(str(schedule)) == schedule
    with pytest.raises(UserError, match="cols are symbols"):
        schedule.nbytes(0, Slice("x", 0, 8))
    assert schedule.bind({"cols": 3}).nbytes(0, Slice("x", 0, 8)) == 48
    with pytest.raises(UserError, match="no dim named rows"):
        schedule.bind({"rows": 3})


def test_inputs_that_do_not_fit_are_refused_by_name():
    schedule = direct_reduce_scatter(2, 4, [3])
    for inputs, words in (
        ({}, "given the inputs none; expected x"),
        ({"x": torch.zeros(8, 3), "y": torch.zeros(1)}, "given the inputs x, y"),
        ({"x": torch.zeros(8, 2)}, r"x of rank 1 is torch.float32\[8, 2\]"),
        ({"x": torch.zeros(8, 3).double()}, "float64"),
    ):
        with pytest.raises(UserError, match=words):
            Storage(layout_of(schedule, 1), inputs)


def test_a_missing_operation_is_named(make_case):
    case = make_case("attention", 2)
    with pytest.raises(UserError, match="attend, merge_lse"):
        local.run(case.schedule, case.inputs)


@pytest.mark.parametrize(
    "call",
    [
        lambda: direct_reduce_scatter(0, 4),
        lambda: direct_reduce_scatter(2, [1, 2, 3]),
        lambda: direct_reduce_scatter(2, -1),
        lambda: direct_reduce_scatter(2, 4, subchunks=0),
        lambda: direct_reduce_scatter(2, 4, sum_order="random"),
        lambda: gemm_reduce_scatter(2, 4, 3, 3, algorithm="tree"),
        lambda: gemm_reduce_scatter(2, 4, 3, 3, algorithm="ring", staggered=False),
    ],
)
def test_builders_refuse_what_makes_no_sense(call):
    with pytest.raises(UserError):
        call()
