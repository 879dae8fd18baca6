"""Models to GEMM shapes."""

from __future__ import annotations

import json

import pytest

from undertow.comms.t3_paper.workloads import Model, paper_rows, read_model, sublayers
from undertow.dist.errors import UserError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "hidden_act": "silu",
}


def test_slicing_divides_k_and_leaves_the_output_whole():
    depths = {row.layer: (row.M, row.N, row.K) for row in sublayers(Model.plain("m", 3072, 74, 16384), 8)}
    assert depths == {
        "OP": (16384, 3072, 384),
        "FC-2": (16384, 3072, 1536),
        "FC-1": (16384, 3072, 1536),
        "IP": (16384, 3072, 1152),
    }


def test_the_paper_s_rows():
    found = {(row.model, row.tp) for row in paper_rows()}
    assert found == {
        *((name, tp) for name in ("Mega-GPT-2", "T-NLG") for tp in (8, 16)),
        *((name, 32) for name in ("GPT-3", "PALM", "MT-NLG")),
    }


def test_a_config_of_transformers(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    model = read_model(path, 4096)
    assert model == Model("llama", 8192, 80, 4096, 28672, (64 + 16) * 128, gated=True)
    assert [row.K * 8 for row in sublayers(model, 8)] == [8192, 28672, 2 * 28672, 10240]


def test_gpt_2_s_names_and_defaults(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None}))
    assert read_model(path, 1024) == Model("config", 768, 12, 1024, 3072, 2304)


@pytest.mark.parametrize(
    "text, match",
    [
        ("{", "cannot read the model config"),
        ("[1]", "does not hold an object"),
        ('{"hidden_size": 8}', "num_hidden_layers"),
        ('{"hidden_size": "8"}', "positive whole number"),
        ('{"hidden_size": true}', "positive whole number"),
    ],
)
def test_a_config_that_is_none(tmp_path, text, match):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match=match):
        read_model(path, 1)


def test_degrees_that_do_not_divide():
    with pytest.raises(UserError, match="100 % 8 = 4"):
        sublayers(Model.plain("m", 100, 1, 1), 8)
    with pytest.raises(UserError, match="at least 2"):
        sublayers(Model.plain("m", 128, 1, 1), 1)
