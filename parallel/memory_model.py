"""How many bytes streamed backpropagation needs above weights and gradients, and how many FLOPs: closed forms.

The peak is the largest of three moments: a layer's forward, a layer's backward, the loss. Each is a sum of terms in T
(the sequence), in C (the rows of a chunk), in R (the rows of a loss chunk) and in the weights of one layer; no term has
T squared. `tests/parallel` holds the forms within 10 % of what a tracker of live tensors measures. The factors of C
were fitted to Llama layers in plain PyTorch; other layers come close. Gradient checkpointing has its form here too, so
that a plan can say what else would fit.

Units: bytes, rows. e is the element size of activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..dist.errors import UserError

KEY_TILE = 16384  # as stream.attention
PRODUCT_ROWS = 16384  # as stream.sums
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# Families whose layers save what the formulas count: norms of the width beside the two, and whether q and k have some.
_NORMS = {
    "llama": (0, False), "qwen2": (0, False), "mistral": (0, False), "phi3": (0, False), "cohere": (0, False),
    "gpt_neox": (0, False), "qwen3": (0, True), "olmo2": (0, True), "glm4": (2, False), "gemma3_text": (2, True),
}  # fmt: skip


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder: `q` = heads * head_dim and `kv` = kv_heads * head_dim channels, `hidden` MLP channels that a
    token passes (experts per token times theirs in a mixture), `layer_parameters` all weights of one layer,
    `more_norms` channels that a layer normalises beside its two norms of the width (None: what autograd saves of it is
    not known)."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    layer_parameters: int
    element_size: int = 2
    tied: bool = False
    more_norms: int | None = 0

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.vocab * self.width * (1 if self.tied else 2)

    @property
    def active_parameters(self) -> int:
        """Weights of one layer that a token meets: all of them, but for experts that it does not pass."""
        met = self.width * (2 * self.q + 2 * self.kv) + 3 * self.width * self.hidden + 2 * self.width
        return min(self.layer_parameters, met)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], element_size: int = 2) -> DecoderShape:
        """From the keys of a Hugging Face config.json. `UserError` naming what is missing."""
        config = {**config, **config.get("text_config", {})}
        try:
            width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
            layers, vocab = int(config["num_hidden_layers"]), int(config["vocab_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the config has no usable {error}",
                expected="hidden_size, num_attention_heads, num_hidden_layers and vocab_size",
            ) from error
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or width // heads)
        hidden = int(config.get("intermediate_size") or 4 * width)
        experts = int(
            config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts") or 0
        )
        attention = width * head_dim * (2 * heads + 2 * kv_heads)
        weights = attention + 3 * width * hidden + 2 * width
        if experts:
            one, shared = int(config.get("moe_intermediate_size") or hidden), int(config.get("n_shared_experts") or 0)
            active = int(config.get("num_experts_per_tok") or 1) + shared
            weights = attention + 3 * width * one * (experts + shared) + width * experts
            hidden = one * active
        tied = bool(config.get("tie_word_embeddings", False))
        norms = None if experts else _NORMS.get(str(config.get("model_type")))
        more = None if norms is None else norms[0] * width + norms[1] * (heads + kv_heads) * head_dim
        return cls(layers, width, heads, kv_heads, head_dim, hidden, vocab, weights, element_size, tied, more)


@dataclass(frozen=True)
class Moments:
    """Bytes at the three moments that can be the peak."""

    forward: int
    backward: int
    loss: int

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward, self.loss)


def chunk_bytes(shape: DecoderShape, rows: int) -> int:
    """The most that lives of one chunk's graph: in the backward of the MLP. Measured on Llama layers of transformers,
    whose RMSNorm upcasts low precision (hence 12 against 5)."""
    d, q, kv, f = shape.width, shape.q, shape.kv, shape.hidden
    per_row = 12 * d + 2 * q + 2 * kv + 5 * f if shape.element_size < 4 else 5 * d + 2 * q + 2 * kv + 6.5 * f
    return int(rows * shape.element_size * (per_row + norm_elements(shape)))


def norm_elements(shape: DecoderShape) -> int:
    """Saved of one row by norms beyond the usual two: in low precision float32 copies too."""
    return (2 if shape.element_size >= 4 else 5) * (shape.more_norms or 0)


def scratch_bytes(shape: DecoderShape, chunks: int) -> int:
    """The sums of weight gradients of one layer: float32 when there are several chunks."""
    return shape.layer_parameters * (shape.element_size if chunks == 1 else max(4, shape.element_size))


def attention_bytes(shape: DecoderShape, rows: int) -> int:
    """One layer's attention output and log-sum-exp."""
    return rows * (shape.q * shape.element_size + 4 * shape.heads)


