"""Streaming under DDP and FSDP2 on two gloo ranks: the gradients of one process, and collectives counted."""

import collections
import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from undertow.parallel.stream import stream_backprop

pytest.importorskip("transformers")

pytestmark = pytest.mark.slow  # on the checkout only
TOKENS = 21


def batch_of(rank):
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randint(3, 97, (2, TOKENS), generator=generator)


def exact_gradients(model, world):
    """Mean over ranks of plain gradients, in this process."""
    for rank in range(world):
        ids = batch_of(rank)
        (model(input_ids=ids, labels=ids).loss / world).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return grads


class Collectives(TorchDispatchMode):
    """Counts collectives and the elements that they move."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.counts[func.overloadpacket.__name__] += 1
            self.counts["elements"] += sum(t.numel() for t in tensors)
        return func(*args, **(kwargs or {}))


def assert_close(mine, exact):
    for name in exact:
        error = (mine[name] - exact[name]).norm() / exact[name].norm().clamp_min(1e-12)
        assert error <= 1e-5, f"{name}: {error:.2e}"


# Chunk lengths differ between ranks, or one keeps all graphs: no collective may depend on it.
WAYS = {
    "plain": dict,
    "streamed": lambda rank: {"chunk": 5 + rank, "offload": True, "stash": True},
    "graphs on one": lambda rank: {"chunk": 6, "stash": True} if rank else {},
}


def under_ddp(rank, world, make):
    torch.manual_seed(0)
    model = make()
    exact = exact_gradients(model, world)
    fired = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: fired.append(name))
    wrapped = DistributedDataParallel(model)
    ids = batch_of(rank)
    reduced = []

    def counted(state, bucket):
        reduced.append(bucket.buffer().numel())
        work = dist.all_reduce(bucket.buffer().div_(world), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    wrapped.register_comm_hook(None, counted)
    totals = {}
    for way, options in WAYS.items():
        for _ in range(2):  # DDP rebuilds its buckets after the first step
            reduced.clear(), fired.clear()
            model.zero_grad(set_to_none=True)
            if way == "plain":
                wrapped(input_ids=ids, labels=ids).loss.backward()
            else:
                with stream_backprop(model, **options(rank)) as engine:
                    wrapped(input_ids=ids, labels=ids).loss.backward()
                assert ("graph" in engine.last_plan.inputs) == (way == "graphs on one" and rank == 0)
                assert set(engine.report().values()) == {"streamed"}
        totals[way] = len(reduced), sum(reduced)
        assert sorted(fired) == sorted(name for name, _ in model.named_parameters())
    assert_close({n: p.grad for n, p in model.named_parameters()}, exact)
    return len({*totals.values()}) == 1, totals


def under_fsdp(rank, world, make, head_apart):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = make()
    exact = exact_gradients(model, world)
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    if head_apart:
        fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ids, counts = batch_of(rank), {}
    for way, options in WAYS.items():
        model.zero_grad(set_to_none=True)
        with Collectives() as mode:
            if way == "plain":
                model.gradient_checkpointing_enable({"use_reentrant": False})
                model(input_ids=ids, labels=ids).loss.backward()
                model.gradient_checkpointing_disable()
            else:
                with stream_backprop(model, **{**options(rank), "offload": None}) as engine:
                    model(input_ids=ids, labels=ids).loss.backward()
                assert set(engine.report().values()) == {"streamed"}
        counts[way] = dict(mode.counts)
        assert_close({n: p.grad.full_tensor() for n, p in model.named_parameters()}, exact)
    return counts


def accumulated(rank, world, make):
    """Per way of sharding: gradients of three backward passes of which one is reduced, and thrice those of one."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    wrapped = DistributedDataParallel(make())
    torch.manual_seed(0)
    sharded = make()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*sharded.model.layers, sharded):
        fully_shard(module, mp_policy=policy)
    ids, found = batch_of(rank), {}

    def unreduced(model, last):
        if model is wrapped:
            return contextlib.nullcontext() if last else model.no_sync()
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
        return contextlib.nullcontext()

    for name, model in (("ddp", wrapped), ("fsdp2 in bfloat16", sharded)):
        grads = []
        for passes in (1, 3):
            model.zero_grad(set_to_none=True)
            with stream_backprop(model, chunk=5 + rank, stash=True) as engine:
                for turn in range(passes):
                    with unreduced(model, turn == passes - 1):
                        model(input_ids=ids, labels=ids).loss.backward()
            assert set(engine.report().values()) == {"streamed"}
            whole = {n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for n, p in model.named_parameters()}
            grads.append({n: g / passes for n, g in whole.items()})
        assert all(g.dtype == torch.float32 for g in grads[1].values())
        assert_close(grads[1], grads[0])
        found[name] = grads[0]
    for name, exact in found["ddp"].items():  # rounded to bfloat16 in every product: 2^-9 each, a few dozen of them
        mine = found["fsdp2 in bfloat16"][name.removeprefix("module.")]
        assert (mine - exact).norm() <= 2**-4 * exact.norm(), name
    return sorted(found)


def test_gradients_accumulate_before_they_are_reduced(ranks, family):
    assert (
        ranks(2, accumulated, lambda: family("qwen3", tie_word_embeddings=True)) == [["ddp", "fsdp2 in bfloat16"]] * 2
    )


@pytest.mark.parametrize("tied", [False, True])
def test_ddp_sends_what_it_sent_before(ranks, family, tied):
    results = ranks(2, under_ddp, lambda: family("llama", tie_word_embeddings=tied))
    assert all(same for same, _ in results), results


@pytest.mark.parametrize("head_apart", [False, True])
def test_fsdp2_gathers_and_reduces_as_often_as_checkpointing(ranks, family, head_apart):
    for counts in ranks(2, under_fsdp, lambda: family("qwen3"), head_apart):
        assert counts["streamed"] == counts["graphs on one"] == counts["plain"] and counts["plain"]
