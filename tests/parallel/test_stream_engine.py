"""What surrounds the algorithm: hooks, exceptions, switching off, fall-backs, dropout, autocast, auxiliary losses."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from undertow.dist.errors import UserError
from undertow.parallel.stream import StreamPlan, disable, enable, stream_backprop
from undertow.parallel.stream.protocol import Unsupported, causal_attention, plain_loss

pytestmark = pytest.mark.slow  # together more than ten seconds

TOKENS = 19
ids = torch.arange(2 * TOKENS).reshape(2, TOKENS) % 90 + 3


class Block(nn.Module):
    def __init__(self, width, heads, dropout=0.0, fail=None):
        super().__init__()
        self.heads, self.fail = heads, fail
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )

    def forward(self, x, positions, attend=causal_attention):
        if self.fail is not None:
            self.fail(x)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        x = x + self.out(attend(q, k, v, positions=positions).transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Tiny(nn.Module):
    def __init__(self, layers=3, width=16, **options):
        super().__init__()
        self.table = nn.Embedding(97, width)
        self.blocks = nn.ModuleList(Block(width, 4, **options) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 97, bias=False)
        self.double()

    @property
    def stream_layers(self):
        return self.blocks

    def token_logits(self, x_NC):
        return self.head(self.norm(x_NC))

    def loss(self, x_BTC, labels_BT, num_items=None):
        return plain_loss(self.token_logits(x_BTC), labels_BT, num_items)

    def forward(self, input_ids, labels=None, positions=None, num_items=None):
        positions = torch.arange(input_ids.shape[1])[None] if positions is None else positions
        x = self.table(input_ids)
        for block in self.blocks:
            x = block(x, positions)
        loss = None if labels is None else self.loss(x, labels, num_items)
        return Answer(loss, x)


class Answer:
    def __init__(self, loss, x):
        self.loss, self.x = loss, x


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("positions", [None, torch.arange(TOKENS)[None] % 8])
def test_plain_protocol_in_float64(shown, positions, gradients_of, assert_same_gradients, seed):
    model = Tiny()
    if shown:
        Tiny.stream_head = property(lambda self: (self.norm, self.head))
    try:
        loss, exact = gradients_of(model, input_ids=ids, labels=ids, positions=positions, num_items=7)
        for chunk in (1, 5, TOKENS, 99):
            with stream_backprop(model, chunk=chunk):
                streamed, mine = gradients_of(model, input_ids=ids, labels=ids, positions=positions, num_items=7)
            torch.testing.assert_close(streamed, loss, rtol=1e-12, atol=0)
            assert_same_gradients(mine, exact, 1e-12)
    finally:
        if shown:
            del Tiny.stream_head


def test_our_own_language_model(gradients_of, assert_same_gradients, seed):
    from undertow.examples.lm import ByteLM, LMConfig

    class Wrapped(ByteLM):
        def forward(self, input_ids, labels=None):
            return Answer(super().forward(input_ids, labels), None)

    model = Wrapped(LMConfig(layers=2, width=32, heads=4, kv_heads=2, hidden=48, vocab=97)).double()
    loss, exact = gradients_of(model, input_ids=ids, labels=ids)
    with stream_backprop(model, chunk=6, offload=True, stash=True) as engine:
        streamed, mine = gradients_of(model, input_ids=ids, labels=ids)
    assert set(engine.report().values()) == {"streamed"}
    torch.testing.assert_close(streamed, loss, rtol=1e-12, atol=0)
    assert_same_gradients(mine, exact, 1e-12)


def test_gradients_accumulate_and_hooks_fire_once_per_backward(seed):
    model, fired = Tiny(), []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: fired.append(name))
    with stream_backprop(model, chunk=4):
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
    names = [name for name, _ in model.named_parameters()]
    assert sorted(fired) == sorted(names * 2)
    twice = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(twice[name], 2 * parameter.grad)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_an_exception_inside_a_chunk_leaves_the_model_usable(when, gradients_of, assert_same_gradients, seed):
    model = Tiny()
    loss, exact = gradients_of(model, input_ids=ids, labels=ids)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    state = torch.get_rng_state()

    def fail(x):
        if x.shape[1] < TOKENS and torch.is_grad_enabled() == (when == "backward"):
            raise FloatingPointError("in a chunk")

    enable(model, chunk=6)
    model.blocks[1].fail = fail
    with pytest.raises(FloatingPointError):
        model(ids, labels=ids).loss.backward()
    model.blocks[1].fail = None
    model.zero_grad()
    streamed, mine = gradients_of(model, input_ids=ids, labels=ids)
    assert_same_gradients(mine, exact, 1e-12)
    disable(model)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)


def test_hugging_face_model_is_as_before_after_disable(family, seed):
    model = family("llama").eval()
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    keys, config = list(model.state_dict()), model.config.to_dict()
    answer = model.generate(ids[:, :5], max_new_tokens=6, do_sample=False)
    enable(model, chunk=4)
    assert torch.equal(model.generate(ids[:, :5], max_new_tokens=6, do_sample=False), answer), "generate while on"
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    model.eval()
    assert torch.equal(model.generate(ids[:, :5], max_new_tokens=6, do_sample=False), answer)
    assert list(model.state_dict()) == keys
    disable(model)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    assert model.config.to_dict() == config
    assert torch.equal(model.generate(ids[:, :5], max_new_tokens=6, do_sample=False), answer)
    disable(model)  # once more does nothing


def test_a_deep_copy_runs_plainly_with_its_own_weights(family, gradients_of, assert_same_gradients, seed):
    model = family("qwen2")
    with stream_backprop(model, chunk=4):
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.1)
        _, copied = gradients_of(other, input_ids=ids, labels=ids)
    fresh = family("qwen2")
    fresh.load_state_dict(other.state_dict())
    _, exact = gradients_of(fresh, input_ids=ids, labels=ids)
    assert_same_gradients(copied, exact, 1e-6)


def test_dropout_is_replayed_per_layer_and_chunk(seed):
    """The streamed gradient is that of the very function its forward computed: rerun with the same draws, it agrees."""
    model = Tiny(dropout=0.3).train()
    bounds = [(a, min(a + 6, TOKENS)) for a in range(0, TOKENS, 6)]

    def chunked_by_hand():
        x = model.table(ids)
        for block in model.blocks:
            keys, values, outputs = [], [], []
            for start, stop in bounds:

                def attend(q, k, v, *, positions=None, at=(start, stop), keys=keys, values=values):
                    keys.append(k), values.append(v)
                    k, v = torch.cat(keys, 2), torch.cat(values, 2)
                    mask = torch.arange(*at)[:, None] >= torch.arange(k.shape[2])
                    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

                outputs.append(block(x[:, start:stop], None, attend))
            x = torch.cat(outputs, 1)
        return model.loss(x, ids)

    torch.manual_seed(5)
    loss = chunked_by_hand()
    loss.backward()
    exact = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for options in ({"offload": False}, {"every": 2, "offload": True}, {"stash": True}):
        torch.manual_seed(5)
        with stream_backprop(model, chunk=6, **options):
            streamed = model(ids, labels=ids).loss
            state = torch.get_rng_state()
            streamed.backward()
        assert torch.equal(torch.get_rng_state(), state), "backward leaves the generator alone"
        torch.testing.assert_close(streamed, loss)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, exact[name], rtol=1e-9, atol=1e-12)
        model.zero_grad()


def test_autocast_is_the_same_in_forward_and_backward(family, gradients_of, assert_same_gradients, seed):
    model = family("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(input_ids=ids, labels=ids).loss
    plain.backward()
    exact = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    with stream_backprop(model, chunk=6):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    mine = {n: p.grad.clone() for n, p in model.named_parameters()}
    assert all(g.dtype == torch.float32 for g in mine.values())
    torch.testing.assert_close(loss, plain, rtol=1e-3, atol=1e-3)
    assert_same_gradients(mine, exact, 3e-2)  # bfloat16 keeps 8 bits, and chunks round their sums elsewhere


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_auxiliary_loss_of_experts_reaches_the_router(name, family, gradients_of, assert_same_gradients, seed):
    model = family(name, output_router_logits=True, router_aux_loss_coef=0.5)
    mask = torch.ones_like(ids)
    mask[1, TOKENS - 4 :] = 0
    inputs = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}
    loss, exact = gradients_of(model, **inputs)
    for options in ({}, {"every": 2}, {"stash": True, "offload": True}):
        with stream_backprop(model, chunk=6, **options) as engine:
            streamed, mine = gradients_of(model, **inputs)
            assert model(**inputs).router_logits[0].shape == (2 * TOKENS, 4)
        assert set(engine.report().values()) == {"streamed"}
        torch.testing.assert_close(streamed, loss, rtol=1e-6, atol=1e-6)
        assert_same_gradients(mine, exact)


def test_num_items_in_batch_and_logits_used_by_hand(family, gradients_of, assert_same_gradients, seed):
    model = family("cohere")
    loss, exact = gradients_of(model, input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(50))
    with stream_backprop(model, chunk=6):
        streamed, mine = gradients_of(model, input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(50))
    torch.testing.assert_close(streamed, loss)
    assert_same_gradients(mine, exact)

    def by_hand():
        logits = model(input_ids=ids).logits
        F.cross_entropy(logits[:, :-1].reshape(-1, 97), ids[:, 1:].reshape(-1)).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        return grads

    exact = by_hand()
    with stream_backprop(model, chunk=6):
        assert_same_gradients(by_hand(), exact)


def test_log_probs_of_a_streamed_model(family, assert_same_gradients, seed):
    from undertow.parallel.stream import token_log_probs

    model = family("qwen3", tie_word_embeddings=True)
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)

    def gradients(log_probs):
        torch.exp(log_probs).sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        return grads

    logits = model(input_ids=ids).logits.log_softmax(-1)
    exact = gradients(logits[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1))
    with stream_backprop(model, chunk=6):
        assert_same_gradients(gradients(token_log_probs(model(input_ids=ids).logits, targets)[:, :-1]), exact)


def test_evaluation_without_gradients_is_streamed_too(family, seed):
    model = family("mistral").eval()
    with torch.no_grad():
        plain = model(input_ids=ids, labels=ids).loss
        with stream_backprop(model, chunk=6) as engine:
            torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, plain)
        assert set(engine.report().values()) == {"streamed"}


def test_frozen_embeddings_and_layers(family, gradients_of, assert_same_gradients, seed):
    model = family("llama")
    model.get_input_embeddings().requires_grad_(False)
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    _, exact = gradients_of(model, input_ids=ids, labels=ids)
    with stream_backprop(model, chunk=6, offload=True):
        _, mine = gradients_of(model, input_ids=ids, labels=ids)
    assert_same_gradients(mine, exact)


@pytest.mark.parametrize(
    ("name", "changes", "inputs", "reason"),
    [
        ("llama", {}, {"attention_mask": torch.ones(2, 1, TOKENS, TOKENS).tril()}, "of shape"),
        ("llama", {}, {"attention_mask": torch.tensor([[1] * 5 + [0] + [1] * 13] * 2)}, "between real ones"),
        ("llama", {"attention_dropout": 0.1}, {}, "attention dropout"),
        ("gemma2", {"head_dim": 8, "query_pre_attn_scalar": 8}, {}, "soft cap"),
    ],
)
def test_what_cannot_be_streamed_is_checkpointed_and_says_why_once(
    name, changes, inputs, reason, family, gradients_of, assert_same_gradients, seed
):
    model = make(family, name, changes)
    if "attention_mask" in inputs and inputs["attention_mask"].dim() == 4:
        inputs = {"attention_mask": inputs["attention_mask"].bool()}
    torch.manual_seed(3)
    loss, exact = gradients_of(model, input_ids=ids, labels=ids, **inputs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with stream_backprop(model, chunk=6) as engine:
            for _ in range(2):
                torch.manual_seed(3)
                streamed, mine = gradients_of(model, input_ids=ids, labels=ids, **inputs)
    said = [str(w.message) for w in caught if "undertow" in str(w.message)]
    assert len(said) == 1 and reason in said[0]
    assert all(reason in why for why in engine.report().values())
    torch.testing.assert_close(streamed, loss)
    assert_same_gradients(mine, exact)


def make(family, name, changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    if name != "gemma2":
        return family(name, **changes)
    sizes = family("llama").config.to_dict()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = AutoConfig.for_model(name, **{key: sizes[key] for key in keys}, num_key_value_heads=2, **changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().train()


WRONG = [
    ("chunk", "8"),
    ("chunk", 0),
    ("chunk", 7.5),
    ("loss_rows", 0),
    ("budget_bytes", "20GB"),
    ("budget_bytes", -1),
    ("host_budget_bytes", "1GB"),
    ("every", "2"),
    ("offload", "yes"),
    ("stash", 3),
    ("plan", 3),
    ("attend", 3),
]


def test_a_budget_that_nothing_fits_is_told_once(caplog, seed):
    model = Tiny()
    with stream_backprop(model, budget_bytes=10.0):
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
    (said,) = [r.getMessage() for r in caplog.records if "by prediction" in r.getMessage()]
    assert said.startswith(f"streaming {ids.shape[0]} x {ids.shape[1]} tokens needs") and said.endswith(
        "the 10 B there are"
    )


def test_user_errors(family, seed):
    model = Tiny()
    with stream_backprop(model):
        with pytest.raises(UserError, match="already on"):
            enable(model)
    with pytest.raises(UserError, match="neither a transformers model"):
        enable(nn.Linear(3, 3))
    with pytest.raises(UserError, match="every=0"):
        enable(model, every=0)
    for option, value in WRONG:
        with pytest.raises(UserError, match=f"{option}=.*expected"):
            enable(model, **{option: value})
    with pytest.raises(UserError, match="type int; expected a torch.nn.Module"):
        enable(3)
    with pytest.raises(UserError, match="no attention backend"), stream_backprop(model, attention_backend="warp"):
        model(ids, labels=ids)
    wrong = StreamPlan.simple(2, 7, 3, 4)
    with stream_backprop(model, plan=wrong), pytest.raises(UserError, match="2 x 7 tokens"):
        model(ids, labels=ids)


def test_a_given_plan_is_carried_out(gradients_of, assert_same_gradients, seed):
    model = Tiny()
    loss, exact = gradients_of(model, input_ids=ids, labels=ids)
    plan = StreamPlan(2, TOKENS, 5, ("host", "derived", "device"), ("host", "none", "device"), loss_rows=3)
    with stream_backprop(model, plan=plan) as engine:
        streamed, mine = gradients_of(model, input_ids=ids, labels=ids)
        assert engine.courier.sent_bytes == 2 * TOKENS * (16 + 16 + 4) * 8  # one input; out and lse of one layer
        assert engine.courier.fetched_bytes == engine.courier.sent_bytes
        held = engine.courier.pool.nbytes
        model(ids, labels=ids)  # a forward whose backward never comes gives its blocks back
        gradients_of(model, input_ids=ids, labels=ids)
        assert engine.courier.pool.nbytes == held
    assert_same_gradients(mine, exact, 1e-12)


def test_second_backward_is_refused_clearly(seed):
    model = Tiny()
    with stream_backprop(model, chunk=6):
        x = model(ids).x
        x.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="twice"):
            x.sum().backward()


def test_a_kept_gradient_is_not_overwritten(seed):
    """dX is written over dY only when nobody else holds dY."""
    model, kept = Tiny(), []
    with stream_backprop(model, chunk=6):
        x = model(ids).x
        x.register_hook(kept.append)
        (x * 2.0).sum().backward()
    assert (kept[0] == 2).all()
    with stream_backprop(model, chunk=6):
        mine = torch.full_like(x, 3.0)
        model(ids).x.backward(mine)
    assert (mine == 3).all()


@pytest.mark.parametrize("every", [3, 4, 9])
def test_every_nth_layer_input(every, gradients_of, assert_same_gradients, seed):
    """Of seven layers; each layer without an input of its own costs one more forward of the layer below it."""
    model = Tiny(layers=7, dropout=0.2)
    calls = dict.fromkeys(model.blocks, 0)
    for block in model.blocks:
        block.fail = lambda x, block=block: calls.update({block: calls[block] + 1})

    def gradients(**options):
        torch.manual_seed(5)
        calls.update(dict.fromkeys(calls, 0))
        with stream_backprop(model, **options) as engine:
            return gradients_of(model, input_ids=ids, labels=ids)[1], engine.last_plan

    for options in ({"chunk": 6, "stash": True}, {"chunk": TOKENS, "offload": True}):
        exact, _ = gradients(**options)
        before = list(calls.values())
        mine, plan = gradients(every=every, **options)
        assert_same_gradients(mine, exact, 1e-12)
        kept = "host" if "offload" in options else "device"
        assert plan.inputs == tuple("derived" if i % every else kept for i in range(7))
        more = len(plan.bounds)
        above = [(i + 1) % every != 0 and i < 6 for i in range(7)]
        assert [now - was for now, was in zip(calls.values(), before)] == [more * again for again in above]


@pytest.mark.parametrize("every", [2, 3, 9])
@pytest.mark.parametrize(
    "options",
    [{"chunk": 6}, {"chunk": TOKENS}, {"chunk": 6, "offload": True}, {"chunk": 7, "offload": True, "stash": True}],
    ids=str,
)
def test_an_input_that_is_not_the_output_of_the_layer_below_is_kept(
    options, every, gradients_of, assert_same_gradients, seed
):
    """It cannot be had by running that layer again. Of seven layers: scaled into a new tensor, in place, copied, by
    another name only; also where the spacing is wider than the model is deep."""

    class Changing(Tiny):
        def forward(self, input_ids, labels):
            between = {2: lambda x: x * 1.5, 4: lambda x: x.mul_(1.5), 5: torch.clone, 6: lambda x: x.view_as(x)[:]}
            x = self.table(input_ids)
            for i, block in enumerate(self.blocks):
                x = block(between.get(i, lambda x: x)(x), torch.arange(TOKENS)[None])
            return Answer(self.loss(x, labels), x)

    model = Changing(layers=7)
    calls = dict.fromkeys(model.blocks, 0)
    for block in model.blocks:
        block.fail = lambda x, block=block: calls.update({block: calls[block] + 1})
    _, exact = gradients_of(model, input_ids=ids, labels=ids)
    counted = []
    for spacing in (1, every):
        calls.update(dict.fromkeys(calls, 0))
        with stream_backprop(model, every=spacing, **options) as engine:
            _, mine = gradients_of(model, input_ids=ids, labels=ids)
        assert_same_gradients(mine, exact, 1e-12)
        assert engine.last_plan is not None
        counted.append(list(calls.values()))
    chunks = len(engine.last_plan.bounds)
    computed = {i for i in range(7) if i % every} - {2, 4, 5}  # inputs; the layer below each runs once more
    assert [(now - was) // chunks for was, now in zip(*counted)] == [i + 1 in computed for i in range(7)]


def test_a_model_that_cannot_be_streamed_is_refused_where_an_attention_stands_in(seed):
    """The plain way would call the model's own attention: of this rank's rows alone, without a word."""
    model = Tiny()

    def attend(q, k, v, **options):
        raise Unsupported("no")

    with stream_backprop(model, attend=attend), pytest.raises(UserError, match="with `attend` this model cannot"):
        model(ids, ids)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_mlps_are_traced_for_the_chunk_and_its_tail_only(
    dtype, family, gradients_of, assert_same_gradients, seed
):
    """What works on rows alone may be compiled by the user; `Module.compile` keeps the module's hooks and names."""
    model = family("llama", num_hidden_layers=3).to(dtype)
    _, exact = gradients_of(model, input_ids=ids, labels=ids)
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.mlp.compile(backend=backend, dynamic=False)
    with stream_backprop(model, chunk=8) as engine:
        for _ in range(2):
            _, mine = gradients_of(model, input_ids=ids, labels=ids)
    assert set(engine.report().values()) == {"streamed"}
    assert_same_gradients(mine, exact, 1e-5 if dtype == torch.float32 else 3e-2)
    assert 1 <= len(traced) <= 4, "chunks and tail, with and without gradients"
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Dynamo")
def test_a_model_compiled_whole_is_streamed_as_it_is_and_dynamo_has_nothing_to_say(
    family, gradients_of, assert_same_gradients
):
    model = family("llama")
    _, exact = gradients_of(model, input_ids=ids, labels=ids)
    torch._dynamo.reset()
    model.compile(backend="eager")
    with stream_backprop(model, chunk=8) as engine:
        _, mine = gradients_of(model, input_ids=ids, labels=ids)
    assert set(engine.report().values()) == {"streamed"}
    assert_same_gradients(mine, exact, 1e-5)
    torch._dynamo.reset()
