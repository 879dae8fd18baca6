"""The adapter for Hugging Face decoders (transformers 5.17, 5.23 and 5.24 are tested): no model file is patched.

Two public registries carry it. The attention interface named `undertow_stream` is where a layer hands over q, k, v of
its chunk; the mask interface of the same name returns a `Witness` (`hf_mask`) instead of a T x T tensor. The name is
written into the config only while a pass or a layer's backward runs, so `generate` and everything else see the model as
it was. Whatever a layer records on the way (router logits) is cut into rows, carried through backward with its
gradient, and handed on.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import _active_collector

from ...dist.errors import UserError
from ..memory_model import DecoderShape
from . import overrides
from .hf_mask import Witness, witness_mask
from .layout import Layout, read
from .loss import IGNORE, causal_loss
from .plain import draws_random_numbers
from .protocol import Unsupported
from .rows import Pipeline, Rows
from .scene import Answer

if TYPE_CHECKING:
    from .engine import Engine

NAME = "undertow_stream"
_answering = threading.local()


def chunk_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Registered as the attention interface: [B, H, C, D] queries of one chunk to [B, C, H, E]."""
    answer: Answer | None = getattr(_answering, "now", None)
    if answer is None:
        raise RuntimeError(f"{NAME} attention is only for layers that undertow runs")
    if dropout and module.training:
        raise Unsupported("attention dropout: flash kernels of a chunk cannot replay the dropout of the whole")
    if softcap is not None:
        raise Unsupported("attention logits with a soft cap")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise Unsupported("attention that is not causal")
    if isinstance(attention_mask, Tensor):
        raise Unsupported(f"an attention mask of shape {tuple(attention_mask.shape)}")
    window = sliding_window
    if isinstance(attention_mask, Witness):
        window = attention_mask.window(answer.scene.layout, sliding_window)
    out = answer(query, key, value, scale=scaling, window=window, sinks=s_aux)
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    ALL_ATTENTION_FUNCTIONS.register(NAME, chunk_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, witness_mask)  # type: ignore[arg-type]


