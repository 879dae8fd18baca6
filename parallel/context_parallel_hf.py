"""Hugging Face models under context parallelism: two public registries and one hook, no patched model file.

The attention interface `undertow_context` takes the place of the model's attention, the mask interface of that name
answers "no mask", because a rank's tokens are no interval and what they see is known from the layout. The layout of
the current batch travels as a keyword argument through the layers, so that a layer recomputed in backward (activation
checkpointing) sees the batch that it saw in forward, whatever has been called since.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..dist.errors import UserError
from .context_parallel import ContextParallel

NAME = "undertow_context"
IGNORE = -100


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    undertow_context: ContextParallel | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """[B, H, T, D] of this rank's tokens to [B, T, H, E] over the whole sequence."""
    if undertow_context is None:
        raise UserError(
            f"{type(module).__name__} does not hand keyword arguments on to its attention",
            remedy="this model needs an adapter of its own: call token_ring_attention in its attention",
        )
    refused = {
        "attention dropout": dropout if module.training and dropout else None,
        "a soft cap": softcap,
        "attention sinks": s_aux,
        "an attention mask": attention_mask,
    }
    for what, given in refused.items():
        if given is not None:
            raise UserError(
                f"{what} in {type(module).__name__}", expected="attention without it under context parallel"
            )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    window = sliding_window if sliding_window is not None else getattr(module, "sliding_window", None)
    out = undertow_context.attend(query, key, value, causal=causal, window=window if causal else None, scale=scaling)
    return out.transpose(1, 2), None


def no_mask(*_: Any, use_vmap: bool = False, **__: Any) -> None:
    """Registered as the mask interface."""
    if use_vmap:
        raise UserError("the model adds a mask function of its own", expected="causal, sliding or packed attention")


class Enabled:
    """A model under context parallelism, until `disable()`."""

    def __init__(self, model: nn.Module, context: ContextParallel) -> None:
        roots = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
        if not roots:
            raise UserError(f"{type(model).__name__} holds no transformers model", remedy="use ContextParallel itself")
        self.model, self.root, self.context = model, roots[0], context
        if getattr(self.root.config, "attention_chunk_size", None):
            raise UserError("attention in chunks (attention_chunk_size)", expected="causal or sliding attention")
        if mixing := _mixes_otherwise(self.root):
            raise UserError(
                f"{mixing} in {type(self.root).__name__}: it would see this rank's tokens only",
                expected="tokens that meet in attention alone, called through transformers' attention interface",
            )
        ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, no_mask)  # type: ignore[arg-type]
        found: dict[int, Any] = {id(m.config): m.config for m in self.root.modules() if hasattr(m, "config")}
        self._before = [(config, config._attn_implementation_internal) for config in found.values()]
        for config in found.values():
            config._attn_implementation_internal = NAME
        self._signature = inspect.signature(type(self.root).forward)
        self._hooks = [
            self.root.register_forward_pre_hook(self._shard, with_kwargs=True),
            self.root.register_forward_hook(self._reduce),
        ]

    def disable(self) -> None:
        """The model as it was: for generation, or evaluation on one rank."""
        for hook in self._hooks:
            hook.remove()
        for config, name in self._before:
            config._attn_implementation_internal = name

    def unshard(self, x: Tensor, dim: int = 1) -> Tensor:
        """Whole logits or hidden states of the latest batch from all ranks' parts; collective."""
        return self.context.unshard(x, dim)

    def _shard(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = dict(self._signature.bind(module, *args, **kwargs).arguments)
        given.pop("self", None)
        given.update(given.pop("kwargs", {}))
        if any(given.get(name) is not None for name in ("past_key_values", "cache")):
            raise UserError("a key/value cache under context parallel", remedy="call disable() before generating")
        source = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if source is None:
            raise UserError("neither input_ids nor inputs_embeds", expected="the whole batch on every rank")
        length, positions = source.shape[1], given.get("position_ids")
        _right_padded(given.pop("attention_mask", None))
        self.context = self.context.with_length(length, _documents(positions, source.shape[0]))
        for name in ("input_ids", "inputs_embeds", "position_ids"):
            if given.get(name) is not None:
                given[name] = self.context.shard(given[name])
        if positions is None:
            given["position_ids"] = self.context.positions(source.device)
        if given.get("labels") is not None:
            shifted = given.pop("shift_labels", None)
            if shifted is None:
                shifted = nn.functional.pad(given["labels"], (0, 1), value=IGNORE)[:, 1:]
            if given.get("num_items_in_batch") is None:
                given["num_items_in_batch"] = (shifted != IGNORE).sum()
            given["shift_labels"] = self.context.shard(shifted).contiguous()
            given["labels"] = given["shift_labels"]
        return (), {**given, "use_cache": False, "undertow_context": self.context}

    def _reduce(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            raise UserError("return_dict=False under context parallel", remedy="leave it at True")
        if output.get("loss") is not None:
            output["loss"] = self.context.loss(output["loss"])
        return output


def _mixes_otherwise(root: PreTrainedModel) -> str:
    """What besides the attention interface carries something from token to token, or ''. Its result would be wrong
    without an error, because it runs on a shard as on a sequence."""
    for name, module in root.named_modules():
        if isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1:
            return f"the convolution {name}"
        kinds = getattr(getattr(module, "config", None), "layer_types", None) or ()
        if others := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
            return f"layers of type {', '.join(others)}"
    if getattr(root, "_is_stateful", False):
        return "a recurrent state"
    return "" if getattr(root, "_supports_attention_backend", True) else "attention of its own"


def _right_padded(mask: Tensor | None) -> None:
    """Padding on the right needs no mask: no token before it looks at it, and its own loss is ignored."""
    if mask is None:
        return
    if mask.dim() != 2 or bool((mask.diff(dim=1) > 0).any()):
        raise UserError(
            f"an attention mask {list(mask.shape)} that hides more than padding on the right",
            remedy="pad on the right, or pack documents and pass position_ids that begin anew",
        )


def _documents(positions: Tensor | None, batch: int) -> list[int] | None:
    """Bounds of packed documents, from whole position ids that begin anew."""
    if positions is None or not bool((positions.diff(dim=-1) != 1).any()):
        return None
    if positions.dim() != 2 or batch != 1:
        raise UserError(f"packed documents in a batch of {batch}", expected="position_ids [1, length], a batch of 1")
    starts = torch.nonzero(positions[0] == 0).flatten().tolist()
    if not starts or starts[0] != 0 or not bool((positions[0].diff()[positions[0][1:] != 0] == 1).all()):
        raise UserError("position_ids that neither count on nor begin anew at 0", expected="0, 1, 2, …, 0, 1, …")
    return [*starts, positions.shape[1]]
