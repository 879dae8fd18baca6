"""Plans degrade when memory runs out; the gate leaves the faster way on, and the model as it was."""

import pytest
import torch

from undertow.dist.errors import UserError
from undertow.parallel.stream import stream_backprop
from undertow.parallel.stream.gate import Verdict, keep_faster
from undertow.parallel.stream.protocol import causal_attention

pytestmark = pytest.mark.slow  # together more than ten seconds

TOKENS = 600
ids = torch.arange(2 * TOKENS).reshape(2, TOKENS) % 90 + 3


def inputs():
    return {"input_ids": ids, "labels": ids}


def run_out_in(layer, times, when):
    """Raise out-of-memory from `layer`'s MLP in the next `times` calls with (or without) gradients."""
    left = [times]

    def hook(module, args):
        if left[0] and torch.is_grad_enabled() == when:
            left[0] -= 1
            raise torch.OutOfMemoryError("planted")

    layer.mlp.register_forward_pre_hook(hook)
    return left


def test_a_forward_that_runs_out_is_planned_again_in_half(family, gradients_of, assert_same_gradients, seed):
    model = family("llama", max_position_embeddings=TOKENS)
    loss, exact = gradients_of(model, **inputs())
    run_out_in(model.model.layers[1], 2, when=False)
    options = {"budget_bytes": 1 << 30, "stash": False}  # a kept graph has no forward without gradients
    with stream_backprop(model, **options) as engine, pytest.warns(UserWarning, match="out of memory"):
        streamed, mine = gradients_of(model, **inputs())
        assert len(engine.last_plan.bounds) > 1 and set(engine.report().values()) == {"streamed"}
    torch.testing.assert_close(streamed, loss)
    assert_same_gradients(mine, exact)


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_kept_graph_that_runs_out_is_planned_smaller(
    when, family, gradients_of, assert_same_gradients, monkeypatch, seed
):
    model = family("llama", max_position_embeddings=TOKENS)
    _, exact = gradients_of(model, **inputs())
    if when == "forward":
        run_out_in(model.model.layers[1], 1, when=True)
    with stream_backprop(model, budget_bytes=1 << 30) as engine, pytest.warns(UserWarning, match="stay below"):
        if when == "backward":
            with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
                loss = model(**inputs()).loss
                assert engine.last_plan.inputs == ("graph", "graph")
                patch.setattr(torch.autograd, "grad", raise_out_of_memory)
                loss.backward()
        _, mine = gradients_of(model, **inputs())
        assert engine.last_plan.inputs != ("graph", "graph")
    assert_same_gradients(mine, exact)


def raise_out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("planted")


def test_a_backward_that_runs_out_raises_and_the_next_plan_is_smaller(family, gradients_of, seed):
    model = family("llama", max_position_embeddings=TOKENS)
    with stream_backprop(model, budget_bytes=4_000_000, stash=False) as engine:
        gradients_of(model, **inputs())
        first = engine.last_plan
        assert "exceeds" not in first.reason
        left = run_out_in(model.model.layers[1], 1, when=True)
        with pytest.raises(torch.OutOfMemoryError, match="planted"), pytest.warns(UserWarning, match="stay below"):
            gradients_of(model, **inputs())
        assert left == [0]
        gradients_of(model, **inputs())
        assert engine.last_plan.chunk < first.chunk and engine.last_plan.device_bytes < first.device_bytes


def test_a_plan_of_ones_own_is_not_tried_for_ever(family, seed):
    from undertow.parallel.stream import StreamPlan

    model = family("llama", max_position_embeddings=TOKENS)
    run_out_in(model.model.layers[0], 100, when=False)
    plan = StreamPlan.simple(2, TOKENS, 2, 80)
    with stream_backprop(model, plan=plan), pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning):
        model(**inputs())


def test_equal_batches_keep_their_plan(family, seed):
    model = family("llama", max_position_embeddings=TOKENS)
    with stream_backprop(model) as engine:
        model(**inputs())
        first = engine.last_plan
        model(**inputs())
        assert engine.last_plan is first


@pytest.mark.parametrize("slow", ["streamed", "plain"])
def test_the_faster_way_stays_on_and_gradients_come_back(slow, family, gradients_of, assert_same_gradients, seed):
    import time

    model = family("llama", max_position_embeddings=TOKENS)
    loss, exact = gradients_of(model, **inputs())
    kept = [torch.full_like(p, 3.0) for p in model.parameters()]
    for parameter, gradient in zip(model.parameters(), kept):
        parameter.grad = gradient
    with stream_backprop(model, chunk=160) as engine:

        def step():
            model(**inputs()).loss.backward()
            if engine.plain == (slow == "plain"):
                time.sleep(1)  # many times as long as a step takes

        state = torch.get_rng_state()
        verdict = keep_faster(engine, model, step, rounds=2)
        assert torch.equal(torch.get_rng_state(), state)
        assert verdict.streams == (slow == "plain") == (not engine.plain)
        assert len(verdict.plain_s) == len(verdict.streamed_s) == 2
        assert all(p.grad is gradient for p, gradient in zip(model.parameters(), kept))
        said = set(engine.report().values())
        assert said == ({"streamed"} if verdict.streams else {"streaming was measured to be slower"})
        streamed, mine = gradients_of(model, **inputs())
    torch.testing.assert_close(streamed, loss)
    assert_same_gradients(mine, exact)


def test_streaming_stays_where_plain_does_not_fit(family, seed):
    model = family("llama", max_position_embeddings=TOKENS)
    with stream_backprop(model, chunk=160) as engine:

        def step():
            if engine.plain:
                raise torch.OutOfMemoryError("planted")
            model(**inputs()).loss.backward()

        verdict = keep_faster(engine, model, step)
        assert verdict.streams and verdict.ratio is None and not engine.plain and "runs out" in str(verdict)
        with pytest.raises(UserError, match="0 rounds"):
            keep_faster(engine, model, step, rounds=0)
    with stream_backprop(model, attend=causal_attention) as engine, pytest.raises(UserError, match="with attend"):
        keep_faster(engine, model, step)


def test_a_verdict_reads_as_one_line():
    said = str(Verdict((2.0, 2.2), (1.0, 1.1)))
    assert said == "streamed: plain 2.1 s, streamed 1.05 s a step; plain / streamed 2.000 in the median of 2 rounds"
    slower = Verdict((1.0,), (1.2,))
    assert not slower.streams and str(slower).startswith("plain checkpointing:")
