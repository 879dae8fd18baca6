"""The planner as arithmetic: monotone in its budget, honest about what does not fit, printable."""

import random
from dataclasses import replace

import pytest

from undertow.dist.errors import UserError
from undertow.parallel.memory_model import DecoderShape, checkpointing_bytes, saved_bytes, step_flops, sum_bytes
from undertow.parallel.stream.plan import StreamPlan
from undertow.parallel.stream.planner import LONGEST_CHUNK, MARGIN, cost, plan

GiB = 1 << 30
LLAMA = DecoderShape(32, 4096, 32, 8, 128, 14336, 128256, 218_112_000)


@pytest.mark.slow
def test_plans_fit_their_budget_and_grow_no_worse_with_it(seed):
    for _ in range(20):
        tokens, host = random.choice([4096, 65536, 262144, 1 << 20]), random.choice([0, 20, 100]) * GiB
        last = float("inf")
        for budget in (4, 8, 16, 32, 64, 128, 512):
            made = plan(LLAMA, 1, tokens, budget_bytes=budget * GiB, host_bytes=host)
            if "even the smallest" in made.reason:
                assert last == float("inf"), "a larger budget fits where a smaller one did"
                continue
            assert made.device_bytes <= budget * GiB * (1 - MARGIN)
            assert made.host_bytes <= host
            assert cost(made, LLAMA) <= last * 1.001
            last = cost(made, LLAMA)


def test_one_chunk_wherever_it_fits_and_the_longest_that_pays_elsewhere():
    """Never slower than checkpointing: no plan that fits has less predicted work than the chosen one."""
    for tokens, chunks in ((8192, 1), (65536, 1), (1 << 18, 8)):
        made = plan(LLAMA, 1, tokens, budget_bytes=45 * GiB, host_bytes=100 * GiB)
        assert len(made.bounds) >= chunks
        assert ("one chunk" in made.reason) == (chunks == 1)
        for chunk in (2048, 8192, 32768, tokens):
            other = plan(LLAMA, 1, tokens, budget_bytes=45 * GiB, host_bytes=100 * GiB, chunk=chunk)
            assert "exceeds" in other.reason or cost(made, LLAMA) <= cost(other, LLAMA) * 1.001
    whole = plan(LLAMA, 1, 32768, stash=False)
    assert cost(replace(whole, chunk=8192), LLAMA) > cost(whole, LLAMA), "chunks cost something"


def test_a_sequence_that_does_not_fit_whole_is_not_cut_in_two():
    """One layer at 256K tokens on 80 GB, where 2 chunks of 128K were measured to be slower than 32 of 8K."""
    one = replace(LLAMA, layers=1)
    made = plan(one, 1, 1 << 18, budget_bytes=50 * GiB, host_bytes=100 * GiB)
    assert 8192 <= made.chunk <= LONGEST_CHUNK and str(LONGEST_CHUNK) in made.reason
    assert plan(one, 4, 1 << 16, budget_bytes=50 * GiB).chunk * 4 <= LONGEST_CHUNK, "rows of all sequences count"
    assert plan(one, 1, 1 << 18, chunk=1 << 17).chunk == 1 << 17, "what is asked for is done"
    assert len(plan(one, 1, 1 << 18).bounds) == 1, "and one chunk, which adds nothing up, may be as long as it likes"


def test_traffic_of_the_sums_by_hand():
    """Read and written, 4 bytes each, once per product of at most 16384 rows; one chunk sums nothing."""
    weight_bytes = 8 * 32 * 218_112_000
    for rows, chunk, products in ((65536, 65536, 0), (65536, 8192, 8), (65536, 32768, 4), (50000, 20000, 5)):
        assert sum_bytes(LLAMA, rows, chunk) == products * weight_bytes


def test_more_room_is_used_for_attention_outputs():
    small, large = (plan(LLAMA, 1, 65536, budget_bytes=b * GiB) for b in (24, 60))
    assert small.attention.count("device") < large.attention.count("device")
    assert plan(LLAMA, 1, 65536, budget_bytes=60 * GiB, stash=False).attention == ("none",) * 32
    with_host = plan(LLAMA, 1, 262144, budget_bytes=30 * GiB, host_bytes=200 * GiB)
    assert "host" in with_host.inputs and "host" in with_host.attention


