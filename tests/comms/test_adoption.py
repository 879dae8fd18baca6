"""What a block's kernel returns is the partial result itself: no copy, the same bits, and no more of them alive."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from undertow.comms import local
from undertow.comms.actions import Compute
from undertow.comms.adoption import adoptable
from undertow.comms.builders.attention_shape import Heads
from undertow.comms.graph import build
from undertow.comms.ops import Giving
from undertow.comms.p2p import P2P
from undertow.comms.queue_order import own_lanes
from undertow.comms.schedule_text import parse
from undertow.comms.storage import Storage, layout_of
from undertow.parallel.masks import Mask
from undertow.parallel.token_ring.block_ops import ops
from undertow.parallel.token_ring.problem import SCHEDULES, Problem

NO_GPU = pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
NAMES = ("ring_kv", "ring_kv_joined", "all_gather_kv_joined", "token_ring", "ring_kv_bidirectional", "ulysses_ring")


class Copies(TorchDispatchMode):
    """Counts copies in this thread, which is the one that computes blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in ("copy_", "clone", "_to_copy")
        return func(*args, **(kwargs or {}))


def blank(value, rows):
    return torch.empty(rows, *map(int, value.shape[1:]), dtype=getattr(torch, value.dtype))


def given(plan, rank):
    return {n: blank(v, v.rows).normal_() for n, v in plan.by_rank[rank].items() if v.role == "input"}


def filling(table):
    """The same operations, none of which gives."""
    return {name: op.fill if isinstance(op, Giving) else op for name, op in table.items()}


def results(plan, rank):
    """How many results of blocks there are on `rank`, and how many of them an executor may adopt."""
    graph = build(plan)
    lane = own_lanes(graph)[rank]
    mine = [a for r, _, _, a in plan.actions() if r == rank and isinstance(a, Compute) and a.op.startswith("attend")]
    kept = adoptable(graph, rank, lane, frozenset(a.op for a in mine)).former
    names = [part.value for a in mine for part in a.writes]
    return len(names), sum(name in kept for name in names)


def _copied(rank, world):
    """By schedule and phase: copies of a run that fills and of one that adopts, results of blocks, those adopted."""
    problem = Problem(world, 32 * world, 32 * world, Heads(1, 4, 2, 16, 16, "bfloat16"), Mask())
    table, found = ops(problem, 1, 0.25), {}
    with P2P(timeout_s=240) as executor:
        for name, backward in itertools.product(("ring_kv", "token_ring", "all_gather_kv_joined"), (False, True)):
            plan = problem.schedule(name, backward=backward)
            inputs, counts = given(plan, rank), []
            for way in (filling(table), table):
                executor.run(plan, inputs, way)
                with Copies() as copies:
                    executor.run(plan, inputs, way)
                counts.append(copies.count)
            found[name, backward] = (*counts, *results(plan, rank))
    return found


def test_nothing_is_copied_out_of_a_kernel(ranks):
    """A copy fewer for each adopted result; of a forward block's two, and of dq, dk and dv, none is left."""
    for found in ranks(4, _copied):
        for (name, backward), (filled, adopted, count, kept) in found.items():
            if name == "all_gather_kv_joined" and backward:  # dk and dv of one call are parts of one tensor
                assert filled - kept < adopted < filled
            else:
                assert adopted == filled - kept, (name, backward)
            assert kept == count, (name, backward)
            if not backward:
                assert adopted == 0, name


def _bits(rank, world, inputs, streams):
    """Every schedule and phase, twice, with lanes as threads or queued by one."""
    found = []
    with P2P(timeout_s=240) as executor:
        executor._streams = None if streams is None else streams()
        for problem, name, backward, mine in inputs:
            plan, table = problem.schedule(name, backward=backward), ops(problem, problem.inner(name), 0.3)
            runs = [executor.run(plan, mine[rank], table) for _ in range(2)]
            found.append([{n: x.float().numpy() for n, x in run.items()} for run in runs])
    return found


