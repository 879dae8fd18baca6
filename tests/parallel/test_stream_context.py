"""Streaming with a sequence spread over two gloo ranks: one process's gradients, and rings called alike on both."""

import collections
import contextlib
import copy

import pytest
import torch

from undertow.comms import p2p
from undertow.comms.gradients import GradientAverage
from undertow.parallel import enable_context_parallel, token_ring_attention
from undertow.parallel.context_parallel import ContextParallel
from undertow.parallel.memory_model import DecoderShape
from undertow.parallel.stream import stream_backprop
from undertow.parallel.stream.ring_memory import ring_bytes
from undertow.parallel.token_ring import api, gate

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow  # on the checkout only
LAYERS, LENGTH = 4, 43
KEPT, AGAIN = {"forward": LAYERS, "backward": LAYERS}, {"forward": 2 * LAYERS, "backward": LAYERS}


def budgets(rank):
    """So much on rank 0 that it would keep every graph, and so little on rank 1 that it keeps nothing it need not."""
    return {"budget_bytes": None if rank == 0 else 300_000, "host_budget_bytes": 0}


# What a rank asks for, and how often the ring must run on every rank.
WAYS = {
    "all that fits": (lambda rank: {}, KEPT),
    "nobody to agree with": (lambda rank: {"ranks": None}, AGAIN),
    "chunks of one's own": (lambda rank: {"chunk": 5 + rank, "stash": False}, AGAIN),
    "kept": (lambda rank: {"chunk": 7, "stash": True, "offload": rank == 0}, KEPT),
    "every third": (
        lambda rank: {"chunk": 8 - rank, "every": 3, "stash": False},
        {"forward": 2 * LAYERS + 2, "backward": LAYERS},
    ),
    "agreed": (budgets, None),
}


@contextlib.contextmanager
def counted():
    """Calls of the ring by phase."""
    counts, run = collections.Counter(), api._run

    def counting(call, backward, inputs):
        counts["backward" if backward else "forward"] += 1
        return run(call, backward, inputs)

    api._run = counting
    yield counts
    api._run = run


def spread(rank, world, model, batch):
    handle = enable_context_parallel(model)
    average, found = GradientAverage(model.parameters()), {}

    def attend(q, k, v, *, positions=None, scale=None, window=None):
        assert gate.is_lean(), "a plan counts the plain ring's buffers: no schedule with more may be tried"
        return handle.context.attend(q, k, v, scale=scale, window=window)

    for way, (options, _) in WAYS.items():
        model.zero_grad(set_to_none=True)
        with (
            counted() as counts,
            stream_backprop(model, attend=attend, **{"ranks": handle.context, **options(rank)}) as engine,
        ):
            output = model(**batch)
            output.loss.backward()
        assert set(engine.report().values()) == {"streamed"}
        average()
        plan, grads = engine.last_plan, {n: p.grad.numpy().copy() for n, p in model.named_parameters()}
        found[way] = output.loss.item(), dict(counts), (plan.every, plan.settled, len(plan.bounds)), grads
    handle.disable()
    return found


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_one_process_gradients_and_a_ring_that_all_ranks_call_alike(
    name, ranks, family, gradients_of, assert_same_gradients, seed
):
    model = family(name, num_hidden_layers=LAYERS)
    ids = torch.randint(3, 97, (1, LENGTH))
    labels = ids.masked_fill(torch.rand(1, LENGTH) < 0.3, -100)
    batch = dict(input_ids=ids, labels=labels, position_ids=torch.cat([torch.arange(19), torch.arange(24)])[None])
    loss, exact = gradients_of(model, **batch, use_cache=False)
    first, second = ranks(2, spread, copy.deepcopy(model), batch)
    for way, (_, wanted) in WAYS.items():
        for result in (first, second):
            mine, counts, _, grads = result[way]
            assert mine == pytest.approx(loss.item(), abs=2e-6)
            assert_same_gradients({n: torch.from_numpy(g) for n, g in grads.items()}, exact, 2e-5)
            assert wanted is None or counts == wanted, way
        assert first[way][1] == second[way][1], way
        assert first[way][2][:2] == second[way][2][:2], way
    assert first["agreed"][2][1] < LAYERS, "rank 0 alone would have kept everything"
    assert first["chunks of one's own"][2][2] != second["chunks of one's own"][2][2]


def allocated(rank, world, shape, dtype, tokens, batch):
    """Bytes that one call of the ring holds on this rank, by phase: the executor's memory, the most of what kernels
    return that is alive at once in place of it, and copies of inputs."""
    bytes_of = collections.Counter()
    run, copying, phase = api._run, api._rows_first, ["forward"]

    class Counted(p2p.Storage):
        def __init__(self, layout, inputs, **how):
            super().__init__(layout, inputs, **how)
            memory = {}
            for name, value in layout.values.items():
                if name in self.former or value.role == "input" or value.dtype == "token":
                    continue  # kept when it is there; the caller's; a token is one byte to lanes, and none to plans
                memory[self.tensors[name].untyped_storage().data_ptr()] = self.tensors[name].untyped_storage()
            bytes_of[phase[0]] += sum(storage.nbytes() for storage in memory.values())
            self.most = 0

        def adopt(self, name, tensor, **how):
            super().adopt(name, tensor, **how)
            kept = [self.tensors[other].untyped_storage() for other in self.former if other in self.tensors]
            now = sum({storage.data_ptr(): storage.nbytes() for storage in kept}.values())
            bytes_of[phase[0]] += max(0, now - self.most)
            self.most = max(self.most, now)

    def running(call, backward, inputs):
        phase[0] = "backward" if backward else "forward"
        bytes_of[phase[0]] += sum(copies)
        copies.clear()
        return run(call, backward, inputs)

    def rows_first(x):
        y = copying(x)
        copies.append(0 if y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() else y.nbytes)
        return y

    copies: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(p2p, "Storage", Counted)
        patch.setattr(api, "_run", running)
        patch.setattr(api, "_rows_first", rows_first)
        q, k, v = (
            torch.randn(batch, tokens, heads, shape.head_dim, dtype=dtype, requires_grad=True)
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        )
        out = token_ring_attention(
            q, k, v, causal=True, lengths=(tokens * world,) * 2, schedule="ring_kv", backward_schedule="ring_kv"
        )
        out.backward(torch.ones_like(out))
    return bytes_of["forward"], bytes_of["backward"]


@pytest.mark.parametrize("world", [2, 3])
def test_plans_count_the_bytes_that_the_ring_allocates(world, ranks):
    for dtype, batch, heads in ((torch.float32, 1, (4, 2)), (torch.bfloat16, 1, (4, 4)), (torch.bfloat16, 2, (4, 2))):
        shape = DecoderShape(1, 64, *heads, 16, 192, 512, 1000, element_size=dtype.itemsize)
        found = ranks(world, allocated, shape, dtype, 128, batch)
        planned = ring_bytes(shape, 128 * batch, world, batch=batch, kernel=False)
        assert tuple(map(max, zip(*found))) == planned, (dtype, batch)


def least_of(rank, world):
    context = ContextParallel(None, 8)
    return context.least(7 - rank), context.least(-3 - rank), ContextParallel(None, 8).least(2**40 + rank)


def test_ranks_agree_on_the_least(ranks):
    assert ranks(2, least_of) == [(6, -4, 2**40)] * 2
    assert ContextParallel(None, 8).least(5) == 5
