"""Exact gradients for every family: float32, relative error per parameter at most 1e-5 against plain autograd.

The cases cover all pairs of (family, labels and masks, batch, chunk, tying, LoRA, where things wait).
UNDERTOW_TEST_FULL=1 runs every combination instead, 10080 of them.
"""

import itertools
import os
import random

import pytest
import torch
from torch import nn

from undertow.parallel.stream import StreamPlan, stream_backprop

pytestmark = pytest.mark.slow  # together more than ten seconds

pytest.importorskip("transformers")
TOKENS = 23
FACTORS = {
    "family": [
        "llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "olmo2", "glm4", "cohere", "qwen3_moe", "mixtral",
        "deepseek_v3", "gpt_neox", "gpt_oss",
    ],
    "shape": ["full", "prompt", "sparse", "packed", "left", "right"],
    "batch": [1, 4],
    "chunk": [1, 7, TOKENS, 100, 12],
    "tied": [False, True],
    "lora": [False, True],
    "place": ["device", "stash", "host", "host+stash", "every2", "graph"],
}  # fmt: skip
PLACES = {
    "device": {"stash": False, "offload": False},
    "stash": {"stash": True, "offload": False},
    "host": {"offload": True, "stash": False},
    "host+stash": {"offload": True, "stash": True},
    "every2": {"every": 2, "offload": True},
}


def options_of(case):
    """Of a case; a kept graph has one chunk, so there the chunk is that of the layer below it, which is the whole."""
    if case["place"] != "graph":
        return {"chunk": case["chunk"], "loss_rows": 5, **PLACES[case["place"]]}
    return {
        "plan": StreamPlan(case["batch"], TOKENS, max(case["chunk"], TOKENS), ("device", "graph"), ("none",) * 2, 5)
    }


def pairwise_cases():
    """A small set of cases in which every pair of values of any two factors occurs; greedy, from a fixed seed."""
    if os.environ.get("UNDERTOW_TEST_FULL"):
        return [dict(zip(FACTORS, values)) for values in itertools.product(*FACTORS.values())]
    generator = random.Random(4)
    names = list(FACTORS)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in FACTORS[a] for y in FACTORS[b]}
    cases = []
    while missing:
        best, covered = {}, set()
        seed_pair = generator.choice(sorted(missing, key=str))
        for _ in range(30):
            case = {name: generator.choice(FACTORS[name]) for name in names} | dict(seed_pair)
            pairs = {p for p in itertools.combinations([(n, case[n]) for n in names], 2) if p in missing}
            if len(pairs) > len(covered):
                best, covered = case, pairs
        cases.append(best)
        missing -= covered
    return cases


def label(case):
    return "-".join(str(value) for value in case.values())


ADAPTED = ("q_proj", "o_proj", "qkv_proj", "query_key_value", "down_proj", "kv_b_proj")


class LoRA(nn.Module):
    """A frozen linear layer with a trained low-rank addition."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(2, base.in_features) * 0.1)
        self.up = nn.Parameter(torch.randn(base.out_features, 2) * 0.1)

    def forward(self, x):
        return self.base(x) + (x @ self.down.T) @ self.up.T


def add_lora(model):
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name in ADAPTED:
                setattr(module, name, LoRA(child))
    return model


def inputs_for(shape, batch):
    ids = torch.randint(3, 97, (batch, TOKENS))
    labels, extra = ids.clone(), {}
    if shape == "prompt":
        labels[:, : TOKENS // 2] = -100
    if shape == "sparse":
        labels[torch.rand(batch, TOKENS) < 0.8] = -100
        labels[:, -1] = ids[:, -1]
    if shape == "packed":
        cuts = sorted(random.sample(range(1, TOKENS), 3))
        positions = torch.cat([torch.arange(b - a) for a, b in zip([0, *cuts], [*cuts, TOKENS])])
        extra["position_ids"] = positions[None].expand(batch, -1).contiguous()
        extra["use_cache"] = False  # with a cache, transformers does not look for documents
    if shape in ("left", "right"):
        mask = torch.ones(batch, TOKENS, dtype=torch.long)
        for row in range(batch):
            missing = random.randint(0, TOKENS // 2)
            cut = slice(0, missing) if shape == "left" else slice(TOKENS - missing, TOKENS)
            mask[row, cut], labels[row, cut] = 0, -100
        extra["attention_mask"] = mask
    return {"input_ids": ids, "labels": labels, **extra}


@pytest.mark.parametrize("case", pairwise_cases(), ids=label)
def test_gradients_equal_autograd(case, family, gradients_of, assert_same_gradients, seed):
    model = family(case["family"], tie_word_embeddings=case["tied"])
    if case["lora"]:
        add_lora(model)
    inputs = inputs_for(case["shape"], case["batch"])
    loss, exact = gradients_of(model, **inputs)
    with stream_backprop(model, **options_of(case)) as engine:
        streamed_loss, mine = gradients_of(model, **inputs)
    assert set(engine.report().values()) == {"streamed"} and len(engine.report()) == 2
    torch.testing.assert_close(streamed_loss, loss, rtol=1e-6, atol=1e-6)
    assert_same_gradients(mine, exact)


def test_every_pair_of_values_occurs():
    cases = pairwise_cases()
    for a, b in itertools.combinations(FACTORS, 2):
        assert len({(case[a], case[b]) for case in cases}) == len(FACTORS[a]) * len(FACTORS[b])