@pytest.mark.parametrize("queued", [False, True])
def test_the_bits_are_those_of_copies(queued, ranks, seed, fake_streams):
    """Against `local`, which fills the memory that the schedule names: batches, grouped heads, blocks of several
    calls, partial results of 16 bits and of 32."""
    cases = []
    for mask, layout, dtype, batch in (
        (Mask(True), "zigzag", "bfloat16", 1),
        (Mask(), "contiguous", "float32", 2),
        (Mask(True, window=9), "striped", "bfloat16", 2),
    ):
        problem = Problem(4, 45, 45, Heads(batch, 4, 4, 8, 8, dtype), mask, layout)
        cases += [(problem, name, b, [given(problem.schedule(name, backward=b), r) for r in range(4)])
                  for name, b in itertools.product(NAMES, (False, True))]  # fmt: skip
    found = ranks(4, _bits, cases, fake_streams if queued else None)
    for at, (problem, name, backward, inputs) in enumerate(cases):
        plan = problem.schedule(name, backward=backward)
        wanted = local.run(plan, inputs, ops(problem, problem.inner(name), 0.3), seed=seed)
        for rank, run in itertools.product(range(4), (0, 1)):
            for result, x in wanted[rank].items():
                got = torch.from_numpy(found[rank][at][run][result])
                assert torch.equal(got, x.float()), (name, backward, result, rank)


def _alive(rank, world, streams):
    """By schedule and phase: the most adopted tensors alive at once, slots for them, and how many there were."""
    problem = Problem(world, 12 * world, 12 * world, Heads(1, 2, 2, 8, 8), Mask())
    found = {}
    with P2P(timeout_s=240) as executor:
        executor._streams = None if streams is None else streams()
        for name, backward in itertools.product(("token_ring", "ring_kv"), (False, True)):
            plan = problem.schedule(name, backward=backward)
            made, most = list[Any](), [0]
            table = dict(ops(problem, 1, 0.3))

            def watched(op):
                def give(reads, **params):
                    parts = op.give(reads, **params)
                    if parts is not None:
                        made.extend(weakref.ref(x) for x in parts)  # noqa: B023
                        most[0] = max(most[0], sum(x() is not None for x in made))  # noqa: B023
                    return parts

                return Giving(op.fill, give, op.loose)

            table |= {n: watched(op) for n, op in table.items() if isinstance(op, Giving)}
            inputs = given(plan, rank)
            executor.run(plan, inputs, table)  # a rehearsal, if lanes are streams
            made.clear()
            most[0] = 0
            executor.run(plan, inputs, table)
            graph = build(plan)
            former = adoptable(graph, rank, own_lanes(graph)[rank], frozenset(table)).former
            slots = {plan.by_rank[rank][n].slot or n for n in former}
            left = sum(x() is not None for x in made)
            found[name, backward] = most[0], len(slots), len(made), left
    return found


@pytest.mark.parametrize("queued", [False, True])
def test_no_more_results_live_than_the_schedule_has_slots(queued, ranks, fake_streams):
    for found in ranks(5, _alive, fake_streams if queued else None):
        for key, (most, slots, _, left) in found.items():
            assert most <= slots and left == 0, key
        assert any(made > slots for _, slots, made, _ in found.values())  # some slot was taken over