def test_graphs_are_kept_where_there_is_room_and_nothing_else_was_asked_for(seed):
    """Of the last layers; with less predicted work than every plan without them, and none where it does not fit."""
    everything = plan(LLAMA, 1, 8192)
    assert set(everything.inputs) == {"graph"} and "twice" in everything.reason and "with the graphs" in str(everything)
    assert everything.device_bytes > 32 * saved_bytes(LLAMA, 8192)
    last = 33
    for budget in (100, 60, 45, 30, 20):
        made = plan(LLAMA, 1, 8192, budget_bytes=budget * GiB)
        graphs = made.inputs.count("graph")
        assert 0 < graphs <= last and made.inputs[-graphs:] == ("graph",) * graphs
        assert made.device_bytes <= budget * GiB * (1 - MARGIN) and f"{graphs} layers" in made.reason + "32 layers"
        assert cost(made, LLAMA) < cost(plan(LLAMA, 1, 8192, budget_bytes=budget * GiB, every=2), LLAMA)
        last = graphs
    assert plan(LLAMA, 1, 1 << 19, budget_bytes=40 * GiB, host_bytes=100 * GiB).inputs.count("graph") == 0
    for asked in (dict(chunk=8192), dict(stash=True), dict(offload=True), dict(every=2)):
        assert "graph" not in plan(LLAMA, 1, 8192, **asked).inputs
    mixture = replace(LLAMA, more_norms=None)
    assert "graph" not in plan(mixture, 1, 8192).inputs, "experts, of whose graphs no formula tells"


def test_the_host_limit_leads_to_every_second_input():
    made = plan(LLAMA, 1, 1 << 19, budget_bytes=40 * GiB, host_bytes=90 * GiB)
    assert made.inputs.count("derived") == 16 and made.host_bytes <= 90 * GiB
    assert plan(LLAMA, 1, 4096, every=2).inputs[:4] == ("device", "derived", "device", "derived")


def test_what_does_not_fit_degrades_and_says_so():
    made = plan(LLAMA, 1, 1 << 20, budget_bytes=1 * GiB)
    assert "exceeds the budget" in made.reason and made.chunk == 512
    assert "exceeds the budget" in str(made)


def test_short_chunks_and_few_rows_of_logits_only_where_nothing_else_fits():
    """Many words and few layers: logits of 128 rows are most of the least that is needed."""
    wordy = DecoderShape(2, 64, 4, 4, 16, 128, 500_000, 50_000)
    least = plan(wordy, 1, 4096, budget_bytes=1 << 40, chunk=512, loss_rows=128).device_bytes
    for share, rows in ((1.2, {128}), (0.8, {64, 32, 16})):
        made = plan(wordy, 1, 4096, budget_bytes=int(share * least))
        assert made.loss_rows in rows and made.device_bytes <= share * least, (share, made)
    assert "exceeds" in plan(wordy, 1, 4096, budget_bytes=int(0.8 * least), loss_rows=128).reason
    small = DecoderShape(4, 128, 8, 4, 16, 384, 256, 200_000, 4)
    least = plan(small, 1, 2048, chunk=512, every=2, offload=False, stash=False).device_bytes
    made = plan(small, 1, 2048, budget_bytes=int(0.95 * least))
    assert made.chunk in (128, 256) and made.device_bytes <= 0.95 * least
    assert plan(small, 1, 2048, budget_bytes=int(1.1 * least)).chunk == 512


