"""Carries a `StreamPlan` out on a live model: replaces the forward of its layers and head, and puts them back.

One pass of the decoder is a `Tape`: the plan and the slots of that pass, in layer order. The first layer call of a pass
reads shapes and mask and makes the plan; each layer call then runs `layer.StreamedLayer`. Anything that cannot be
streamed raises `Unsupported` somewhere below; the pass is then run again with plain checkpointing, and the reason is
shown once. Outside of a pass (`generate`, a call with a cache) the model is untouched.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ...dist.errors import UserError
from ...dist.units import format_bytes
from ..memory_model import DecoderShape
from ..token_ring.gate import lean
from . import overrides
from .deepspeed_zero import are_here, is_partitioned
from .layer import KeptLayer, LayerCall, NoAttention, StreamedLayer
from .layout import Layout
from .offload import Courier, HostSlot
from .own_attention import OwnCall, SplitCall
from .plan import StreamPlan
from .protocol import Attend, Unsupported
from .scene import Answer, Scene
from .store import Derived, Slot


class Adapter(Protocol):
    """What the engine asks of a kind of model (`plain`, `hf`)."""

    decoder: nn.Module
    layers: list[nn.Module]

    def begin(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Arguments for one pass of the decoder, or None when this call is not to be streamed (it uses a cache)."""
        ...

    def active(self) -> contextlib.AbstractContextManager:
        """What must hold while a pass runs, and again while its backward runs a layer."""
        ...

    def layout(self, layer: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> Layout: ...

    def runner(self) -> Callable[[nn.Module, Answer, tuple, dict], tuple[Tensor, tuple[Tensor, ...]]]: ...

    def deliver(self, extras: list[Tensor]) -> None:
        """Further outputs of a layer, for whoever recorded them."""
        ...

    def wants_random_replay(self, layer: nn.Module) -> bool: ...

    def shape(self, x: Tensor) -> DecoderShape:
        """Sizes of the model, from its config and the hidden states that enter the first layer."""
        ...

    def open_head(self, engine: Engine) -> None:
        """Replace head and loss, and restore them in `close_head`."""
        ...

    def close_head(self) -> None: ...


Planner = Callable[[Tensor], StreamPlan]  # from the hidden states [B, T, d] that enter the first layer


@dataclass
class Tape:
    """One pass of the decoder."""

    plain: bool = False
    scene: Scene | None = None
    plan: StreamPlan | None = None
    slots: list[Slot] = field(default_factory=list)
    calls: list[LayerCall] = field(default_factory=list)
    output: Tensor | None = None  # of the latest layer
    version: int = 0  # of `output` when the layer returned it
    batch: int = 0


class Engine:
    """Streams one model. `report()` says for each layer whether it was streamed, and why not."""

    def __init__(
        self,
        adapter: Adapter,
        planner: Planner,
        *,
        attention_backend: str | None = None,
        attend: Attend | None = None,
    ) -> None:
        self.adapter, self.planner = adapter, planner
        self.attention_backend, self.attend = attention_backend, attend
        self.courier: Courier | None = None
        self.tape: Tape | None = None
        self.last_plan: StreamPlan | None = None
        self.reasons: dict[str, str] = {}
        self.unread: dict[int, frozenset[str]] = {}
        self._names = {id(layer): f"layer {i}" for i, layer in enumerate(adapter.layers)}
        self._streamed: set[str] = set()
        self._enabled = False
        self.limit_bytes: int | None = None  # on any budget: half of what a plan promised when memory ran out after all
        self.plain = False  # run everything as without streaming, layer inputs checkpointed (`gate` compares)

    # Switching on and off

    def enable(self) -> None:
        if self._enabled:
            return
        overrides.override(self.adapter.decoder, self._decoder_forward)
        for layer in self.adapter.layers:
            overrides.override(layer, self._layer_forward)
        self.adapter.open_head(self)
        self._enabled = True

    def disable(self) -> None:
        if not self._enabled:
            return
        self.adapter.close_head()
        for module in (*self.adapter.layers, self.adapter.decoder):
            overrides.restore(module)
        self.tape = None
        self._enabled = False

    def report(self) -> dict[str, str]:
        """'streamed' or the reason why not, per layer; layers that have not run yet are missing."""
        everything = "streaming was measured to be slower" if self.plain else self.reasons.get("model")
        return {
            name: everything or self.reasons.get(name, "streamed")
            for name in self._names.values()
            if everything or name in self._streamed or name in self.reasons
        }

    # One pass

    def _decoder_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        forward = overrides.original(module)
        if self.tape is not None:
            return forward(*args, **kwargs)
        prepared = self.adapter.begin(args, kwargs)
        if prepared is None:
            return forward(*args, **kwargs)
        failed: StreamPlan | None = None
        while "model" not in self.reasons and not self.plain:
            tape = Tape()
            try:
                with self._pass(tape), self.adapter.active():
                    return forward(*prepared[0], **prepared[1])
            except Unsupported as reason:
                if self.attend is not None:  # the plain way would call the attention that it stands in for
                    raise UserError(f"with `attend` this model cannot be streamed: {reason}") from reason
                self._note("model", str(reason))
            except torch.OutOfMemoryError:
                if not self._may_try_again(tape) or tape.plan == failed:
                    raise
                failed = tape.plan
            del tape
            gc.collect()  # the exception's frames held what the pass had kept
        with self._pass(Tape(plain=True)):
            return forward(*prepared[0], **prepared[1])

    def _may_try_again(self, tape: Tape) -> bool:
        """After memory ran out in a forward pass: whether a tighter plan is worth a try on this rank alone."""
        if tape.plan is None:
            return False
        self.degrade(tape.plan)
        layers = self.adapter.layers
        return self.attend is None and not any(
            isinstance(layer, FSDPModule) or is_partitioned(layer.parameters()) for layer in layers
        )

    def degrade(self, plan: StreamPlan) -> None:
        """Memory ran out in spite of `plan`: the next one may promise half of its bytes."""
        self.limit_bytes = plan.device_bytes // 2
        warnings.warn(
            f"undertow: out of memory with a plan of {format_bytes(plan.device_bytes)}; "
            f"plans now stay below {format_bytes(self.limit_bytes)}",
            stacklevel=3,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _pass(self, tape: Tape) -> Iterator[None]:
        self.tape = tape
        try:
            yield
        finally:
            self.tape = None

    def _note(self, name: str, reason: str) -> None:
        if name not in self.reasons:
            self.reasons[name] = reason
            warnings.warn(f"undertow: {name} is not streamed but checkpointed plainly: {reason}", stacklevel=3)

    # One layer

    def _layer_forward(self, layer: nn.Module, args: tuple, kwargs: dict) -> Any:
        tape, forward = self.tape, overrides.original(layer)
        if tape is None:
            return forward(*args, **kwargs)
        name = self._names[id(layer)]
        if tape.plain or name in self.reasons:
            return self._plain(forward, args, kwargs)
        if not args:
            raise Unsupported(f"{name} gets its input by keyword")
        try:
            return self._stream(tape, layer, args[0], args[1:], kwargs)
        except NoAttention as reason:
            self._note(name, str(reason))
            return self._plain(forward, args, kwargs)

    def _plain(self, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    def _stream(self, tape: Tape, layer: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> Any:
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves((args, kwargs))):
            raise Unsupported("a layer argument other than the hidden states wants gradients")
        if tape.scene is None:
            self._open(tape, layer, x, args, kwargs)
        scene, plan = tape.scene, tape.plan
        assert scene is not None and plan is not None
        if x.dim() != 3 or x.shape[:2] != (scene.layout.batch, scene.layout.tokens):
            raise Unsupported(
                f"hidden states of shape {tuple(x.shape)} in a pass of {scene.layout.batch} x {scene.layout.tokens}"
            )
        kind = LayerCall if scene.attend is None else SplitCall if len(scene.bounds) > 1 else OwnCall
        call = kind(scene, layer, args, kwargs)
        params = call.parameters()
        if not are_here(layer.parameters()):
            raise Unsupported(
                "ZeRO stage 3 has not gathered the layer as a whole; call "
                "undertow.parallel.stream.deepspeed_zero.prepare(model) before deepspeed.initialize"
            )
        if torch.is_grad_enabled() and (x.requires_grad or params):
            if plan.inputs[len(tape.slots) : len(tape.slots) + 1] == ("graph",):
                y, *extras = KeptLayer.apply(call, x, *params)  # type: ignore[misc]
            else:
                slot = self._slot(tape, plan, call, x)
                y, *extras = StreamedLayer.apply(call, slot, x, *params)  # type: ignore[misc]
                tape.slots.append(slot)
                tape.calls.append(call)
        else:
            bounds = scene.bounds
            with torch.no_grad():
                y, extras = call.forward(lambda i: x[:, bounds[i][0] : bounds[i][1]], None)
        self._streamed.add(self._names[id(layer)])
        self.adapter.deliver(extras)
        tape.output, tape.version = y, 0 if y.is_inference() else y._version
        return (y,) if call.returns_tuple else y

    def _open(self, tape: Tape, layer: nn.Module, x: Tensor, args: tuple, kwargs: dict) -> None:
        if x.dim() != 3:
            raise Unsupported(f"hidden states of shape {tuple(x.shape)}: [batch, tokens, channels] is needed")
        layout = self.adapter.layout(layer, x, args, kwargs)
        plan = self.planner(x)
        kind = x.device.type
        run = self.adapter.runner()

        def within(layer: nn.Module, answer: Answer, args: tuple, kwargs: dict) -> tuple[Tensor, tuple[Tensor, ...]]:
            with self.adapter.active():
                return run(layer, answer, args, kwargs)

        tape.plan = self.last_plan = plan
        tape.scene = Scene(
            layout,
            plan.bounds,
            within,
            self.attention_backend,
            any(self.adapter.wants_random_replay(layer) for layer in self.adapter.layers),
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
            lambda: self.degrade(plan),
            self.unread,
            None if self.attend is None else partial(_as_planned, self.attend),
        )
        if self.courier is None and "host" in (*plan.inputs, *plan.attention):
            self.courier = Courier(x.device)

    def _slot(self, tape: Tape, plan: StreamPlan, call: LayerCall, x: Tensor) -> Slot:
        index, below = len(tape.slots), tape.slots[-1] if tape.slots else None
        known = index < len(plan.inputs)
        place, attention = (plan.inputs[index], plan.attention[index]) if known else ("device", "none")
        if place == "derived" and not _is(x, tape):  # something came between the layers
            place = "device"
        if place == "derived" and below is not None:
            parent = tape.calls[-1]
            return Derived(plan.bounds, below, lambda slot: parent.forward(slot.rows, None)[0], attention != "none")
        if "host" in (place, attention):
            assert self.courier is not None
            on_host = place == "host"
            return HostSlot(self.courier, plan.bounds, input_on_host=on_host, attention=attention, below=below)
        return Slot(plan.bounds, attention != "none", below)


def _is(x: Tensor, tape: Tape) -> bool:
    """Whether x is the output of the latest layer, perhaps by another name, and as that layer left it."""
    same = tape.output is not None and x.shape == tape.output.shape and x.data_ptr() == tape.output.data_ptr()
    return same and x._version == tape.version


def _as_planned(attend: Attend, *args: Any, **kwargs: Any) -> Tensor:
    """`attend` by schedules that allocate no more than the plan has counted."""
    with lean():
        return attend(*args, **kwargs)