def tile_bytes(shape: DecoderShape, rows: int, chunk: int, kernel: bool = True) -> int:
    """dk and dv as a backward kernel returns them, for one tile of the prefix; on a CPU low precision is widened."""
    each = shape.element_size if kernel or shape.element_size >= 4 else 8  # then k, v of the tile are float32 as well
    return 2 * shape.kv * each * min(max(rows - chunk, chunk), KEY_TILE)


def loss_bytes(shape: DecoderShape, rows: int, kernel: bool) -> int:
    """One chunk of logits with its gradient (with float32 copies where no kernel runs), and the head's gradient."""
    e = shape.element_size
    per_logit = 2 * e if kernel else e + 8 + (e if e < 4 else 0)
    head = shape.vocab * shape.width * (4 + (e if e < 4 else 0))
    return rows * (shape.vocab * per_logit + 6 * shape.width * max(e, 4)) + head


def moments(
    shape: DecoderShape,
    *,
    rows: int,
    chunk: int,
    loss_rows: int,
    inputs_on_device: int,
    inputs_on_host: int,
    attention_on_device: int,
    attention_on_host: int = 0,
    derived: int = 0,
    graphs: int = 0,
    kernel: bool = True,
    ranks: int = 0,
    call: tuple[int, int] = (0, 0),
) -> Moments:
    """Peak bytes for `rows` = batch * tokens. `inputs_on_device` counts layers, likewise `attention_on_device` and
    `graphs`, the last layers, of which everything is kept: gone when the layers below them are differentiated.
    `derived`: computed inputs that are there beside `inputs_on_device`. `ranks`: 0, or attention is one call over all
    rows, and over those of so many ranks, that allocates `call` bytes in forward and in backward."""
    e, d, kv = shape.element_size, shape.width, shape.kv
    chunks = -(-rows // chunk)
    chunk = min(chunk, rows)
    row = rows * d * e
    kept = inputs_on_device * row + attention_on_device * attention_bytes(shape, rows)
    kept += rows * (2 * shape.head_dim * e + 32)  # rotary tables; token, position and label numbers
    buffers = 2 * rows * kv * e if chunks > 1 else 0
    gradients = 2 * rows * kv * max(4, e) if chunks > 1 else 0
    working, sums = chunk_bytes(shape, chunk), scratch_bytes(shape, chunks)
    in_flight = 2 * row if inputs_on_host else row
    forward = kept + in_flight + buffers + working // 3
    fetched = row * ((1 if inputs_on_host else 0) + derived)
    in_mlp = working
    in_attention = tile_bytes(shape, rows, chunk, kernel) + chunk * e * (8 * d + 4 * shape.q + 4 * kv)
    at_the_end = shape.layer_parameters * e if chunks > 1 else 0
    if ranks and chunks == 1:
        forward = max(forward, kept + in_flight + working // 3 + call[0])
        in_attention = max(in_attention, call[1] + chunk * e * (8 * d + 4 * shape.q + 4 * kv))
    if ranks and chunks > 1:
        projected, out = rows * e * (shape.q + 2 * kv), 0 if attention_on_device else attention_bytes(shape, rows)
        whole = projected + max(out, call[0])
        forward = kept + in_flight - row + max(whole, max(projected, out + row) + working // 3)
        buffers, gradients = 0, rows * e * shape.q  # of the attention's result; then also those of q, k and v
        one, all_known = attention_bytes(shape, rows), attention_on_device + attention_on_host + graphs == shape.layers
        in_mlp = working + (0 if all_known else max(0, projected + one - attention_on_device * one))
        in_mlp = max(in_mlp, working + out)
        in_attention = out + projected + max(projected, call[1])
    backward = kept + row + fetched + buffers + gradients + sums + max(in_mlp, in_attention, at_the_end)
    loss = kept + 2 * row + loss_bytes(shape, loss_rows, kernel)
    if graphs:
        saved = graphs * saved_bytes(shape, rows)
        in_graph = kept + saved + rows * e * (2 * d + shape.hidden) + shape.layer_parameters * e
        only = graphs == shape.layers
        forward, backward = (0 if only else forward), max(0 if only else backward, in_graph)
        loss += saved
    return Moments(int(forward), int(backward), int(loss))


def checkpointing_bytes(shape: DecoderShape, rows: int, *, chunked_loss: bool, offload: bool) -> int:
    """Gradient checkpointing of whole layers: every input kept (or away), one layer recomputed whole."""
    e = shape.element_size
    inputs = 2 * rows * shape.width * e if offload else shape.layers * rows * shape.width * e
    layer = chunk_bytes(shape, rows) + shape.layer_parameters * e
    logits = rows * shape.vocab * (2 * e + 8)
    head = shape.vocab * shape.width * e
    return inputs + max(layer, loss_bytes(shape, 1024, True) if chunked_loss else logits + head)


def saved_bytes(shape: DecoderShape, rows: int) -> int:
    """What autograd keeps of one layer of a plain step: norms' inputs, normalised and scaled values (with float32
    copies in low precision), q, k, v, attention's output (twice, where it is made contiguous) and the MLP's four."""
    wide = 6 if shape.element_size >= 4 else 8
    per_row = wide * shape.width + 3 * shape.q + 2 * shape.kv + 4 * shape.hidden
    per_row += norm_elements(shape)
    return rows * (shape.element_size * per_row + 4 * shape.heads)


def plain_bytes(shape: DecoderShape, rows: int) -> int:
    """Peak of a step without recomputation, above weights and gradients: every layer's saved values, and logits of all
    rows with their gradients. Within 15 % of live bytes on decoders of transformers and of the examples."""
    e = shape.element_size
    logits = rows * shape.vocab * (4 + e + (4 + e if e < 4 else e)) + 5 * rows * shape.width * e
    backward = rows * e * (2 * shape.width + 3 * shape.hidden)
    return shape.layers * saved_bytes(shape, rows) + max(logits, backward)


def plain_flops(shape: DecoderShape, batch: int, tokens: int) -> dict[str, float]:
    """FLOPs of one forward and backward by kind, nothing computed twice; attention counts visible pairs only."""
    rows = batch * tokens
    forward = 2.0 * rows * (shape.layers * shape.active_parameters + shape.vocab * shape.width)
    attention = 2.0 * batch * tokens * tokens * shape.q * shape.layers
    return {
        "gemm": forward,
        "gemm_backward": 2 * forward,
        "attention_forward": attention,
        "attention_backward": 2.5 * attention,
    }


def step_flops(
    shape: DecoderShape,
    batch: int,
    tokens: int,
    *,
    attention_kept: float,
    derived: float = 0.0,
    graphs: float = 0.0,
    chunks: int = 1,
    ranks: int = 0,
) -> dict[str, float]:
    """FLOPs of one forward and backward by kind: 'gemm', 'attention_forward', 'attention_backward'.

    `attention_kept`, `derived` and `graphs` are fractions of the layers. Attention counts visible pairs only (causal:
    half). With several chunks, backward projects keys and values of all but the last chunk once more (queries too,
    which a layer cannot leave out). `ranks`: 0, or attention is one call over the rows of so many ranks, of which these
    are one's share: then several chunks are projected three times more.
    """
    rows = batch * tokens
    forward = 2.0 * rows * shape.layers * shape.active_parameters
    head = 3 * 2.0 * rows * shape.vocab * shape.width
    attention = 2.0 * batch * tokens * tokens * shape.q * shape.layers * max(1, ranks)
    again = 1 - 1 / chunks if not ranks or chunks == 1 else 3
    keys = 2.0 * rows * shape.layers * shape.width * (shape.q + 2 * shape.kv) * again
    return {
        "gemm": forward * (4 + derived - graphs) + head + keys,
        "attention_forward": attention * (2 - attention_kept + derived - graphs),
        "attention_backward": 2.5 * attention,
    }


def sum_bytes(shape: DecoderShape, rows: int, chunk: int) -> int:
    """Device memory traffic of adding weight gradients to their float32 sums, over a step: each product of at most
    `PRODUCT_ROWS` rows reads and writes the sum, so chunks longer than that save nothing here."""
    if chunk >= rows:
        return 0
    products = rows // chunk * -(-chunk // PRODUCT_ROWS) + -(-(rows % chunk) // PRODUCT_ROWS)
    return 8 * products * shape.layers * shape.layer_parameters
