"""The byte-level decoder of the main job: RMSNorm, rotary positions, grouped-query attention, SwiGLU, optional tying.

It follows `parallel.stream.protocol`, so that streamed backpropagation and sequence-parallel attention can replace its
one call of attention; used plainly it is an ordinary torch module.

Shapes: B batch, T tokens, C channels, H query heads, G key/value heads, D head dim, F hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dist.errors import UserError
from ..parallel.stream.protocol import Attend, causal_attention, plain_loss


@dataclass(frozen=True)
class LMConfig:
    """Sizes of the model. `vocab` is 256 byte values; `width` must be a multiple of `heads`."""

    layers: int = 6
    width: int = 256
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 704
    vocab: int = 256
    tied: bool = True
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise UserError(
                f"width {self.width} with {self.heads} heads", expected="width = heads × an even head dimension"
            )
        if self.heads % self.kv_heads:
            raise UserError(f"{self.heads} heads over {self.kv_heads} key/value heads", expected="a whole ratio")


class Rope(nn.Module):
    """Rotary position embedding (Su et al. 2021): rotates pairs (x_i, x_{i + D/2}) by position × base^(-2i/D)."""

    inverse: Tensor

    def __init__(self, dim: int, base: float) -> None:
        super().__init__()
        inverse = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        self.register_buffer("inverse", inverse.float(), persistent=False)

    def forward(self, x_BHTD: Tensor, positions_BT: Tensor) -> Tensor:
        angle = positions_BT[:, None, :, None].float() * self.inverse
        cos, sin = angle.cos().to(x_BHTD.dtype), angle.sin().to(x_BHTD.dtype)
        left, right = x_BHTD.chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Block(nn.Module):
    """One decoder layer; `attend` is the only place where tokens meet."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        dim = config.width // config.heads
        self.heads, self.kv_heads, self.dim = config.heads, config.kv_heads, dim
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.query = nn.Linear(config.width, config.heads * dim, bias=False)
        self.key = nn.Linear(config.width, config.kv_heads * dim, bias=False)
        self.value = nn.Linear(config.width, config.kv_heads * dim, bias=False)
        self.output = nn.Linear(config.heads * dim, config.width, bias=False)
        self.rope = Rope(dim, config.rope_base)
        self.mlp_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x_BTC: Tensor, positions: Tensor, attend: Attend = causal_attention) -> Tensor:
        batch, tokens, _ = x_BTC.shape
        h_BTC = self.attention_norm(x_BTC)

        def split(y: Tensor, heads: int) -> Tensor:
            return y.view(batch, tokens, heads, self.dim).transpose(1, 2)

        q_BHTD = self.rope(split(self.query(h_BTC), self.heads), positions)
        k_BGTD = self.rope(split(self.key(h_BTC), self.kv_heads), positions)
        v_BGTD = split(self.value(h_BTC), self.kv_heads)
        mixed_BHTD = attend(q_BHTD, k_BGTD, v_BGTD)
        x_BTC = x_BTC + self.output(mixed_BHTD.transpose(1, 2).reshape(batch, tokens, -1))
        h_BTC = self.mlp_norm(x_BTC)
        return x_BTC + self.down(F.silu(self.gate(h_BTC)) * self.up(h_BTC))


class ByteLM(nn.Module):
    """Bytes in, next-byte logits or loss out. Initialised from torch's default generator, residual outputs smaller."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                narrow = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * config.layers) ** 0.5 if narrow else 0.02)

    @property
    def stream_layers(self) -> nn.ModuleList:
        return self.blocks

    @property
    def stream_head(self) -> tuple[nn.Module, nn.Linear]:
        """Norm and head, whose weight gradients streaming sums in float32."""
        return self.norm, self.head

    def token_logits(self, x_NC: Tensor) -> Tensor:
        return self.head(self.norm(x_NC))

    def loss(self, x_BTC: Tensor, labels_BT: Tensor, num_items: Tensor | int | None = None) -> Tensor:
        return plain_loss(self.token_logits(x_BTC), labels_BT, num_items)

    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        attend: Attend = causal_attention,
        num_items: Tensor | int | None = None,
    ) -> Tensor:
        """Logits [B, T, V], or the loss when labels are given (labels_BT[:, t] is the target of token t, -100 none)."""
        if positions is None:
            positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        x_BTC = self.embedding(tokens_BT)
        for block in self.blocks:
            x_BTC = block(x_BTC, positions, attend)
        return self.token_logits(x_BTC) if labels_BT is None else self.loss(x_BTC, labels_BT, num_items)
