"""One decoder layer, forward and backward, a chunk of rows at a time: the algorithm of streamed backpropagation.

Forward runs without autograd, chunk by chunk, and keeps only the layer's input. Backward computes all keys and values
once, then takes the chunks in descending order: forward with autograd, then one `autograd.grad` per chunk. Descending,
because queries of chunk j reach keys up to its own end: when chunk i is differentiated, dK and dV of its rows lack
only its own share (see `attention`), so dX of the chunk is final and overwrites dY.

Weight gradients add up in float32 scratch of this one layer and are *returned* by the autograd function, once, so
that the hooks of DDP, ZeRO and FSDP fire once per parameter as without streaming. Exact, after Luo et al., StreamBP
(2025); unlike theirs K and V are projected once, no mask tensor exists, and no gradient is written behind autograd.

Legend: B batch, T tokens, d channels.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from .attention import KeyValues
from .ownership import is_ours
from .protocol import Unsupported
from .scene import Answer, KeysReady, Scene
from .store import Slot
from .sums import WeightSums
from .unread import may_leave_out, unread


class NoAttention(Unsupported):
    """The layer never called attention: another kind of layer, which plain checkpointing serves."""


def slice_rows(tree: Any, start: int, stop: int, tokens: int) -> Any:
    """A layer's arguments for rows [start, stop): tensors with T in dimension 1 (or 2, or 0 of a vector) are cut."""

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        for dim in (1, 0, 2) if leaf.dim() == 1 else (1, 2):
            if dim < leaf.dim() and leaf.shape[dim] == tokens:
                return leaf.narrow(dim, start, stop - start)
        return leaf

    return pytree.tree_map(cut, tree)


