"""A layer whose attention is not ours but one call over all its rows: ring attention over ranks, for one.

Such a call cannot be cut into chunks, but all else in the layer can. `SplitCall` runs the layer up to the attention for
each chunk and collects q, k and v; runs the attention once; and runs the layer again for each chunk with its rows of
the result in hand. Backward goes through these halves the other way round: the second half of every chunk gives the
gradient of the attention's result, one backward of the attention gives those of q, k and v, and the first half of every
chunk carries them on. Projections before attention are thus computed three times more than in one chunk (2 % of the
FLOPs of a Llama-3-8B at 128K tokens). The attention, whose messages every rank must send as often as the others, is
not: one forward and one backward, and another forward in backward where its stash was not kept.

Legend: B batch, T tokens, C rows of a chunk, H heads, D and E head dims, d channels.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .attention import KeyValues
from .layer import LayerCall, _by_row, _kept_random, _random_state
from .protocol import Unsupported
from .recorded import Known, Recorded
from .scene import Answer, KeysReady
from .store import Slot
from .sums import WeightSums


@dataclass
class OwnCall(LayerCall):
    """In one chunk: the layer as it is, with the attention in its place."""

    _recorded: Recorded | None = None
    _kept: Sequence[Tensor] | None = None  # of the attention, here again

    def _answer(self, purpose: str, chunk: int, keys: KeyValues | None, slot: Slot | None) -> Answer:
        return Answer(self.scene, purpose, chunk, None, instead=functools.partial(self._instead, purpose, slot))

    def _instead(self, purpose: str, slot: Slot | None, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        if purpose == "forward" and slot is not None and slot.keeps_attention:
            return self._record(slot, q, k, v, how)
        if purpose == "gradient" and self._recorded is not None and slot is not None:
            return Known.apply(q, k, v, self._recorded, self._fetched(slot))  # pyright: ignore[reportReturnType]
        assert self.scene.attend is not None
        return self.scene.attend(q, k, v, **how)

    def _record(self, slot: Slot, q: Tensor, k: Tensor, v: Tensor, how: dict[str, Any]) -> Tensor:
        """The attention's result; what its backward needs goes to the slot."""
        assert self.scene.attend is not None
        self._recorded = Recorded(self.scene.attend, q, k, v, how)
        kept = self._recorded.take()
        slot.keep_attention(0, *kept)
        return self._recorded.out(kept)

    def _fetched(self, slot: Slot) -> Sequence[Tensor]:
        if self._kept is None:
            self._kept = slot.attention(0)
        assert self._kept is not None
        return self._kept


@dataclass
class _Whole:
    """q, k, v of all rows, filled chunk by chunk; positions likewise; what else the layer told its attention."""

    tokens: int
    tensors: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    how: dict[str, Any] = field(default_factory=dict)

    def write(self, start: int, tensors: Sequence[Tensor], positions: Tensor | None, how: dict[str, Any]) -> None:
        if not self.tensors:
            self.tensors, self.how = [_room(t, self.tokens) for t in tensors], how
        for whole, part in zip(self.tensors, tensors):
            whole[:, :, start : start + part.shape[2]] = part
        if positions is not None:
            self.positions.append(positions)

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.tensors
        return q, k, v

    @property
    def told(self) -> dict[str, Any]:
        positions = torch.cat(self.positions, -1) if self.positions else None
        return {"positions": positions, **self.how}


def _room(part_BHCD: Tensor, tokens: int) -> Tensor:
    """[B, H, T, D], in memory [B, T, H, D]: the order in which projections write and rings send."""
    batch, heads, _, dim = part_BHCD.shape
    return part_BHCD.new_empty(batch, tokens, heads, dim).transpose(1, 2)


