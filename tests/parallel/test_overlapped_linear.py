"""Overlapped products beside torch's own fallbacks: values, strides and gradients."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric

from undertow.comms.chunk_plan import ChunkPlan
from undertow.comms.overlap_cuda import CudaOverlapEngine
from undertow.dist.errors import UserError
from undertow.dist.machine import Link, Machine
from undertow.parallel import all_gather_matmul, matmul_all_reduce, matmul_reduce_scatter, overlap_plain, overlap_team
from undertow.parallel.overlap_arms import ARMS, CUDA_ARMS, SEQUENTIAL, cut
from undertow.parallel.overlap_gate import AGAIN, CHECK, RARER, ROUNDS, ROW, Gate
from undertow.parallel.overlap_queueing import Queueing
from undertow.parallel.overlap_team import Team
from undertow.parallel.overlap_teams import close_teams, team_for, team_of
from undertow.parallel.overlap_ways import GATHER, SCATTER, SUM, Guesses, Lasting, Ways
from undertow.parallel.tensor_parallel import RowParallelLinear, token_share

SHAPES = [((12,), 5, 3), ((12, 6), 7, 6), ((6, 12, 6), 1, 6), ((12, 6), 0, 12)]  # leading dims, K, N


def _bits(*shape: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def _like_torch(rank: int, world: int, seed: int) -> None:
    """Zeros and ones: every order of sums gives the same bits."""
    name = dist.distributed_c10d._get_default_group().group_name
    generator = torch.Generator().manual_seed(seed + rank)
    for mode, dtype in itertools.product(("off", "on", "columns, 2 pieces"), (torch.float32, torch.bfloat16)):
        team = Team(overlap=mode)
        for lead, k, n in SHAPES:
            a, b = _bits(*lead, k, dtype=dtype, generator=generator), _bits(k, n, dtype=dtype, generator=generator)
            if mode != "off":  # not contiguous either
                a, b = a.transpose(0, -1).contiguous().transpose(0, -1), b.t().contiguous().t()
            for dim in range(len(lead) + 1):
                if dim < len(lead) or n % world == 0:
                    want = symmetric._fused_matmul_reduce_scatter_fallback(a, b, "sum", dim, name)
                    got = matmul_reduce_scatter(a, b, "sum", dim, team)
                    assert torch.equal(got, want) and got.stride() == want.stride(), (lead, k, n, dim)
            for dim in range(len(lead)):
                want_a, wants = symmetric._fused_all_gather_matmul_fallback(a, [b, b], dim, name)
                got_a, gots = all_gather_matmul(a, [b, b], dim, team)
                assert got_a is not None and want_a is not None and torch.equal(got_a, want_a), (lead, k, n, dim)
                assert world == 1 or got_a.stride() == want_a.stride()  # torch returns a view of its input then
                for got, want in zip(gots, wants, strict=True):
                    assert torch.equal(got, want) and got.stride() == want.stride(), (lead, k, n, dim)
            summed = a @ b
            dist.all_reduce(summed)
            assert torch.equal(matmul_all_reduce(a, b, "sum", team), summed)
        team.close()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_values_and_strides_are_those_of_torch(ranks, seed, world):
    ranks(world, _like_torch, seed)


def _gradients(rank: int, world: int, seed: int) -> None:
    """An MLP split over ranks against the whole one, in float64: 1e-12 is rounding of sums of some tens of products."""
    team, said = team_of(None), list[str]()
    listener = logging.Handler(logging.INFO)
    listener.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("undertow.parallel.overlap_team").addHandler(listener)
    generator = torch.Generator().manual_seed(seed)
    x, up, down = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4 * world, 3, 6), (6, 24), (24, 6))
    )
    target = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    whole = [t.clone().requires_grad_() for t in (x, up, down)]
    ((whole[0] @ whole[1]).relu() @ whole[2] * target).sum().backward()
    parts = [x.chunk(world)[rank], up.chunk(world, 1)[rank], down.chunk(world)[rank]]
    for calls in range(26):  # until the gate has tried all arms, and decided
        x_r, up_r, down_r = (part.clone().requires_grad_() for part in parts)
        _, (hidden,) = all_gather_matmul(x_r, [up_r], 0, None)
        out = matmul_reduce_scatter(hidden.relu(), down_r)
        (out * target.chunk(world)[rank]).sum().backward()
        for mine, full, dim in ((x_r, whole[0], 0), (up_r, whole[1], 1), (down_r, whole[2], 0)):
            assert full.grad is not None
            torch.testing.assert_close(mine.grad, full.grad.chunk(world, dim)[rank], rtol=1e-12, atol=1e-12)
        if calls == 0 and world > 1:
            assert "still measuring" in team.explain()
    assert "still measuring" not in team.explain() and ("one rank" if world == 1 else "measured") in team.explain()
    wanted = [] if world == 1 else [f"overlap: {line}" for line in team.explain().splitlines()]
    assert sorted(said) == sorted(wanted)  # once for each product that was chosen for
    summed_x, summed_w = x.clone().requires_grad_(), up.clone().requires_grad_()
    (matmul_all_reduce(summed_x, summed_w) * target.sum(-1, keepdim=True)).sum().backward()
    assert summed_x.grad is not None and summed_w.grad is not None
    d = target.sum(-1, keepdim=True).expand(-1, -1, 24)
    torch.testing.assert_close(summed_x.grad, d @ up.t(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(summed_w.grad, x.flatten(0, 1).t() @ d.flatten(0, 1), rtol=1e-12, atol=1e-12)
    close_teams()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_gradients_of_a_split_mlp_are_those_of_the_whole(ranks, seed, world):
    ranks(world, _gradients, seed)


def _ragged(rank: int, world: int) -> None:
    """7 rows over 3 ranks, cut as torch.chunk does, by name of the group."""
    name = dist.distributed_c10d._get_default_group().group_name
    a, b = torch.ones(7, 2) * (rank + 1), torch.ones(2, 3)
    got = matmul_reduce_scatter(a, b, "avg", 0, name)
    assert torch.equal(got, torch.full(((3, 3, 1)[rank], 3), 4.0))
    whole, (product,) = all_gather_matmul(got, [torch.eye(3)], 0, name, total=7)
    assert torch.equal(product, torch.full((7, 3), 4.0)) and torch.equal(product, whole)
    assert torch.equal(matmul_all_reduce(a, b, "avg", name), torch.full((7, 3), 4.0))
    with pytest.raises(UserError, match="'sum' or 'avg'"):
        matmul_reduce_scatter(a, b, "max", 0, name)
    with pytest.raises(UserError, match="not the last"):
        all_gather_matmul(a, [b], 1, name)
    with pytest.raises(UserError, match="cut as torch.chunk does"):
        all_gather_matmul(a, [b], 0, name, total=9 if rank else 12)
    close_teams()


def test_a_script_without_a_process_group_is_told_so():
    a, b = torch.ones(4, 8), torch.ones(8, 6)
    for call in (matmul_reduce_scatter, matmul_all_reduce, lambda a, b, *_: all_gather_matmul(a, [b], 0)):
        with pytest.raises(UserError, match="there is no process group; expected torchrun"):
            call(a, b, *(("sum", 0) if call is matmul_reduce_scatter else ()))


def test_rows_that_the_world_does_not_divide(ranks):
    ranks(3, _ragged)


def _disabled(rank: int, world: int) -> str:
    import os

    os.environ["UNDERTOW_DISABLE"] = "1"
    matmul_reduce_scatter(torch.ones(4, 2), torch.ones(2, 2))
    text = team_of(None).explain()
    close_teams()
    return text


def test_the_switch_turns_overlap_off_and_says_so(ranks):
    assert set(ranks(2, _disabled)) == {"matmul_reduce_scatter M=4 N=2 K=2 float32: sequential (UNDERTOW_DISABLE)"}
    assert ARMS[0].overlap is False


def _groups_come_and_go(rank: int, world: int) -> None:
    a = torch.ones(2, 2)
    first = team_for(None, a)
    assert team_for(None, a) is first is team_of(None) and team_for(first, a) is first
    other = dist.new_group([0])
    assert team_for(other, a) is team_for(other, a) is not first and team_for(None, a) is first
    close_teams()
    assert team_for(None, a) is not first
    close_teams()
    store = dist.HashStore()
    dist.destroy_process_group()
    with pytest.raises(UserError, match="no process group"):
        team_for(None, a)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    assert team_for(None, a).group is dist.group.WORLD
    close_teams()


def test_a_team_is_found_again_while_its_group_is_there(ranks):
    ranks(1, _groups_come_and_go)


def _in_columns(rank: int, world: int, seed: int) -> None:
    """A row-parallel layer with a bias, 7 tokens and 5 columns: like the whole layer, forward and backward, to the
    rounding of sums of 12 in float64."""
    generator = torch.Generator().manual_seed(seed)
    x, target = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((7, 2, 12), (7, 2, 5)))
    whole = torch.nn.Linear(12, 5, dtype=torch.float64)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    wide = x.clone().requires_grad_()
    want = whole(wide)
    (want * target).sum().backward()
    with contextlib.closing(Team(overlap="columns, 4 pieces")) as team:
        layer = RowParallelLinear.from_linear(copy.deepcopy(whole), team)
        here = x.chunk(world, -1)[rank].clone().requires_grad_()  # a part of each row: it is not contiguous
        out = layer(here)
        mine = token_share(7, team)
        torch.testing.assert_close(out, want[mine], rtol=1e-12, atol=1e-12)
        (out * target[mine]).sum().backward()
        assert wide.grad is not None and here.grad is not None and whole.weight.grad is not None
        torch.testing.assert_close(here.grad, wide.grad.chunk(world, -1)[rank], rtol=1e-12, atol=1e-12)
        found = [p.grad.to_local() for p in layer.parameters()]
        for got, full in zip(found, (whole.weight.grad.chunk(world, 1)[rank], whole.bias.grad), strict=True):
            torch.testing.assert_close(got, full, rtol=1e-12, atol=1e-12)
        why = "sequential (one rank)" if world == 1 else "columns, 4 pieces (as asked for)"
        assert f"matmul_reduce_scatter M=14 N=5 K={12 // world} float64: {why}" in team.explain()


@pytest.mark.parametrize("world", [1, 3])
def test_a_layer_in_columns_is_the_whole_layer(ranks, seed, world):
    ranks(world, _in_columns, seed)


def _plainly(rank: int, world: int, seed: int) -> None:
    """Zeros and ones: every order of sums gives the same bits."""
    generator = torch.Generator().manual_seed(seed + rank)
    a, b = (
        _bits(6 * world, 5, dtype=torch.float32, generator=generator),
        _bits(5, 3, dtype=torch.float32, generator=generator),
    )
    with contextlib.closing(Team(overlap="off")) as team:
        sizes = (6,) * world
        assert torch.equal(overlap_plain.reduce_scatter(a, b, 6, team.group), team.reduce_scatter(a, b, sizes))
        assert torch.equal(overlap_plain.all_reduce(a, b, team.group), team.all_reduce(a, b, sizes))
        whole, outs = overlap_plain.all_gather(a[:6], [b, b], 6 * world, team.group)
        wanted, wants = team.all_gather(a[:6], [b, b], sizes)
        assert torch.equal(whole, wanted) and all(map(torch.equal, outs, wants))


def test_what_has_settled_on_the_collective_is_the_same_bits(ranks, seed):
    ranks(2, _plainly, seed)


class _Untouched(CudaOverlapEngine):
    """An engine of GPUs that nobody may use."""

    def __init__(self) -> None:
        pass


def _sequentially(rank: int, world: int, seed: int) -> None:
    """Zeros and ones: every order of sums gives the same bits."""
    generator = torch.Generator().manual_seed(seed + rank)
    a, b = (_bits(*shape, dtype=torch.float32, generator=generator) for shape in ((6 * world, 5), (5, 3)))
    with contextlib.closing(Team(overlap="off")) as team:
        sizes, ways = (6,) * world, Ways(_Untouched(), team.group, None)
        plan = team.engine.plan(sizes)
        assert torch.equal(ways.of(SCATTER, plan, SEQUENTIAL, a.dtype)(a, b), team.reduce_scatter(a, b, sizes))
        assert torch.equal(ways.of(SUM, plan, SEQUENTIAL, a.dtype)(a, b), team.all_reduce(a, b, sizes))
        whole, outs = ways.of(GATHER, plan, SEQUENTIAL, a.dtype)(a[:6], [b, b])
        wanted, wants = team.all_gather(a[:6], [b, b], sizes)
        assert torch.equal(whole, wanted) and all(map(torch.equal, outs, wants))
        for other in ((SCATTER, team.engine.plan((5, 7)), SEQUENTIAL), (SCATTER, plan, ARMS[1])):
            with pytest.raises(AttributeError):  # unequal shares and pieces are the engine's
                ways.of(*other, a.dtype)(a, b)


def test_the_sequential_arm_of_gpus_never_sees_the_engine(ranks, seed):
    """So that it is measured by the way that it settles on, and no arm wins against a slower one."""
    ranks(2, _sequentially, seed)


def _settled(rank: int, world: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(seed + rank)
    a, b, shard = (
        _bits(*shape, dtype=torch.float32, generator=generator) for shape in ((4 * world, 5), (5, 3), (4, 5))
    )
    with contextlib.closing(Team(overlap="on")) as team:

        def call() -> list[torch.Tensor]:
            whole, outs = all_gather_matmul(shard, [b], 0, team)
            assert whole is not None
            alone = all_gather_matmul(shard, [b], 0, team, return_A=False)
            assert alone[0] is None
            scattered = matmul_reduce_scatter(a, b, "sum", 0, team)
            return [scattered, matmul_all_reduce(a, b, "sum", team), whole, *outs, *alone[1]]

        wanted, found = call(), [len(team.ways)]
        with monkeypatch.context() as patch:  # neither checked nor asked for by its rows any more
            for name in ("reduce_scatter", "all_reduce", "all_gather"):
                patch.setattr(Team, name, lambda *_: pytest.fail("a settled product went the long way"))
            assert all(map(torch.equal, call(), wanted))
        with pytest.raises(UserError, match="a product of"):
            matmul_reduce_scatter(a, b.double(), "sum", 0, team)
        with torch.autocast("cpu", torch.bfloat16):
            assert {x.dtype for x in call()} == {torch.bfloat16}
        weight = b.clone().requires_grad_()
        matmul_reduce_scatter(a, weight, "sum", 0, team).sum().backward()
        assert weight.grad is not None and torch.equal(weight.grad, a.sum(0)[:, None].expand(5, 3))
        with torch.no_grad():
            assert not matmul_reduce_scatter(a, weight, "sum", 0, team).requires_grad
        assert torch.equal(matmul_reduce_scatter(a, b, "sum", 0, team), wanted[0])
        assert found == [6]  # each of three products by its case, and by its matrices


def test_a_settled_product_is_one_look_up_away_and_knows_casts_and_gradients(ranks, seed, monkeypatch):
    ranks(2, _settled, seed, monkeypatch)


def _made_first(rank: int, world: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros and ones: every order of sums gives the same bits."""
    generator = torch.Generator().manual_seed(seed + rank)
    a, b = (_bits(*shape, dtype=torch.float32, generator=generator) for shape in ((6 * world, 5), (5, 3)))
    summed, handed = a @ b, list[bool]()
    dist.all_reduce(summed)
    for name in ("reduce_scatter", "all_reduce"):
        plainly = getattr(overlap_plain, name)

        def spied(*operands: Any, plainly: Any = plainly) -> torch.Tensor:
            handed.append(operands[-1] is not None)
            return plainly(*operands)

        monkeypatch.setattr(overlap_plain, name, spied)
    mine, sizes = slice(6 * rank, 6 * rank + 6), (6,) * world
    with contextlib.closing(Team(overlap="off")) as team:
        team._making = Ways(_Untouched(), team.group, None)
        for _ in range(2):
            assert torch.equal(matmul_reduce_scatter(a, b, "sum", 0, team), summed[mine])
            assert torch.equal(matmul_all_reduce(a, b, "sum", team), summed)
            assert torch.equal(team.reduce_scatter(a, b, sizes), summed[mine])
            assert torch.equal(team.all_reduce(a, b, sizes), summed)
        assert handed == [False, False, *[True] * 6]  # what has not settled makes its own
        deep = a.view(2 * world, 3, 5)
        assert torch.equal(matmul_reduce_scatter(deep, b, "sum", 0, team).flatten(0, 1), summed[mine])
        for fits_not in (b.double(), b.t().contiguous()):
            with pytest.raises(UserError, match="a product of"):
                matmul_reduce_scatter(a, fits_not, "sum", 0, team)
        weight = b.clone().requires_grad_()
        matmul_reduce_scatter(a, weight, "sum", 0, team).sum().backward()
        assert weight.grad is not None and torch.equal(weight.grad, a.sum(0)[:, None].expand(5, 3))


