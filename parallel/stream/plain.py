"""The adapter for models that follow `protocol`: our own language model, or anybody's.

The layer is called with the engine's `attend` in place of its own default; the model's `loss` is replaced by the
chunked one. A model may show `stream_head`, a pair (final norm or None, head), so that the head's weight gradient is
summed in float32 by one fused product; without it, `token_logits` is differentiated as it is.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..memory_model import DecoderShape
from . import overrides
from .layout import Layout, read
from .loss import causal_loss, rows_of
from .protocol import Unsupported, causal_attention
from .rows import Pipeline, Rows
from .scene import Answer

if TYPE_CHECKING:
    from .engine import Engine


class PlainAdapter:
    def __init__(self, model: nn.Module) -> None:
        self.decoder = model
        self.layers: list[nn.Module] = list(model.stream_layers)  # type: ignore[arg-type]
        self._signatures = {id(layer): inspect.signature(type(layer).forward) for layer in self.layers}
        self._engine: Engine | None = None

    def begin(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        return args, kwargs

    def active(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def _bound(self, layer: nn.Module, args: tuple, kwargs: dict) -> inspect.BoundArguments:
        return self._signatures[id(layer)].bind(layer, *args, **kwargs)

    def layout(self, layer: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> Layout:
        positions = self._bound(layer, (x, *args), kwargs).arguments.get("positions")
        return read(x.shape[0], x.shape[1], None, positions if isinstance(positions, Tensor) else None)

    def runner(self) -> Any:
        return self._run

    def _run(self, layer: nn.Module, answer: Answer, args: tuple, kwargs: dict) -> tuple[Tensor, tuple[Tensor, ...]]:
        bound = self._bound(layer, args, kwargs)
        if bound.arguments.get("attend", causal_attention) is not causal_attention:
            raise Unsupported("the model is called with an attention of its own")
        bound.arguments["attend"] = answer
        return overrides.original(layer)(*bound.args[1:], **bound.kwargs), ()

    def deliver(self, extras: list[Tensor]) -> None:
        return

    def wants_random_replay(self, layer: nn.Module) -> bool:
        return draws_random_numbers(layer)

    def shape(self, x: Tensor) -> DecoderShape:
        """From a config with the fields of our language model; else a layer with as many heads as fit 64 channels."""
        config, width = getattr(self.decoder, "config", None), x.shape[-1]
        heads = getattr(config, "heads", None) or max(1, width // 64)
        return DecoderShape(
            len(self.layers),
            width,
            heads,
            getattr(config, "kv_heads", None) or heads,
            width // heads,
            getattr(config, "hidden", None) or 4 * width,
            getattr(config, "vocab", None) or 32768,
            max(sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in self.layers),
            x.element_size(),
            bool(getattr(config, "tied", False)),
        )

    def open_head(self, engine: Engine) -> None:
        self._engine = engine
        overrides.override(self.decoder, self._loss, "loss")

    def close_head(self) -> None:
        overrides.restore(self.decoder, "loss")
        self._engine = None

    def _loss(self, model: nn.Module, args: tuple, kwargs: dict) -> Tensor:
        bound = inspect.signature(type(model).loss).bind(model, *args, **kwargs)  # type: ignore[attr-defined]
        bound.apply_defaults()
        x, labels = bound.arguments["x_BTC"], bound.arguments["labels_BT"]
        plan = self._engine.last_plan if self._engine is not None else None
        rows = plan.loss_rows or None if plan is not None else None
        return causal_loss(self._head_rows(model, x), labels, bound.arguments["num_items"], rows=rows)

    def _head_rows(self, model: nn.Module, x: Tensor) -> Rows:
        pair = getattr(model, "stream_head", None)
        if pair is not None:
            norm, head = pair
            return rows_of(x, head, norm)
        inside = {id(p) for layer in self.layers for p in layer.parameters()}
        outside = [module for module in model.children() if any(id(p) not in inside for p in module.parameters())]
        return Rows(x, Pipeline(head=model.token_logits, modules=tuple(outside)))  # type: ignore[arg-type]


def draws_random_numbers(layer: nn.Module) -> bool:
    """Whether some dropout in the layer is on."""
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    return any(isinstance(m, kinds) and m.training and m.p > 0 for m in layer.modules())