def test_every_nth_input_where_the_host_is_the_limit():
    """The smallest n that fits: a third of the host holds a third of the inputs, to the layer."""
    row = 262144 * 4096 * 2
    for layers_on_host, every in ((32, 1), (16, 2), (11, 3), (8, 4), (6, 6), (4, 8)):
        made = plan(LLAMA, 1, 262144, budget_bytes=28 * GiB, host_bytes=layers_on_host * row, chunk=4096, stash=False)
        assert "exceeds" not in made.reason
        fits = [n for n in (1, 2, 3, 4, 6, 8) if -(-32 // n) - made.inputs.count("device") <= layers_on_host]
        assert made.every == min(fits) <= every
        assert made.host_bytes == made.inputs.count("host") * row <= layers_on_host * row
    asked = plan(LLAMA, 1, 262144, every=5)
    assert asked.inputs[:6] == ("device", *["derived"] * 4, "device") and asked.every == 5
    assert step_flops(LLAMA, 1, 9, **{**asked.fractions, "attention_kept": 0.0})["gemm"] == pytest.approx(
        step_flops(LLAMA, 1, 9, attention_kept=0.0)["gemm"] + 2 * 9 * LLAMA.layer_parameters * 25
    ), "each of 25 layers without an input of its own costs the forward of the layer below"


@pytest.mark.parametrize(("kinds", "rows"), [("kddkddk", 1), ("kddd", 3), ("hddhdd", 2), ("kkk", 0), ("kdkd", 1)])
def test_derived_inputs_that_are_there_at_once(kinds, rows):
    places = tuple({"k": "device", "d": "derived", "h": "host"}[kind] for kind in kinds)
    made = StreamPlan(1, 10, 10, places, ("none",) * len(places))
    assert made.derived_rows == rows and made.every == 1 + max(map(len, kinds.replace("h", "k").split("k")))


def test_attention_over_ranks():
    """Kept of the last layers, as many as were settled; with the ring's buffers, which grow with the ranks up to 6."""
    for settled in (0, 5, 32):
        made = plan(LLAMA, 1, 65536, budget_bytes=60 * GiB, host_bytes=100 * GiB, ranks=2, settled=settled)
        assert made.settled == settled and "exceeds" not in made.reason
        kept = [a != "none" or i == "graph" for a, i in zip(made.attention, made.inputs)]
        assert kept == [layer >= 32 - settled for layer in range(32)]
    assert plan(LLAMA, 1, 65536, ranks=1, stash=True, chunk=512).settled == 32
    needed = [plan(LLAMA, 1, 65536, ranks=n, stash=False, chunk=4096).device_bytes for n in (1, 2, 6, 8)]
    assert needed[0] < needed[1] < needed[2] == needed[3]
    alone, shared = (step_flops(LLAMA, 1, 1000, attention_kept=0.0, ranks=n) for n in (0, 4))
    assert shared["attention_forward"] == 4 * alone["attention_forward"] and shared["gemm"] == alone["gemm"]


def test_forced_choices_are_kept():
    made = plan(LLAMA, 2, 50000, chunk=3000, loss_rows=77, offload=True, stash=True)
    assert (made.chunk, made.loss_rows) == (3000, 77)
    assert set(made.inputs) == {"host"} and set(made.attention) == {"host"}
    assert made.bounds[-1] == (48000, 50000)


def test_streaming_reaches_three_times_the_length_of_checkpointing_with_offload():
    """The claim of docs/stream-backprop.md, by the formulas: device bytes per token, offload on both sides."""

    def slope(of):
        return (of(400_000) - of(200_000)) / 200_000

    ours = slope(lambda t: plan(LLAMA, 1, t, chunk=8192, offload=True, stash=False).device_bytes)
    theirs = slope(lambda t: checkpointing_bytes(LLAMA, t, chunked_loss=True, offload=True))
    assert theirs / ours > 3
    plain = slope(lambda t: checkpointing_bytes(LLAMA, t, chunked_loss=False, offload=False))
    assert plain > theirs


def test_shape_from_config():
    config = dict(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        num_hidden_layers=32, vocab_size=128256,
    )  # fmt: skip
    shape = DecoderShape.from_config(config)
    assert shape.layer_parameters == LLAMA.layer_parameters
    assert abs(shape.parameters - 8.03e9) < 0.01e9
    moe = DecoderShape.from_config(
        {**config, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 1000}
    )
    assert moe.hidden == 2000 and moe.layer_parameters > 8 * 3 * 4096 * 1000
    assert DecoderShape.from_config({"text_config": config}).width == 4096
    with pytest.raises(UserError, match="hidden_size"):
        DecoderShape.from_config({"vocab_size": 5})


def test_flops_by_hand():
    work = step_flops(LLAMA, 1, 1000, attention_kept=0.0)
    assert work["gemm"] == 8 * 1000 * 32 * 218_112_000 + 6 * 1000 * 128256 * 4096
    assert work["attention_forward"] == 2 * 2 * 1000 * 1000 * 4096 * 32
    assert step_flops(LLAMA, 1, 1000, attention_kept=1.0)["attention_forward"] == work["attention_forward"] / 2
    assert step_flops(LLAMA, 1, 1000, attention_kept=0.0, graphs=1.0) == {
        "gemm": work["gemm"] - 2 * 1000 * 32 * 218_112_000,
        "attention_forward": work["attention_forward"] / 2,
        "attention_backward": work["attention_backward"],
    }


@pytest.mark.parametrize(
    "bad",
    [
        dict(inputs=("derived", "device")),
        dict(inputs=("moon", "device")),
        dict(attention=("none",)),
        dict(inputs=("device", "graph")),  # with several chunks
        dict(inputs=("graph", "device"), chunk=10),
        dict(inputs=("device", "graph"), attention=("none", "device"), chunk=10),
        dict(chunk=0),
    ],
)
def test_impossible_plans_are_user_errors(bad):
    good = dict(batch=1, tokens=10, chunk=5, inputs=("device", "device"), attention=("none", "none"))
    StreamPlan(**good)
    with pytest.raises(UserError):
        StreamPlan(**{**good, **bad})


@pytest.mark.parametrize(
    ("family", "graphs"), [("llama", True), ("qwen2", True), ("qwen3", True), ("glm4", True), ("qwen3_moe", False)]
)
def test_graphs_are_kept_of_every_family_whose_memory_is_known(family, graphs):
    """Biases and norms of queries do not make a layer a mixture of experts."""
    model = family_config(family)
    task = DecoderShape.from_config(model)
    assert ("graph" in plan(task, 1, 4096, budget_bytes=None).inputs) is graphs


def family_config(name):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoConfig.for_model(name).to_dict()
