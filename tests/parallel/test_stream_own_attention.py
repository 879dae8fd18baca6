"""An attention of one's own inside streamed layers: whole, while the rest of the layer runs in chunks."""

import weakref

import pytest
import torch
from torch import nn

from undertow.dist.errors import UserError
from undertow.parallel.stream import stream_backprop
from undertow.parallel.stream.protocol import causal_attention, plain_loss

TOKENS = 19
ids = torch.arange(2 * TOKENS).reshape(2, TOKENS) % 90 + 3
WAYS = {
    "one chunk": {},
    "one chunk, kept": {"stash": True},
    "chunks": {"chunk": 5},
    "chunks, kept on the host": {"chunk": 5, "stash": True, "offload": True},
    "chunks, every third": {"chunk": 6, "every": 3, "offload": True},
}


class Layer(nn.Module):
    """Dropout before and after attention; `doubled` gives attention two rows for each, as gathered rows would be."""

    def __init__(self, width, dropout):
        super().__init__()
        self.norm, self.drop, self.doubled = nn.LayerNorm(width), nn.Dropout(dropout), False
        self.qkv, self.out, self.mlp = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, positions, attend=causal_attention):
        x = self.drop(x)
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        if self.doubled:
            q, k, v = (torch.cat((t, t), 2) for t in (q, k, v))
        x = x + self.out(attend(q, k, v, positions=positions).transpose(1, 2).flatten(2)[:, : x.shape[1]])
        return x + self.drop(torch.tanh(self.mlp(x)))


class Decoder(nn.Module):
    def __init__(self, layers, dropout=0.0, width=16):
        super().__init__()
        self.table, self.head = nn.Embedding(97, width), nn.Linear(width, 97)
        self.stream_layers = nn.ModuleList(Layer(width, dropout) for _ in range(layers))
        self.double()

    def token_logits(self, x):
        return self.head(x)

    def loss(self, x_BTC, labels_BT, num_items=None):
        return plain_loss(self.head(x_BTC), labels_BT, num_items)

    def forward(self, input_ids, labels, positions=None):
        positions = torch.arange(TOKENS)[None] if positions is None else positions
        x = self.table(input_ids)
        for layer in self.stream_layers:
            x = layer(x, positions)
        return Answer(self.loss(x, labels))


class Answer:
    def __init__(self, loss):
        self.loss = loss


@pytest.fixture
def attend():
    def call(q, k, v, *, positions=None, scale=None, window=None):
        call.log.append((q.shape[2], torch.is_grad_enabled()))
        return causal_attention(q, k, v, positions=positions, scale=scale, window=window)

    call.log = []
    return call


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neox", "qwen3_moe", "deepseek_v3"])
def test_gradients_and_calls(name, attend, family, gradients_of, assert_same_gradients, seed):
    """As often on every rank: forward; and again in backward, unless what its backward needs was kept."""
    changes = {"output_router_logits": True} if name == "qwen3_moe" else {}
    model, fired = family(name, num_hidden_layers=4, **changes), []
    loss, exact = gradients_of(model, input_ids=ids, labels=ids)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(fired.append)
    for way, options in WAYS.items():
        attend.log.clear(), fired.clear()
        with stream_backprop(model, attend=attend, **options) as engine:
            streamed, mine = gradients_of(model, input_ids=ids, labels=ids)
        assert set(engine.report().values()) == {"streamed"}
        assert len(engine.last_plan.bounds) == (-(-TOKENS // options["chunk"]) if "chunk" in options else 1)
        torch.testing.assert_close(streamed, loss, rtol=1e-6, atol=1e-6)
        assert_same_gradients(mine, exact)
        assert len(fired) == len({id(p) for p in fired}) == len(exact), way
        once, again = [(TOKENS, True)] * 4, [(TOKENS, False)] * 4
        derived = [(TOKENS, False)] * 2 if "every" in options else []  # two of four layers have no input kept
        assert sorted(attend.log) == sorted(once + ([] if "stash" in options else again) + derived), way


def test_packed_documents_are_told_to_the_attention(attend, gradients_of, assert_same_gradients, seed):
    """Positions reach it for all rows. In float64, by the plain protocol."""
    model = Decoder(3)
    positions = torch.arange(TOKENS)[None] % 8
    inputs = dict(input_ids=ids, labels=ids, positions=positions)
    _, exact = gradients_of(model, **inputs)
    for options in WAYS.values():
        with stream_backprop(model, attend=attend, **options):
            _, mine = gradients_of(model, **inputs)
        assert_same_gradients(mine, exact, 1e-12)


@pytest.mark.parametrize("stash", [False, True])
def test_dropout_is_replayed_in_both_halves_of_a_chunk(stash, attend, seed):
    """Against differences of the loss itself, in float64; and chunks draw from generators of their own."""
    model = Decoder(2, dropout=0.4)
    way = [torch.randn_like(p) for p in model.parameters()]
    with stream_backprop(model, attend=attend, chunk=5, stash=stash):

        def loss(step):
            for parameter, direction in zip(model.parameters(), way):
                parameter.data += step * direction
            torch.manual_seed(3)
            return model(ids, labels=ids).loss

        loss(0).backward()
        slope = sum(float((p.grad * d).sum()) for p, d in zip(model.parameters(), way))
        after = torch.get_rng_state()
        above, below = float(loss(1e-5).detach()), float(loss(-2e-5).detach())
    assert slope == pytest.approx((above - below) / 2e-5, rel=1e-6)
    assert torch.equal(torch.get_rng_state(), after), "a pass moves the generator by the same amount"


def test_what_is_kept_is_the_result_and_not_q_k_v(seed):
    """Of each layer between forward and backward; and nothing is left of a forward without a backward."""
    model, alive, grads = Decoder(3), [], []

    def attend(q, k, v, **how):
        alive.extend(weakref.ref(t.untyped_storage()) for t in (q, k, v))
        out = causal_attention(q, k, v, scale=how["scale"])
        grads.append(weakref.ref(out.untyped_storage()))
        return out

    with stream_backprop(model, attend=attend, chunk=5, stash=True):
        answer = model(ids, labels=ids)
        assert not any(ref() for ref in alive) and all(ref() for ref in grads) and len(grads) == 3
        answer.loss.backward()
        assert not any(ref() for ref in grads)
        model(ids, labels=ids)
        assert not any(ref() for ref in grads)


def test_rows_of_several_ranks_are_refused_in_chunks(attend, seed):
    model = Decoder(1)
    model.stream_layers[0].doubled = True
    with stream_backprop(model, attend=attend):
        model(ids, labels=ids)
    assert attend.log[-1][0] == 2 * TOKENS, "one chunk: the attention is called with them"
    with stream_backprop(model, attend=attend, chunk=5), pytest.raises(UserError, match="as long as the sequence"):
        model(ids, labels=ids)


def test_sinks_are_refused(attend, family, seed):
    model = family("gpt_oss")
    with stream_backprop(model, attend=attend), pytest.raises(UserError, match="sinks"):
        model(input_ids=ids, labels=ids)
