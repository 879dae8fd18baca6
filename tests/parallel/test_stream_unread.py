"""Products that recomputation leaves out: found for the layers that have them, and never where a value is read."""

import pytest
import torch
from torch import nn

from undertow.parallel.stream import stream_backprop
from undertow.parallel.stream.sums import Product
from undertow.parallel.stream.unread import may_leave_out, unread

DOWN, OUT = "mlp.down_proj.weight", "self_attn.o_proj.weight"


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("llama", {DOWN}),
        ("cohere", {DOWN, OUT}),  # attention and MLP side by side
        ("gpt_neox", {"attention.dense.weight", "mlp.dense_4h_to_h.weight"}),
        ("gemma3_text", set()),  # a norm reads the product
        ("mixtral", set()),
    ],
)
@pytest.mark.parametrize("chunk", [7, 23])
def test_what_each_kind_of_layer_leaves_out(kind, expected, chunk, family, gradients_of, assert_same_gradients, seed):
    model, ids = family(kind), torch.randint(3, 97, (2, 23))
    inputs = {"input_ids": ids, "labels": ids}
    _, exact = gradients_of(model, **inputs)
    calls = []
    plain = Product.forward
    with stream_backprop(model, chunk=chunk, stash=False) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Product, "forward", staticmethod(lambda ctx, *a: calls.append(a[4]) or plain(ctx, *a)))
        for _ in range(2):
            _, mine = gradients_of(model, **inputs)
            assert_same_gradients(mine, exact)
    assert [set(names) for names in engine.unread.values()] == [expected] * 2
    chunks, layers = -(-23 // chunk), 2
    assert sum(calls) == len(expected) * layers * (2 * chunks - 1), "all but those of the first chunk ever"


def test_hooks_see_no_zeros(family, gradients_of, seed):
    model, ids, seen = family("llama"), torch.randint(3, 97, (1, 23)), []
    with stream_backprop(model, chunk=23) as engine:
        gradients_of(model, input_ids=ids, labels=ids)
        assert {DOWN} == set(*{*engine.unread.values()})
        hook = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *args: seen.append(args[2].abs().max()))
        gradients_of(model, input_ids=ids, labels=ids)
        assert len(seen) == 2 and min(seen) > 0
        assert not may_leave_out(model.model.layers[0]) and may_leave_out(model.model.layers[1])
        hook.remove()


def test_a_second_reader_is_seen(seed):
    inner, last, x = nn.Linear(8, 8), nn.Linear(8, 8), torch.randn(2, 3, 8, requires_grad=True)
    middle = torch.tanh(Product.apply(x, inner.weight, inner.bias, None, False))
    y = x + Product.apply(middle, last.weight, last.bias, None, True)
    assert unread(y, ()) == {id(last.weight)}
    assert unread(y, (y,)) == set() and unread(y, (y * 2,)) == set() and unread(y.sigmoid(), ()) == set()
    assert unread(x, ()) == set()


def test_another_graph_than_the_one_learned_is_computed_in_full(family, gradients_of, assert_same_gradients, seed):
    model, ids = family("llama"), torch.randint(3, 97, (2, 23))
    inputs = {"input_ids": ids, "labels": ids}
    with stream_backprop(model, chunk=7, stash=True) as engine:
        gradients_of(model, **inputs)
        mlp = model.model.layers[0].mlp
        plain = type(mlp).forward
        mlp.forward = lambda x: torch.tanh(plain(mlp, x))  # from now on the value is read
        _, mine = gradients_of(model, **inputs)
        assert [set(names) for names in engine.unread.values()] == [{DOWN}, set()]  # the last layer learned first
    _, exact = gradients_of(model, **inputs)
    assert_same_gradients(mine, exact)
