"""Models → the sub-layers whose output tensor parallelism must all-reduce, as GEMM shapes (paper section 5.2, Table 2).

Megatron slices four products per layer so that every GPU holds a partial sum of the whole output: forward the
attention's output projection (OP) and the second feed-forward product (FC-2), backward the input gradients of the
first feed-forward product (FC-1) and of the query-key-value projection (IP). Slicing divides K and leaves M x N alone,
so all four have one output size and differ only in how much they compute per output byte. That ratio decides
everything below.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...dist.errors import UserError


@dataclass(frozen=True)
class Model:
    """A Transformer as far as its sliced products see it.

    `tokens`: rows of the activations of one micro-batch (sequence length x batch). `intermediate`: the feed-forward
    width, `gated` when it has a gate of the same width. `qkv`: columns of the query, key and value projections.
    """

    name: str
    hidden: int
    layers: int
    tokens: int
    intermediate: int
    qkv: int
    gated: bool = False

    @classmethod
    def plain(cls, name: str, hidden: int, layers: int, tokens: int) -> Model:
        """GPT's proportions: feed-forward four times as wide, as many key heads as query heads."""
        return cls(name, hidden, layers, tokens, 4 * hidden, 3 * hidden)


@dataclass(frozen=True)
class SubLayer:
    """One sliced product: out[M, N] = a[M, K] @ b[K, N] on each of `tp` GPUs, then the sum over the GPUs."""

    model: str
    tp: int
    layer: str
    M: int
    N: int
    K: int

    @property
    def name(self) -> str:
        return f"{self.model} TP-{self.tp} {self.layer}"


# Hidden size and layers are recalled from Table 2, and so are tokens: sequence 1K x batch 16, 8 and, for the large
# models, 2. The ratio of a row's times depends on hidden / tp and hardly on tokens.
PAPER_MODELS = (
    Model.plain("Mega-GPT-2", 3072, 74, 16 * 1024),
    Model.plain("T-NLG", 4256, 78, 8 * 1024),
    Model.plain("GPT-3", 12288, 96, 2 * 1024),
    Model.plain("PALM", 18432, 118, 2 * 1024),
    Model.plain("MT-NLG", 20480, 105, 2 * 1024),
)
SMALL, LARGE = PAPER_MODELS[:2], PAPER_MODELS[2:]
FORWARD, BACKWARD = ("OP", "FC-2"), ("FC-1", "IP")


def sublayers(model: Model, tp: int) -> list[SubLayer]:
    """The four sliced products of one layer; `UserError` when `tp` does not divide a width."""
    gates = 2 if model.gated else 1
    depths = {
        "OP": model.hidden,
        "FC-2": model.intermediate,
        "FC-1": gates * model.intermediate,
        "IP": model.qkv,
    }
    if tp < 2:
        raise UserError(f"--tp {tp}", expected="at least 2 GPUs: one GPU has nothing to reduce")
    for layer, depth in depths.items():
        if depth % tp:
            raise UserError(
                f"{model.name}: {layer} sums over {depth} columns, and {depth} % {tp} = {depth % tp}",
                expected="a tensor-parallel degree that divides them",
            )
    return [SubLayer(model.name, tp, layer, model.tokens, model.hidden, depth // tp) for layer, depth in depths.items()]


def paper_rows(tps: tuple[int, ...] = (8, 16, 32)) -> list[SubLayer]:
    """The rows of the paper's evaluation: the small models at TP 8 and 16, the large ones at TP 32."""
    return [row for tp in tps for model in (LARGE if tp == 32 else SMALL) for row in sublayers(model, tp)]


def read_model(path: Path, tokens: int) -> Model:
    """A model from a transformers `config.json`, or the same keys by hand; `UserError` names what is missing."""
    try:
        config: Any = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("the file does not hold an object")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the model config {path}: {error}", expected="a JSON object") from error
    hidden = _whole(config, path, "hidden_size", "n_embd", "d_model")
    layers = _whole(config, path, "num_hidden_layers", "n_layer", "num_layers")
    heads = _whole(config, path, "num_attention_heads", "n_head", "num_heads")
    groups = _whole(config, path, "num_key_value_heads", default=heads)
    head = _whole(config, path, "head_dim", default=hidden // heads)
    intermediate = _whole(config, path, "intermediate_size", "n_inner", "d_ff", default=4 * hidden)
    gated = str(config.get("hidden_act", "")).lower() in ("silu", "swish", "swiglu", "geglu")
    name = str(config.get("model_type") or path.stem)
    return Model(name, hidden, layers, tokens, intermediate, (heads + 2 * groups) * head, gated)


def _whole(config: dict[str, Any], path: Path, *names: str, default: int | None = None) -> int:
    """The first of `names` that the config holds, as a positive whole number."""
    for name in names:
        value = config.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{path}: '{name}' is {value!r}", expected="a positive whole number")
            return value
    if default is None:
        raise UserError(f"{path} has none of {', '.join(map(repr, names))}", remedy="add one of them")
    return default
