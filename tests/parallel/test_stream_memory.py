"""Peak live bytes of a streamed step: linear in the sequence, no T x T object, within 10 % of the formula."""

import pytest
import torch

from undertow.parallel.stream import StreamPlan, stream_backprop
from undertow.parallel.stream.planner import predicted
from undertow.parallel.stream.protocol import causal_attention
from undertow.parallel.stream.track import PeakBytes

CHUNK = 256


def llama(dtype=torch.float32, family="llama", layers=3):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        family, vocab_size=512, hidden_size=64, intermediate_size=192, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=1 << 16, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.to(dtype).train()


def peak(model, tokens, **options):
    """Peak bytes above weights, existing gradients and host blocks, of a step like any but the first; and the plan."""
    ids = torch.randint(0, 512, (1, tokens))
    with stream_backprop(model, chunk=CHUNK, loss_rows=128, **options) as engine:
        model(input_ids=ids, labels=ids).loss.backward()
        with PeakBytes() as memory:
            model(input_ids=ids, labels=ids).loss.backward()
    return memory, engine.last_plan


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "options", "shortest"),
    [
        (torch.float32, {"offload": False, "stash": False}, 512),
        (torch.float32, {"offload": False, "stash": True}, 512),
        (torch.float32, {"offload": True, "stash": False}, 512),
        (torch.bfloat16, {"offload": False, "stash": False}, 1536),  # from here on attention is the peak
    ],
    ids=str,
)
def test_peak_follows_the_formula_and_is_linear(dtype, options, shortest, seed):
    model, peaks = llama(dtype), {}
    lengths = shortest, shortest + 512, shortest + 1024
    for tokens in lengths:
        memory, plan = peak(model, tokens, **options)
        peaks[tokens] = memory.peak
        assert 0.9 <= memory.peak / plan.device_bytes <= 1.1, (tokens, memory.peak, plan.device_bytes)
        assert memory.largest < tokens * tokens * dtype.itemsize, "something of T x T"
    low, middle, high = (peaks[tokens] for tokens in lengths)
    assert abs(high - 2 * middle + low) <= 0.01 * high, f"not linear: {peaks}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2", "glm4"])
@pytest.mark.parametrize("graphs", [1, 3])
def test_peak_of_kept_graphs_follows_the_formula(graphs, family, dtype, seed):
    """Within 10 %, as for chunks; also where a layer has more norms."""
    model, ids = llama(dtype, family), torch.randint(0, 512, (1, 1024))
    inputs = ("device",) * (3 - graphs) + ("graph",) * graphs
    found = []
    for tokens in (512, 1024):
        shape = stream_shape(model)
        own = StreamPlan(1, tokens, tokens, inputs, ("none",) * 3, 128)
        with stream_backprop(model, plan=own):
            model(input_ids=ids[:, :tokens], labels=ids[:, :tokens]).loss.backward()
            with PeakBytes() as memory:
                model(input_ids=ids[:, :tokens], labels=ids[:, :tokens]).loss.backward()
        found.append(memory.peak / predicted(own, shape, kernel=False).device_bytes)
    assert all(0.9 <= ratio <= 1.1 for ratio in found), found


def attend(q, k, v, *, positions=None, scale=None, window=None):
    return causal_attention(q, k, v, scale=scale, window=window)


@pytest.mark.slow
@pytest.mark.parametrize("stash", [False, True])
@pytest.mark.parametrize(("dtype", "offload"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_peak_around_an_attention_of_ones_own(dtype, offload, stash, seed):
    """Which takes all rows at once; from 2048 tokens on it is the peak. What a ring allocates inside is not seen."""
    memory, plan = peak(llama(dtype), 2048, attend=attend, stash=stash, offload=offload)
    assert len(plan.bounds) == 8 and set(plan.attention) == ({"host" if offload else "device"} if stash else {"none"})
    assert 0.9 <= memory.peak / plan.device_bytes <= 1.1, (memory.peak, plan.device_bytes)


@pytest.mark.slow
@pytest.mark.parametrize(("every", "offload", "host_rows"), [(3, True, 3), (4, False, 0), (4, True, 2)])
def test_peak_where_every_nth_input_is_kept(every, offload, host_rows, seed):
    """Of seven layers; n - 1 computed inputs are there at once."""
    memory, plan = peak(llama(layers=7), 1024, every=every, offload=offload, stash=False)
    assert plan.every == every and plan.host_bytes == host_rows * 1024 * 64 * 4
    assert 0.9 <= memory.peak / plan.device_bytes <= 1.1, (memory.peak, plan.device_bytes)


def stream_shape(model):
    from undertow.parallel.stream.api import adapter_for

    return adapter_for(model).shape(torch.empty(1, 1, 64, dtype=model.dtype))


def test_less_memory_than_checkpointing(seed):
    model, ids = llama(), torch.randint(0, 512, (1, 1024))
    memory, _ = peak(model, 1024, offload=False, stash=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(input_ids=ids, labels=ids).loss.backward()
    with PeakBytes() as plain:
        model(input_ids=ids, labels=ids).loss.backward()
    assert memory.peak < plain.peak / 2


def test_tracker_counts_births_deaths_and_views(seed):
    with PeakBytes() as memory:
        a = torch.zeros(1000, dtype=torch.uint8)
        b = a.view(10, 100)[3:]
        c = torch.ones(500, dtype=torch.uint8)
        assert memory.live == 1500
        del a
        assert memory.live == 1500, "a view keeps the storage"
        del b
        assert memory.live == 500 and memory.peak == 1500 and memory.largest == 1000
        c.add_(1)
    assert memory.peak == 1500