def test_a_product_that_is_guessed_to_stay_plain_is_made_before_it_is_looked_up(ranks, seed, monkeypatch):
    """A GPU waits for the look-up, and nothing after the product makes up for that where the product is the longer."""
    ranks(2, _made_first, seed, monkeypatch)


def test_only_where_every_product_of_so_many_numbers_stays_plain_is_that_guessed():
    guesses = Guesses()
    for case, plain, guessed in (
        ("one", True, True),
        ("two", None, False),
        ("two", True, True),
        ("three", False, False),  # one that overlaps is never handed a product
        ("one", True, False),
        ("three", None, False),
        ("three", True, True),  # it overlaps no longer
    ):
        guesses.settle(case, 12, plain)
        assert (12 in guesses.plain) == guessed
    guesses.settle("four", 13, True)
    assert guesses.plain == {12, 13}


def test_a_way_lasts_for_so_many_calls_but_not_into_a_graph_of_the_callers():
    capturing, over = [False], list[int]()
    way = Lasting(lambda a: a + 1, 3, lambda: over.append(1), lambda: capturing[0])
    assert [way(k) for k in range(2)] == [1, 2] and over == []
    capturing[0] = True
    assert way(5) == 6 and over == []
    capturing[0] = False
    assert way(6) == 7 and over == [1]