@pytest.mark.parametrize("device", DEVICES)
def test_a_sum_takes_results_as_kernels_leave_them(device, seed):
    """On a GPU the log-sum-exp of a kernel has heads first; bit for bit what copies give. Backward likewise."""
    problem = Problem(2, 512, 512, Heads(1, 4, 2, 64, 64, "bfloat16"), Mask(True))
    table: Any = ops(problem, 1, 0.125)
    for backward in (False, True):
        plan = problem.schedule("ring_kv", backward=backward)
        block = next(a for _, _, _, a in plan.actions() if isinstance(a, Compute) and a.op.startswith("attend"))
        values = plan.by_rank[0]
        of = [(part.rows, values[part.value]) for part in block.reads]
        reads = [blank(v, n).normal_().to(device) for n, v in of]
        op = table[block.op]
        parts = op.give(reads, **dict(block.params))
        assert parts[0].is_contiguous() and parts[0].dtype == torch.bfloat16
        copies = [torch.empty(x.shape, dtype=x.dtype, device=device) for x in parts]
        for copy, part in zip(copies, op.give(reads, **dict(block.params))):
            copy.copy_(part)
        if backward:
            return
        summed = []
        for out, lse in (parts, copies):
            total = [torch.empty(out.shape, device=device), torch.empty(lse.shape, device=device)]
            table["merge_lse"]([out, lse, out, lse], total)
            summed.append(total)
        for one, other in zip(*summed):
            assert torch.equal(one, other)


TWO_IN_A_SLOT = """schedule s
world 2
value x float32[2] input
value a float32[2] scratch in s.0
value b float32[2] scratch in s.0
value c float32[2] scratch
value t token[1] scratch
value out float32[2] output

rank 0
lane compute
  compute make(x[0:2]) => a[0:2]
  compute use(a[0:2]) => t[0:1]
  compute make(x[0:2]) => c[0:2]
  compute use(c[0:2], b[0:2]) => out[0:2]
lane in
  wait (t[0:1])
  recv <- 1 m => b[0:2]

rank 1
lane compute
  compute make(x[0:2]) => a[0:2]
  compute make(a[0:2]) => b[0:2]
  compute make(x[0:1]) => c[0:1]
  compute make(x[1:2]) => c[1:2]
  compute make(c[0:2]) => out[0:2]
lane out
  send -> 0 m (b[0:2])
"""


def test_only_whole_scratch_of_slots_that_are_all_given_is_adopted():
    graph = build(parse(TWO_IN_A_SLOT))
    assert adoptable(graph, 0, "compute", frozenset({"make"})).former == {"c": ""}  # b comes by a message
    kept = adoptable(graph, 1, "compute", frozenset({"make"}))
    assert kept.former == {"a": "", "b": "a"} and kept.sent == {
        "b"
    }  # c is written in pieces, out belongs to the caller
    for lane, giving in (("in", {"make"}), ("compute", {"use"})):
        assert not adoptable(graph, 1, lane, frozenset(giving)).former


def test_what_does_not_fit_is_copied():
    layout = layout_of(parse(TWO_IN_A_SLOT.replace("float32[2]", "float32[2, 3]")), 1)
    storage = Storage(layout, {"x": torch.zeros(2, 3)}, former={"a": "", "b": "a"}, sent=frozenset({"b"}))
    whole, long = torch.randn(2, 3), torch.randn(4, 3)
    turned = torch.randn(3, 2).t()
    for name, tensor, loose, kept in (
        ("a", whole, False, True),
        ("a", turned, True, True),
        ("a", turned, False, False),
        ("b", turned, True, False),  # messages take dense memory
        ("a", long[1:3], False, False),  # the rest would live as long
        ("a", whole.double(), False, False),
    ):
        storage.adopt(name, tensor, loose=loose)
        assert (storage.tensors[name] is tensor) == kept
        assert torch.equal(storage.tensors[name], tensor.float()) and storage.tensors[name].dtype == torch.float32
        assert kept or storage.tensors[name].is_contiguous()


def test_every_schedule_has_results_to_adopt():
    problem = Problem(4, 64, 64, Heads(1, 4, 4, 8, 8, "bfloat16"), Mask())
    kept = Counter[str]()
    for name, backward in itertools.product((n for n in SCHEDULES if not problem.possible(n)), (False, True)):
        kept[name] += results(problem.schedule(name, backward=backward), 0)[1]
    assert len(kept) == len(SCHEDULES) and all(kept.values())
