"""Tiny random models of the families that streamed backpropagation must be exact for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

BASE = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)
TWO_KINDS = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": dict(head_dim=8),
    "mistral": dict(head_dim=8, sliding_window=9),
    "gemma3_text": dict(head_dim=8, sliding_window=8, layer_types=TWO_KINDS, query_pre_attn_scalar=8),
    "phi3": {},
    "olmo2": {},
    "glm4": dict(head_dim=8),
    "cohere": dict(logit_scale=0.25),
    "qwen3_moe": dict(head_dim=8, num_experts=4, **EXPERTS),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "deepseek_v3": dict(
        n_routed_experts=4, n_group=1, topk_group=1, n_shared_experts=1, kv_lora_rank=16, q_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, num_key_value_heads=4, **EXPERTS,
    ),
    "gpt_neox": {},
    "gpt_oss": dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8, layer_types=TWO_KINDS),
}  # fmt: skip


def make_family(name: str, **changes):
    """A random float32 model in training mode; `changes` go into its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **{**BASE, **FAMILIES[name], **changes})
    implementation = "eager" if name == "gpt_oss" else "sdpa"  # sinks need eager in the plain path
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).float().train()


@pytest.fixture(scope="session")
def attention_reference():
    """The module beside this file; tests have no package to import it from."""
    return load("attention_reference")


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def family():
    """`family(name, **config changes)`: a tiny random model."""
    pytest.importorskip("transformers")
    return make_family


@pytest.fixture
def gradients_of():
    """`gradients_of(model, **inputs)`: (loss, {name: gradient}) of one backward, gradients cleared before and after."""

    def run(model, **inputs):
        model.zero_grad(set_to_none=True)
        loss = model(**inputs).loss
        loss.backward()
        grads = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return loss.detach(), grads

    return run


@pytest.fixture
def assert_same_gradients():
    """Relative error of every parameter's gradient at most `tolerance`, and the same parameters have one."""

    def check(mine, exact, tolerance=1e-5):
        assert mine.keys() == exact.keys()
        for name in exact:
            error = (mine[name].double() - exact[name].double()).norm() / exact[name].double().norm().clamp_min(1e-12)
            assert error <= tolerance, f"{name}: relative error {error:.2e}"

    return check


torch.set_num_threads(1)


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """`flex_on_cpu()`: FlexAttention without its kernel, traced as on CUDA up to there; gives what it compiles. torch
    computes its interface on a CPU too, gradients included, once it is not asked whether it may."""

    def lift():
        from undertow.parallel.blocks import flex

        monkeypatch.setattr(flex.torch_flex, "_validate_device", lambda q, k, v: None)
        monkeypatch.setattr(flex, "supports", lambda q, k, v, *, causal, window: True)
        programs = flex.Programs("aot_eager")
        monkeypatch.setattr(flex, "programs", lambda: programs)
        return programs

    return lift