def _checked(rank: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock says what a way takes: one piece half of the sequential way, later twice as much on rank 1."""
    a, b = torch.ones(6, 5), torch.ones(5, 3)
    wanted = torch.full((6 // world, 3), 5.0 * world)
    slow, now_s, taken = [1e-4], [0.0], list[str]()
    with contextlib.closing(Team()) as team:
        team.gate = Gate(ARMS[:2], team._gather, short_s=1e9)
        made = team._making

        class Timed:
            def of(self, kind: str, plan: ChunkPlan, arm: Any, dtype: torch.dtype) -> Any:
                def way(*operands: Any) -> Any:
                    taken.append(arm.name)
                    now_s[0] += 2e-4 if arm == SEQUENTIAL else slow[0]
                    return made.of(kind, plan, arm, dtype)(*operands)

                return way

            def __getattr__(self, name: str) -> Any:
                return getattr(made, name)

        team._making = Timed()  # type: ignore[assignment]
        monkeypatch.setattr(team, "_now", lambda: now_s[0])

        def call(times: int) -> list[str]:
            taken.clear()
            for _ in range(times):
                assert torch.equal(matmul_reduce_scatter(a, b, "sum", 0, team), wanted)
            return list(taken)

        one, again = ARMS[1].name, (1 + ROW) * (AGAIN + 1)  # each call of a second trial, and a row of them
        assert sorted(call(2 * (ROUNDS + 1))) == [one] * (ROUNDS + 1) + ["sequential"] * (ROUNDS + 1)
        assert sorted(call(2 * (AGAIN + 1))) == [one] * again + ["sequential"] * again
        assert call(CHECK) == [one] * CHECK  # the first of them settles it
        assert f"{one}: measured 2.00× (surely 2.00×)" in team.explain()
        assert sorted(call(2 * (AGAIN + 1))) == [one] * again + ["sequential"] * again
        assert set(call(1)) == {one} and f"{one} (measured, and again in a later check; " in team.explain()
        assert set(call(RARER * CHECK - 1)) == {one} and f"{one}, being checked (measured" in team.explain()
        if rank == 1:
            slow[0] = 4e-4
        assert sorted(call(2 * (AGAIN + 1))) == [one] * again + ["sequential"] * again
        assert set(call(RARER * RARER * CHECK // 40)) == {"sequential"} and "no gain in a later check" in team.explain()
        monkeypatch.setattr(team, "_capturing", lambda: True)  # another product, first met while a graph is captured
        assert torch.equal(matmul_reduce_scatter(a.double(), b.double(), "sum", 0, team), wanted.double())
        assert taken[-1] == "sequential" and len(team.gate._trials) == 1


def test_what_overlaps_is_checked_later_and_given_up_where_it_gains_nothing(ranks, monkeypatch):
    ranks(2, _checked, monkeypatch)


def _engine_of_cpus(rank: int, world: int) -> None:
    with contextlib.closing(Team(overlap="off")) as team:
        a, b = torch.ones(6, 5), torch.ones(5, 3)
        for _ in range(2):  # it makes its products itself
            assert torch.equal(matmul_reduce_scatter(a, b, "sum", 0, team), torch.full((6 // world, 3), 5.0 * world))
        assert team.firsts == set()


def test_nothing_is_guessed_of_the_engine_of_cpus(ranks):
    ranks(2, _engine_of_cpus)


def _slowest_host(rank: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = [Queueing(1.0, 4.0), Queueing(2.0, 3.0)][rank]
    machine = Machine("made up", links={"nccl": Link(0.0, 1e11)}, flops={"gemm/float32": 1e15})
    with contextlib.closing(Team(machine=machine)) as team:
        assert team.queueing() == Queueing()  # a CPU's engine has threads for that
        asked = list[Any]()
        monkeypatch.setattr(overlap_team, "measure", lambda engine, start: asked.append(engine) or mine)
        real, team.engine, team._recorder = team.engine, _Untouched(), None
        team.device = torch.device("cuda")  # of which nothing is used but its name
        try:
            rates = team._rates("float32")
            assert rates is not None and rates.queueing == Queueing() and not asked  # nothing that records, no GPU
            team._recorder = object()  # type: ignore[assignment]
            for _ in range(2):
                rates = team._rates("float32")
                assert rates is not None and rates.queueing == Queueing(2.0, 4.0) == team.queueing()
            assert len(asked) == 1
        finally:
            team.engine = real


def test_the_model_reckons_with_the_slowest_host(ranks, monkeypatch):
    ranks(2, _slowest_host, monkeypatch)


def test_a_product_that_has_settled_keeps_the_recordings_of_its_own_arm_alone():
    class Recorder:
        def __init__(self) -> None:
            self.dropped: list = []

        def drop(self, *case: object) -> None:
            self.dropped.append(case)

    class Engine(_Untouched):
        def plan(self, sizes: tuple[int, ...], subchunks: int, columns: int, *, whole: bool) -> ChunkPlan:
            return ChunkPlan(0, sizes, subchunks, columns=columns, whole=whole)

    arms, sizes = [arm for arm in CUDA_ARMS if arm.replayed], (8, 8)
    cases = [(cut(arm, 0, sizes, 64), 64, torch.bfloat16) for arm in arms]
    for chosen, dropped in ((arms[1], [cases[0], *cases[2:]]), (SEQUENTIAL, cases)):
        recorder: Any = Recorder()
        Ways(Engine(), None, recorder).settle(CUDA_ARMS, chosen, sizes, 64, torch.bfloat16)  # type: ignore[arg-type]
        assert recorder.dropped == dropped