@dataclass
class SplitCall(OwnCall):
    """In several chunks, the attention whole."""

    def _up_to_attention(self, chunk: int, x: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """q, k, v of a chunk [B, H, C, D], with their graph where gradients are on, and what else attention is told."""
        found: list[tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]] = []

        def instead(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
            rows = self.scene.bounds[chunk][1] - self.scene.bounds[chunk][0]
            if any(t.shape[2] != rows for t in (q, k, v)):
                raise Unsupported(
                    f"attention got {q.shape[2]} queries and {k.shape[2]} keys for {rows} rows: layers whose rows are "
                    "those of several ranks run in one chunk only; pass a chunk as long as the sequence"
                )
            found.append(((q, k, v), how))
            raise KeysReady

        self._restore_random(chunk, x.device)
        with contextlib.suppress(KeysReady):
            self._on(chunk, x, Answer(self.scene, "keys", chunk, None, instead=instead))
        return found[0]

    def _gather(self, rows: Callable[[int], Tensor]) -> _Whole:
        whole = _Whole(self.scene.layout.tokens)
        with torch.no_grad():
            for chunk, (start, _) in enumerate(self.scene.bounds):
                tensors, how = self._up_to_attention(chunk, rows(chunk))
                whole.write(start, tensors, how.pop("positions"), how)
        return whole

    def _given(self, purpose: str, chunk: int, out_BHCE: Tensor) -> Answer:
        return Answer(self.scene, purpose, chunk, None, instead=lambda *_, **__: out_BHCE)

    def forward(self, rows: Callable[[int], Tensor], slot: Slot | None) -> tuple[Tensor, list[Tensor]]:
        bounds, y, extras = self.scene.bounds, None, []
        device = rows(0).device
        if self.scene.replay_random and not self._random:
            self._random = _apart(len(bounds), device)
        with _kept_random(device, self.scene.replay_random):
            whole = self._gather(rows)
            q, k, v = whole.qkv
            if slot is not None and slot.keeps_attention:
                out = self._record(slot, q, k, v, whole.told)
            else:
                assert self.scene.attend is not None
                out = self.scene.attend(q, k, v, **whole.told)
            del whole, q, k, v
            for chunk, (start, stop) in enumerate(bounds):
                x = rows(chunk)
                self._restore_random(chunk, device)
                part, part_extras = self._on(chunk, x, self._given("forward", chunk, out[:, :, start:stop]))
                extras.append([_by_row(e, x) for e in part_extras])
                self._extra_shapes = [tuple(e.shape) for e in part_extras]
                y = part.new_empty(part.shape[0], bounds[-1][1], *part.shape[2:]) if y is None else y
                y[:, start:stop] = part
                del part
        assert y is not None
        return y, [self._whole(parts, shape) for parts, shape in zip(zip(*extras), self._extra_shapes)]

    def backward(
        self, slot: Slot, dy: Tensor, dextras: tuple[Tensor | None, ...], dx: Tensor | None
    ) -> list[Tensor | None]:
        chunks, params = range(len(self.scene.bounds)), self.parameters()
        total = WeightSums(params)
        with _kept_random(dy.device, self.scene.replay_random):
            slot.begin()
            whole = None
            if self._recorded is None:
                assert self.scene.attend is not None
                whole = self._gather(slot.rows)
                recorded = Recorded(self.scene.attend, *whole.qkv, whole.told)
                kept: Sequence[Tensor] = recorded.take()
            else:
                recorded, kept = self._recorded, self._fetched(slot)
            out = recorded.out(kept)
            dout = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device)
            for chunk in reversed(chunks):
                self._after_attention(chunk, slot, out, dout, dy, dextras, dx, params, total)
            if whole is None:
                whole = self._gather(slot.rows)
            gradients = recorded.gradients(*whole.qkv, kept, dout)
            self._recorded = self._kept = None
            del whole, recorded, kept, out, dout
            for chunk in reversed(chunks):
                self._before_attention(chunk, slot, gradients, dx, params, total)
                slot.release(chunk)
        return total.rounded()

    def _after_attention(
        self,
        chunk: int,
        slot: Slot,
        out: Tensor,
        dout: Tensor,
        dy: Tensor,
        dextras: tuple[Tensor | None, ...],
        dx: Tensor | None,
        params: list[nn.Parameter],
        total: WeightSums,
    ) -> None:
        """Writes the chunk's rows of `dout`, and those of `dx` as far as they do not come through attention."""
        start, stop = self.scene.bounds[chunk]
        x = slot.rows(chunk).detach().requires_grad_(dx is not None)
        mine = out[:, :, start:stop].detach().requires_grad_()
        y, extras = self._again(chunk, x, lambda: self._given("gradient", chunk, mine), total)
        outputs, wanted_rows = self._with_gradients(chunk, y, extras, dy, dextras)
        wanted = [mine, *([x] if dx is not None else []), *params]
        grads = torch.autograd.grad(outputs, wanted, wanted_rows, allow_unused=True)
        del y, extras, outputs, wanted_rows
        dout[:, :, start:stop] = 0 if grads[0] is None else grads[0]
        if dx is not None:
            dx[:, start:stop] = 0 if grads[1] is None else grads[1]
        total.add(grads[-len(params) :] if params else ())

    def _before_attention(
        self,
        chunk: int,
        slot: Slot,
        gradients: Sequence[Tensor],
        dx: Tensor | None,
        params: list[nn.Parameter],
        total: WeightSums,
    ) -> None:
        """Adds to the chunk's rows of `dx` what comes through attention."""
        start, stop = self.scene.bounds[chunk]
        x = slot.rows(chunk).detach().requires_grad_(dx is not None)
        with torch.enable_grad(), total.taking_over(self.scene.autocast[0]):
            tensors, _ = self._up_to_attention(chunk, x)
        pairs = [(t, g[:, :, start:stop]) for t, g in zip(tensors, gradients) if t.requires_grad]
        if not pairs:
            return
        wanted = [*([x] if dx is not None else []), *params]
        grads = torch.autograd.grad([t for t, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        if dx is not None:
            if grads[0] is not None:
                dx[:, start:stop] += grads[0]
            grads = grads[1:]
        total.add(grads)


def _apart(count: int, device: torch.device) -> list[tuple[Tensor, Tensor | None]]:
    """States of the generators for `count` chunks, which start again twice and so cannot follow one another."""
    seeds = torch.randint(0, 2**62, (count,)).tolist()
    states = []
    with _kept_random(device, True):
        for seed in seeds:
            torch.default_generator.manual_seed(seed)
            if device.type != "cpu":
                torch.get_device_module(device).manual_seed(seed)
            states.append(_random_state(device))
    return states