@dataclass
class LayerCall:
    """One layer with the arguments of one call (without x, which comes first)."""

    scene: Scene
    layer: nn.Module
    args: tuple
    kwargs: dict
    _random: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    returns_tuple: bool = False
    _extra_shapes: list[tuple[int, ...]] = field(default_factory=list)

    def parameters(self) -> list[nn.Parameter]:
        """Those that want gradients, in a fixed order. Asked anew each time: FSDP swaps the objects."""
        return [p for p in self.layer.parameters() if p.requires_grad]

    def _on(self, chunk: int, x: Tensor, answer: Answer) -> tuple[Tensor, tuple[Tensor, ...]]:
        args, kwargs = self.args, self.kwargs
        if len(self.scene.bounds) > 1:
            args, kwargs = slice_rows((args, kwargs), *self.scene.bounds[chunk], self.scene.layout.tokens)
        with self.scene.precision(x.device):
            y, extras = self.scene.run(self.layer, answer, (x, *args), kwargs)
        if answer.calls == 0:
            raise NoAttention(f"{type(self.layer).__name__} does not call the attention interface")
        self.returns_tuple = answer.returns_tuple
        return y, extras

    def forward(self, rows: Callable[[int], Tensor], slot: Slot | None) -> tuple[Tensor, list[Tensor]]:
        """The layer's output [B, T, d] and further outputs, without autograd. `rows(i)` gives chunk i of the input."""
        bounds, y, extras = self.scene.bounds, None, []
        keys = KeyValues(self.scene.layout.tokens) if len(bounds) > 1 else None
        remember = self.scene.replay_random and not self._random
        for chunk, (start, stop) in enumerate(bounds):
            x = rows(chunk)
            if remember:
                self._random.append(_random_state(x.device))
            else:
                self._restore_random(chunk, x.device)
            part, part_extras = self._on(chunk, x, self._answer("forward", chunk, keys, slot))
            extras.append([_by_row(e, x) for e in part_extras])
            self._extra_shapes = [tuple(e.shape) for e in part_extras]
            if len(bounds) == 1:
                y = part
            else:
                if y is None:
                    y = part.new_empty(part.shape[0], self.scene.layout.tokens, *part.shape[2:])
                y[:, start:stop] = part
            del part
        assert y is not None
        return y, [self._whole(parts, shape) for parts, shape in zip(zip(*extras), self._extra_shapes)]

    def whole(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layer's output and further outputs as the layer gives them, with their graph where gradients are on."""
        return self._on(0, x, self._answer("gradient", 0, None, None))

    def _answer(self, purpose: str, chunk: int, keys: KeyValues | None, slot: Slot | None) -> Answer:
        return Answer(self.scene, purpose, chunk, keys, slot)

    @staticmethod
    def _whole(parts: tuple[Tensor, ...], shape: tuple[int, ...]) -> Tensor:
        """Chunks [B, C, …] to [B, T, …], flattened to [B * T, …] when the layer gave it so."""
        whole = torch.cat(parts, 1)
        return whole.flatten(0, 1) if whole.dim() > len(shape) else whole

    def backward(
        self, slot: Slot, dy: Tensor, dextras: tuple[Tensor | None, ...], dx: Tensor | None
    ) -> list[Tensor | None]:
        """Gradients of `parameters()`; fills `dx` [B, T, d] (None: x wants no gradient), which may be `dy` itself."""
        bounds, params = self.scene.bounds, self.parameters()
        keys = KeyValues(self.scene.layout.tokens) if len(bounds) > 1 else None
        total = WeightSums(params, once=len(bounds) == 1)
        with _kept_random(dy.device, self.scene.replay_random):
            slot.begin()
            if keys is not None:
                for chunk in reversed(range(len(bounds) - 1)):
                    self._write_keys(chunk, slot.rows(chunk), keys)
            for chunk in reversed(range(len(bounds))):
                self._backward_chunk(chunk, slot, dy, dextras, dx, keys, params, total)
                slot.release(chunk)
        return total.rounded()

    def _write_keys(self, chunk: int, x: Tensor, keys: KeyValues) -> None:
        with torch.no_grad(), contextlib.suppress(KeysReady):
            self._restore_random(chunk, x.device)
            self._on(chunk, x, self._answer("keys", chunk, keys, None))

    def _backward_chunk(
        self,
        chunk: int,
        slot: Slot,
        dy: Tensor,
        dextras: tuple[Tensor | None, ...],
        dx: Tensor | None,
        keys: KeyValues | None,
        params: list[nn.Parameter],
        total: WeightSums,
    ) -> None:
        start, stop = self.scene.bounds[chunk]
        x = slot.rows(chunk).detach().requires_grad_(dx is not None)
        y, extras = self._again(chunk, x, lambda: self._answer("gradient", chunk, keys, slot), total)
        outputs, gradients = self._with_gradients(chunk, y, extras, dy, dextras)
        wanted = [x, *params] if dx is not None else params
        grads = torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)
        del y, extras, outputs, gradients
        if dx is not None:
            dx[:, start:stop] = 0 if grads[0] is None else grads[0]
            grads = grads[1:]
        total.add(grads)

    def _with_gradients(
        self, chunk: int, y: Tensor, extras: tuple[Tensor, ...], dy: Tensor, dextras: tuple[Tensor | None, ...]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """A chunk's outputs, and the rows of their gradients."""
        start, stop = self.scene.bounds[chunk]
        outputs, gradients = [y], [dy[:, start:stop]]
        for extra, dextra in zip(extras, dextras):
            if dextra is not None and extra.requires_grad:
                flat = extra.shape[:2] != y.shape[:2]
                rows = dextra.unflatten(0, (-1, self.scene.layout.tokens)) if flat else dextra
                outputs.append(extra)
                gradients.append(rows[:, start:stop].reshape(extra.shape))
        return outputs, gradients

    def _again(
        self, chunk: int, x: Tensor, answer: Callable[[], Answer], total: WeightSums
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The chunk with its graph, less the products that no gradient reads; the first time, finds out which."""
        known, names = self.scene.unread.get(id(self.layer)), dict[int, str]()
        if (known is None or known) and (self.scene.autocast[0] or not may_leave_out(self.layer)):
            known = frozenset()  # this time
        if known is None or known:
            names = {id(weight): name for name, weight in self.layer.named_parameters()}
        while True:
            left_out = {each for each, name in names.items() if known and name in known}
            self._restore_random(chunk, x.device)
            with torch.enable_grad(), total.taking_over(self.scene.autocast[0], left_out or names, left_out):
                y, extras = self._on(chunk, x, answer())
            found = unread(y, extras) if names else set()
            if known is None:
                self.scene.unread[id(self.layer)] = frozenset(names[each] for each in found if each in names)
            if left_out <= found:
                return y, extras
            known = self.scene.unread[id(self.layer)] = frozenset()  # another graph than before: all of it, then

    def _restore_random(self, chunk: int, device: torch.device) -> None:
        if self.scene.replay_random:
            cpu, own = self._random[chunk]
            torch.set_rng_state(cpu)
            if own is not None:
                torch.get_device_module(device).set_rng_state(own, device)


def _flat(extra: Tensor, x: Tensor) -> bool:
    return extra.shape[0] == x.shape[0] * x.shape[1] and extra.shape[:2] != x.shape[:2]


def _by_row(extra: Tensor, x: Tensor) -> Tensor:
    """[B * C, …] or [B, C, …] to [B, C, …]."""
    if extra.shape[:2] == x.shape[:2]:
        return extra
    if not _flat(extra, x):
        raise Unsupported(f"a recorded output of shape {tuple(extra.shape)} does not follow the rows of the chunk")
    return extra.unflatten(0, (x.shape[0], x.shape[1]))


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return torch.get_rng_state(), own


@contextlib.contextmanager
def _kept_random(device: torch.device, active: bool) -> Iterator[None]:
    """Leave the generators as they were found."""
    if not active:
        yield
        return
    cpu, own = _random_state(device)
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if own is not None:
            torch.get_device_module(device).set_rng_state(own, device)


class StreamedLayer(torch.autograd.Function):
    """(y, *extras) of a `LayerCall`; the parameters are inputs, so that autograd delivers their gradients."""

    @staticmethod
    def forward(ctx: Any, call: LayerCall, slot: Slot, x: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        slot.keep_input(x)
        bounds = call.scene.bounds
        y, extras = call.forward(lambda i: x[:, bounds[i][0] : bounds[i][1]], slot)
        ctx.call, ctx.slot, ctx.input = call, slot, (x.shape, x.dtype)
        return y, *extras

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *dextras: Tensor | None) -> tuple[Tensor | None, ...]:
        held = sys.getrefcount(dy)
        call, slot = ctx.call, ctx.slot
        if call is None:
            raise RuntimeError("a streamed layer was differentiated twice; retain_graph=True is not supported")
        if dy is None:
            raise RuntimeError("the output of a streamed layer got no gradient while its other outputs did")
        dx = None
        if ctx.needs_input_grad[2]:
            shape, dtype = ctx.input
            fits = dy.shape == shape and dy.dtype == dtype
            dx = dy if fits and is_ours(dy, held) else torch.empty(shape, dtype=dtype, device=dy.device)
        try:
            grads = call.backward(slot, dy, dextras, dx)
        except torch.OutOfMemoryError:
            call.scene.out_of_memory()
            raise
        ctx.call = ctx.slot = None
        return None, None, dx, *grads


class KeptLayer(torch.autograd.Function):
    """(y, *extras) of a `LayerCall` whose whole graph is kept. It is walked here and not by the backward around it, so
    that weights get their gradients at once and in the order of `StreamedLayer`, whatever the plans of other ranks:
    ZeRO 2 fills its buckets by order of arrival."""

    @staticmethod
    def forward(ctx: Any, call: LayerCall, x: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        inner = x.detach().requires_grad_(x.requires_grad)
        with torch.enable_grad():
            y, extras = call.whole(inner)
        ctx.call, ctx.kept = call, (inner, params, [y, *extras])
        return y.detach(), *(extra.detach() for extra in extras)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.kept is None:
            raise RuntimeError("a streamed layer was differentiated twice; retain_graph=True is not supported")
        inner, params, outputs = ctx.kept
        ctx.kept = None
        found = [(out, g) for out, g in zip(outputs, gradients) if g is not None and out.requires_grad]
        wanted = [inner, *params] if inner.requires_grad else list(params)
        del outputs
        if not found:
            return None, None, *(None for _ in params)
        try:
            grads = torch.autograd.grad([out for out, _ in found], wanted, [g for _, g in found], allow_unused=True)
        except torch.OutOfMemoryError:
            ctx.call.scene.out_of_memory()
            raise
        return None, *(grads if inner.requires_grad else (None, *grads))
