"""Models under context parallelism: loss and gradients are those of one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

from undertow.comms.gradients import GradientAverage
from undertow.dist.errors import UserError
from undertow.parallel import enable_context_parallel
from undertow.parallel.context_parallel import ContextParallel


def _train(rank, world, model, batches, options):
    """Gradients of each batch, on every rank after averaging."""
    handle = enable_context_parallel(model, **options)
    average = GradientAverage(model.parameters())
    found = []
    for batch in batches:
        model.zero_grad(set_to_none=True)
        output = model(**batch)
        output.loss.backward()
        average()
        whole = handle.unshard(output.logits.detach())
        grads = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
        found.append((output.loss.item(), whole.numpy(), grads))
    handle.disable()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world"), [("llama", 2), ("qwen3", 2), ("mistral", 3)])
def test_hf_models_train_as_on_one_process(name, world, ranks, seed, family, assert_same_gradients):
    model = family(name, attention_dropout=0.0)
    ids = torch.randint(3, 97, (2, 23))
    labels = ids.clone()
    labels[:, :4] = -100
    padding = torch.ones_like(ids)
    padding[1, 19:] = 0
    packed = torch.cat([torch.arange(n) for n in (7, 11, 5)])[None]
    batches = [
        dict(input_ids=ids, labels=labels),
        dict(input_ids=ids, labels=labels.masked_fill(padding == 0, -100), attention_mask=padding),
        dict(input_ids=ids[:1], labels=labels[:1], position_ids=packed),
    ]
    if world == 3:
        model.gradient_checkpointing_enable()
    results = ranks(world, _train, copy.deepcopy(model), batches, dict(layout="zigzag"))
    for at, batch in enumerate(batches):
        model.zero_grad(set_to_none=True)
        output = model(**batch, use_cache=False)
        output.loss.backward()
        exact = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for result in results:
            loss, logits, grads = result[at]
            assert loss == pytest.approx(output.loss.item(), abs=2e-6)
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            torch.testing.assert_close(torch.from_numpy(logits)[real], output.logits.detach()[real], atol=2e-5, rtol=0)
            assert_same_gradients({n: torch.from_numpy(g) for n, g in grads.items()}, exact, 2e-5)


def test_what_cannot_be_done_is_refused(family):
    model = family("llama")
    handle = enable_context_parallel(model)
    ids = torch.randint(3, 97, (2, 8))
    left = torch.ones_like(ids)
    left[0, :2] = 0
    with pytest.raises(UserError, match="right"):
        model(input_ids=ids, attention_mask=left)
    with pytest.raises(UserError, match="batch of 2"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]).expand(2, -1))
    handle.disable()
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, 10)
    with pytest.raises(UserError, match="transformers"):
        enable_context_parallel(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("bloom", {"n_layer": 1, "n_head": 4}, "attention of its own"),
        ("mamba", {"state_size": 4}, "the convolution backbone.layers.0.mixer.conv1d|linear_attention"),
        ("lfm2", {"layer_types": ["conv", "conv"]}, "the convolution|type conv"),
        ("rwkv", {}, "a recurrent state"),
    ],
)
def test_layers_that_carry_tokens_past_attention_are_refused(name, options, words):
    """They would run on a rank's tokens as on a sequence, and be wrong without an error."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'undertow[hf]'")
    sizes = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.AutoConfig.for_model(name, **{**sizes, **options})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match=words):
        enable_context_parallel(model)


def _positions(rank, world):
    context = ContextParallel(None, 10, "zigzag", (0, 4, 10))
    share = torch.tensor(float(rank + 1), requires_grad=True)
    whole = context.loss(share)
    whole.backward()
    at = context.shard(torch.cat([torch.arange(4), torch.arange(6)])[None])
    assert torch.equal(context.positions(), at)
    assert torch.equal(context.unshard(at)[0], torch.cat([torch.arange(4), torch.arange(6)]))
    assert dist.get_world_size() == world
    assert share.grad is not None
    return whole.item(), share.grad.item()


def test_positions_and_loss(ranks):
    assert ranks(2, _positions) == [(3.0, 2.0)] * 2


def _narrow(rank, world, model, ids):
    """Loss, gradient of the first weights, and what attention was told of wire and kernel."""
    from undertow.parallel.token_ring import calls

    found = []
    for wire in (None, torch.bfloat16):
        before = set(calls._calls)
        options = dict(wire_dtype=wire, kernel="tiled" if wire else "auto")
        handle = enable_context_parallel(model, schedule="token_ring", backward_schedule="ring_kv", **options)
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        handle.disable()
        told = {(call.problem.heads.wire, call.kernel) for n, call in calls._calls.items() if n not in before}
        found.append((loss.item(), next(model.parameters()).grad.norm().item(), told))
    return found


def test_wire_dtype_and_kernel_reach_attention(ranks, family):
    """Of bfloat16's 8 bits a sum of a few parts loses a few: 1 % of loss and gradient, which differ all the same."""
    for wide, narrow in ranks(2, _narrow, family("llama"), torch.arange(3, 27)[None]):
        assert (wide[2], narrow[2]) == ({("", "auto")}, {("bfloat16", "tiled")})
        assert narrow[:2] == pytest.approx(wide[:2], rel=1e-2) and narrow[1] != wide[1]


def _autocast(rank, world, model, ids):
    """(loss, gradients) alone and spread, under autocast; and the dtypes of what was sent for."""
    from undertow.parallel.token_ring import calls

    average, found = GradientAverage(model.parameters()), []
    before = set(calls._calls)
    for spread in (False, True):
        handle = enable_context_parallel(model) if spread else None
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if handle is not None:
            average()
            handle.disable()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (alone, wanted), (loss, grad) = found
    dtypes = {calls._calls[number].problem.heads.dtype for number in set(calls._calls) - before}
    return alone, loss, float((grad - wanted).norm() / wanted.norm()), dtypes


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_autocast_reaches_attention(name, ranks, family):
    """Rotary embeddings and norms give q and k in float32 there, and v comes in bfloat16: as torch's own attention,
    all are cast. 2e-2: bfloat16's 2^-8, over the few products of two layers, in another order."""
    for alone, loss, difference, dtypes in ranks(2, _autocast, family(name), torch.arange(3, 26)[None]):
        assert dtypes == {"bfloat16"}
        assert loss == pytest.approx(alone, rel=2e-3) and difference < 2e-2
