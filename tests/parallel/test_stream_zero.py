"""Streaming under DeepSpeed ZeRO 2 and 3, two gloo ranks: gradients of one process, collectives free of the chunks."""

import collections
import importlib.util

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from undertow.parallel.stream import stream_backprop

pytest.importorskip("transformers")
if importlib.util.find_spec("deepspeed") is None:  # not imported here: that takes seconds where nothing of it runs
    pytest.skip("needs deepspeed: pip install 'undertow[deepspeed]'", allow_module_level=True)
TOKENS = 21


class Collectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def batch_of(rank):
    return torch.randint(3, 97, (2, TOKENS), generator=torch.Generator().manual_seed(100 + rank))


def exact_gradients(model, world):
    for rank in range(world):
        ids = batch_of(rank)
        (model(input_ids=ids, labels=ids).loss / world).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return grads


def under_zero(rank, world, make):
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for two minutes
    for stage in (2, 3):
        counts = under_stage(rank, world, make, stage)
        assert counts[0] == counts[1] == counts[2] and counts[0], (stage, counts)


def under_stage(rank, world, make, stage):
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    from undertow.dist.errors import UserError
    from undertow.parallel.stream.deepspeed_zero import prepare

    torch.manual_seed(0)
    model = make()
    exact = exact_gradients(model, world)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    optimizer = {"type": "Adam", "params": {"lr": 0.0, "torch_adam": True}}
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, "optimizer": optimizer}
    engine, *_ = deepspeed.initialize(model=prepare(model), config=config)
    ids, counts = batch_of(rank), []
    mixed = {"chunk": 6, "stash": True} if rank else {}  # whole graphs are kept on rank 0
    # Chunk lengths may differ between ranks.
    for options in ({"chunk": TOKENS, "stash": True}, {"chunk": 5 + rank, "stash": True}, mixed):
        with stream_backprop(model, **options) as stream:
            for _ in range(4):  # DeepSpeed compares what the ranks do in the first steps
                with Collectives() as mode:
                    engine.backward(engine(input_ids=ids, labels=ids).loss)
                assert set(stream.report().values()) == {"streamed"}, stream.report()
                for name, parameter in model.named_parameters():
                    error = (safe_get_full_grad(parameter) - exact[name]).norm() / exact[name].norm()
                    assert error <= 1e-5, f"{stage} {options} {name}: {error:.2e}"
                engine.step()
            if stage == 3:
                with pytest.raises(UserError, match="token_log_probs"):
                    model(input_ids=ids).logits.sum()
            with torch.no_grad():
                assert model(input_ids=ids).logits.sum().isfinite()
        counts.append(dict(mode.counts))
    return counts


@pytest.mark.slow
def test_gradients_of_one_process_whatever_the_chunks(ranks, family, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    import deepspeed.runtime.zero.muon.original_muon  # slow to import in each rank
    import deepspeed.runtime.zero.stage3  # noqa: F401

    ranks(2, under_zero, lambda: family("llama"))