class HfAdapter:
    """One Hugging Face model (also inside PEFT, DDP or FSDP wrappers). `UserError` when it has no decoder layers."""

    def __init__(self, model: nn.Module) -> None:
        roots = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
        if not roots:
            raise UserError(
                f"{type(model).__name__} is neither a transformers model nor a StreamableModel",
                remedy="follow undertow.parallel.stream.protocol",
            )
        self.head_model = next((m for m in roots if m.get_output_embeddings() is not None), roots[0])
        self.decoder, self.layers = _decoder(self.head_model)
        configs = {id(m.config): m.config for m in self.decoder.modules() if hasattr(m, "config")}
        self._configs: list[Any] = list(configs.values())
        self._signature = inspect.signature(type(self.decoder).forward)
        self._engine: Engine | None = None
        self._given: tuple[Tensor | None, Tensor | None] = (None, None)
        self._recorded: tuple[str, ...] = ()
        self._head_open = False
        self._overridden: list[nn.Module] = []
        register()

    # A pass

    def begin(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        arguments = self._signature.bind(self.decoder, *args, **kwargs).arguments
        extra = arguments.pop("kwargs", {})
        arguments.update(extra)
        cached = arguments.get("past_key_values") is not None or arguments.get("use_cache")
        if cached and (arguments.get("past_key_values") is not None or not torch.is_grad_enabled()):
            return None
        mask = arguments.get("attention_mask")
        self._given = mask, arguments.get("position_ids")
        return args, {**kwargs, "use_cache": False}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        before = [config._attn_implementation_internal for config in self._configs]
        for config in self._configs:
            config._attn_implementation_internal = NAME
        flags = [vars(layer).get("gradient_checkpointing") for layer in self.layers]
        for layer in self.layers:
            vars(layer)["gradient_checkpointing"] = False
        try:
            yield
        finally:
            for config, name in zip(self._configs, before):
                config._attn_implementation_internal = name
            for layer, flag in zip(self.layers, flags):
                if flag is None:
                    del vars(layer)["gradient_checkpointing"]
                else:
                    vars(layer)["gradient_checkpointing"] = flag

    def layout(self, layer: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> Layout:
        mask, positions = self._given
        if mask is not None and not isinstance(mask, Tensor):
            raise Unsupported(f"an attention mask of type {type(mask).__name__}")
        found = read(x.shape[0], x.shape[1], mask, positions)
        witness = next((value for value in kwargs.values() if isinstance(value, Witness)), None)
        if mask is not None or found.is_dense or witness is None:
            return found
        # Some models (gpt-oss) do not tell their mask of the positions: what the mask says is what they mean.
        dense = Layout.dense(x.shape[0], x.shape[1])
        return dense if any(witness.fits(dense, window) for window in (None, witness.widest)) else found

    def runner(self) -> Any:
        collector = _active_collector.get() or {}
        if "attentions" in collector:
            raise Unsupported("output_attentions asks for T x T tensors")
        self._recorded = tuple(key for key in collector if key not in ("hidden_states", "_hidden_states_layers"))
        recorded = self._recorded

        def run(layer: nn.Module, answer: Answer, args: tuple, kwargs: dict) -> tuple[Tensor, tuple[Tensor, ...]]:
            return self._run(layer, answer, args, kwargs, recorded)

        return run

    def _run(
        self, layer: nn.Module, answer: Answer, args: tuple, kwargs: dict, recorded: tuple[str, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        outer, _answering.now = getattr(_answering, "now", None), answer
        seen: dict[str, list[Tensor]] = {key: [] for key in recorded}
        token = _active_collector.set(seen)
        try:
            output = overrides.original(layer)(*args, **kwargs)
        finally:
            _active_collector.reset(token)
            _answering.now = outer
        if isinstance(output, tuple):
            if any(isinstance(other, Tensor) for other in output[1:]):
                raise Unsupported(f"{type(layer).__name__} returns more than hidden states")
            answer.returns_tuple = True
            output = output[0]
        self._order = [key for key in recorded for _ in seen[key]]
        return output, tuple(value for key in recorded for value in seen[key])

    def deliver(self, extras: list[Tensor]) -> None:
        collector = _active_collector.get()
        for key, value in zip(self._order, extras):
            if collector is not None:
                collector[key].append(value)

    def wants_random_replay(self, layer: nn.Module) -> bool:
        if draws_random_numbers(layer):
            return True
        numbers = [value for m in layer.modules() for key, value in vars(m).items() if "drop" in key]
        return layer.training and any(isinstance(p, float) and p > 0 for p in numbers)

    def shape(self, x: Tensor) -> DecoderShape:
        config = self.decoder.config.to_dict()  # type: ignore[union-attr,operator]
        shape = DecoderShape.from_config(config, x.element_size())
        weights = max(sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in self.layers)
        return replace(shape, layers=len(self.layers), layer_parameters=weights)

    # Head and loss

    def open_head(self, engine: Engine) -> None:
        self._engine = engine
        head = self.head_model.get_output_embeddings()
        if head is None or self.head_model is self.decoder:
            return
        overrides.override(self.head_model, self._head_model_forward)
        overrides.override(head, self._head_forward)
        skipped = (nn.ModuleList, nn.Embedding)
        rest = [m for m in self.decoder.children() if not isinstance(m, skipped) and any(True for _ in m.parameters())]
        for module in rest:
            overrides.override(module, self._norm_forward)
        self._overridden = [self.head_model, head, *rest]

    def close_head(self) -> None:
        for module in self._overridden:
            overrides.restore(module)
        self._overridden, self._engine = [], None

    def _head_model_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> Any:
        forward = overrides.original(model)
        if self._head_open or (not torch.is_grad_enabled() and kwargs.get("labels") is None):
            return forward(*args, **kwargs)
        standard = getattr(model, "loss_type", None) in (None, "ForCausalLM") and "_loss_function" not in vars(model)
        self._head_open = True
        if standard:
            model._loss_function = self._loss  # type: ignore[assignment]
        try:
            return forward(*args, **kwargs)
        finally:
            self._head_open = False
            if standard:
                del model._loss_function

    def _norm_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        forward, tape = overrides.original(module), self._engine and self._engine.tape
        last = self._head_open and tape and not tape.plain and args and _same(args[0], tape.output)
        if last and len(args) == 1 and not kwargs and not isinstance(module, FSDPModule):
            return Rows(args[0], Pipeline().then(forward, module))
        return forward(*args, **kwargs)

    def _head_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        forward = overrides.original(module)
        if self._head_open and args and isinstance(args[0], Rows):
            if isinstance(module, FSDPModule):  # its weight is gathered for this call only
                return forward(args[0].tensor())
            return args[0].then(forward, module)
        return forward(*args, **kwargs)

    def _loss(
        self,
        logits: Any,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The meaning of transformers' ForCausalLMLoss, over rows."""
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        shift_labels = shift_labels.to(logits.device)
        if ignore_index != IGNORE:
            shift_labels = shift_labels.masked_fill(shift_labels == ignore_index, IGNORE)
        plan = self._engine.last_plan if self._engine is not None else None
        rows = (plan.loss_rows or None) if plan is not None else None
        return causal_loss(logits, shift_labels, num_items_in_batch, rows=rows)


def _same(x: Any, output: Tensor | None) -> bool:
    """Whether x is `output`, or an alias of it as hooks of wrappers (DeepSpeed) make one."""
    if x is output:
        return True
    alike = isinstance(x, Tensor) and output is not None and x.shape == output.shape and x.dtype == output.dtype
    return alike and x.data_ptr() == output.data_ptr()  # type: ignore[union-attr]


def _decoder(model: PreTrainedModel) -> tuple[nn.Module, list[nn.Module]]:
    """The module that loops over the decoder layers, and the layers."""
    inside = model.get_decoder() if hasattr(model, "get_decoder") else None
    found = []
    for owner in (inside if isinstance(inside, nn.Module) else model).modules():
        lists = [child for child in owner.children() if isinstance(child, nn.ModuleList) and len(child)]
        found += [(owner, list(m)) for m in lists if all(isinstance(x, GradientCheckpointingLayer) for x in m)]
    if not found:
        raise UserError(
            f"{type(model).__name__} has no list of GradientCheckpointingLayer",
            remedy="use model.gradient_checkpointing_enable(), or follow undertow.parallel.stream.protocol",
        )
    return max(found, key=lambda pair: len(pair[1]))
