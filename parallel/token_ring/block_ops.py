"""The operations that an attention schedule names, on top of the block attention backends.

A block is cut into tiles that kernels know (see `masks`), each tile is one kernel call, and the calls of a block are
merged in the dtype of partial results, so no sum is ever kept in bfloat16. A block of many tiles may be one call of
FlexAttention instead (see `whole_blocks`), if that is faster. Backward kernels want the merged output
only to form delta = rowsum(dout * out); delta is what travels, and an output with the same delta is made up here:
dout * delta / |dout|². Where the log-sum-exp has a gradient of its own that breaks down for rows whose dout is zero,
and one more column carries delta instead.

Legend: N rows, B batch, H query heads, G key heads, D and E head dims; blocks are [N, B, H, D], kernels [B, H, N, D].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ...comms.ops import Ops
from ...dist.errors import UserError
from ..blocks import flex, measured
from ..blocks.select import backend as named
from ..blocks.types import Backend
from ..kernels.row_products import standing_out
from ..kernels.sum_parts import add_parts_to, merge_parts_to
from ..masks import BACKWARDS, FULL, Tile
from ..merge import merge
from ..partition import positions_of, rows_of
from .problem import Problem
from .whole_blocks import FEWEST_TILES, plan_of

Tensors = Sequence[Tensor]
_COLUMNS = 8  # flash kernels take head dims in multiples of 8


def _heads_first(x_NBHD: Tensor) -> Tensor:
    return x_NBHD.permute(1, 2, 0, 3)


def _lse_heads_first(x_NBH: Tensor) -> Tensor:
    return x_NBH.permute(1, 2, 0)


def _pick(x_BHND: Tensor, start: int, stop: int, tile: Tile) -> Tensor:
    part = x_BHND[:, :, start:stop]
    return part.flip(2) if tile.kind == BACKWARDS else part


WITH_FLEX = "auto+flex"
CHOICES = {"auto": measured.choose, WITH_FLEX: measured.choose_or_compile}


def picker(kernel: str) -> Callable[..., Backend]:
    """What chooses the backend of each tile: 'auto' measures on CUDA, a backend's name takes that one."""
    if kernel in CHOICES:
        return CHOICES[kernel]
    wanted = named(kernel)

    def pick(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int | None) -> Backend:
        if not wanted.supports(q, k, v, causal=causal, window=window):
            mask = f"causal={causal}, window={window}"
            raise UserError(
                f"kernel={kernel!r} for a block of {q.dtype} queries {list(q.shape)} and keys {list(k.shape)} on "
                f"{q.device}, {mask}",
                expected="a call that this backend takes (see undertow/parallel/blocks)",
                remedy="kernel='auto', which takes it only where it can",
            )
        return wanted

    return pick


def refuse_unfit(problem: Problem, name: str, kernel: str, device: torch.device) -> None:
    """`UserError` if `kernel` cannot compute some block of the schedule called `name`: the same on all ranks, and
    before any message, because a rank that stops after one leaves its peers waiting. Backends by choice fit all."""
    if kernel in CHOICES:
        return
    pick, h, inner = picker(kernel), problem.heads, problem.inner(name)
    kv_heads = h.kv_heads * problem.kv_copies(name) // inner
    one = torch.empty((), dtype=getattr(torch, h.dtype), device=device)
    done, teams = set[tuple[int, int, bool, int | None]](), range(problem.world // inner)
    for i, j in product(teams, teams):
        ends = [(0, sum(map(rows_of, spans[t * inner : (t + 1) * inner])))
                for t, spans in ((i, problem.q_spans), (j, problem.k_spans))]  # fmt: skip
        for tile in problem.tiles(i, j, inner, ends[0], ends[1]):
            call = tile.q1 - tile.q0, tile.k1 - tile.k0, tile.kind != FULL, tile.window
            if call not in done:
                done.add(call)
                rows, keys, causal, window = call
                k, v = (one.expand(h.batch, kv_heads, keys, width) for width in (h.head_dim, h.v_dim))
                pick(one.expand(h.batch, h.q_heads // inner, rows, h.head_dim), k, v, causal=causal, window=window)


def ops(
    problem: Problem,
    inner: int,
    scale: float,
    *,
    lse_gradient: bool = False,
    kernel: str = "auto",
    pick: Callable[..., Backend] | None = None,
) -> Ops:
    """The table for schedules of `problem` in which `inner` ranks exchange heads. `kernel`: as `picker` takes it.
    `pick` replaces the choice for each tile, and then all blocks go by tiles."""
    whole_too = pick is None and kernel in (WITH_FLEX, flex.NAME)
    pick = pick or picker(kernel)

    @cache
    def plan(device: torch.device, **block: int) -> flex.Plan:
        return plan_of(problem, inner, block, device)

    def by_way(tiled: measured.Way, whole: measured.Way, given: Tensors, phase: str, **block: int) -> None:
        """A block by its tiles, or, if it has several, in one call."""
        q, k, v = map(_heads_first, given)
        count = len(tiles(**block)) if whole_too else 0
        if count < 2 or not flex.supports(q, k, v, causal=True, window=None):
            way = tiled
        elif kernel == flex.NAME:
            way = whole
        elif count < FEWEST_TILES:
            way = tiled
        else:
            ways = {"tiles": tiled, "one call": whole}
            lengths = (q.shape[2], k.shape[2], count)
            key = (phase, q.device, q.dtype, q.shape[:2], k.shape[1], q.shape[3], v.shape[3],
                   *map(measured.size_class, lengths))  # fmt: skip
            label = f"{phase} {list(q.shape)} × {list(k.shape)}, {count} tiles"
            way = ways[measured.fastest(key, ways, q.device, label)]
        way()

    @cache
    def tiles(q: int, k: int, q0: int, q1: int, k0: int, k1: int) -> tuple[Tile, ...]:
        return problem.tiles(q, k, inner, (q0, q1), (k0, k1))

    def attend(reads: Tensors, writes: Tensors, **block: int) -> None:
        tiled = partial(attend_tiles, reads, writes, **block)
        if len(reads) < 3:
            tiled()
        else:
            by_way(tiled, partial(attend_whole, reads, writes, **block), reads, "attend", **block)

    def attend_whole(reads: Tensors, writes: Tensors, **block: int) -> Tensors:
        out, lse = _heads_first(writes[0]), _lse_heads_first(writes[1])
        q, k, v = map(_heads_first, reads)
        part, part_lse = flex.forward_planned(q, k, v, plan(q.device, **block), scale=scale)
        out.copy_(part)
        lse.copy_(part_lse)
        return writes

    def attend_tiles(reads: Tensors, writes: Tensors, **block: int) -> Tensors:
        todo = tiles(**block) if len(reads) == 3 else ()
        if len(todo) > 1 and writes[0].element_size() < writes[1].element_size():  # a sum needs the wider type
            wide = writes[0].to(writes[1].dtype)
            attend_tiles(reads, (wide, writes[1]), **block)
            writes[0].copy_(wide)
            return writes
        out, lse = _heads_first(writes[0]), _lse_heads_first(writes[1])
        if len(reads) < 3:
            out.zero_()
            lse.fill_(float("-inf"))
            return writes
        q, k, v = map(_heads_first, reads)
        if len(todo) != 1 or (todo[0].q0, todo[0].q1) != (0, q.shape[2]):
            out.zero_()
            lse.fill_(float("-inf"))
        done: list[tuple[int, int]] = []
        for tile in todo:
            args = _pick(q, tile.q0, tile.q1, tile), _pick(k, tile.k0, tile.k1, tile), _pick(v, tile.k0, tile.k1, tile)
            causal = tile.kind != FULL
            backend = pick(*args, causal=causal, window=tile.window)
            part, part_lse = backend.forward(*args, scale=scale, causal=causal, window=tile.window)
            if tile.kind == BACKWARDS:
                part, part_lse = part.flip(2), part_lse.flip(2)
            rows = slice(tile.q0, tile.q1)
            if any(a < tile.q1 and tile.q0 < b for a, b in done):
                part, part_lse = merge(out[:, :, rows], lse[:, :, rows], part.to(out.dtype), part_lse)
            out[:, :, rows] = part
            lse[:, :, rows] = part_lse
            done.append((tile.q0, tile.q1))
        return writes

    def attend_backward(reads: Tensors, writes: Tensors, **block: int) -> None:
        tiled = partial(attend_backward_tiles, reads, writes, **block)
        if len(reads) < 6:
            tiled()
        else:
            whole = partial(attend_backward_whole, reads, writes, **block)
            by_way(tiled, whole, reads[:3], "attend_backward", **block)

    def attend_backward_whole(reads: Tensors, writes: Tensors, **block: int) -> Tensors:
        q, k, v, dout = map(_heads_first, reads[:4])
        lse, delta = map(_lse_heads_first, reads[4:])
        out, wide_v, wide_dout = _standing_in(dout, delta, v, lse_gradient)
        found = flex.backward_planned(wide_dout, q, k, wide_v, out, lse, plan(q.device, **block), scale=scale)
        for write, part in zip(writes, found):
            grad = _heads_first(write)
            grad.copy_(part[..., : grad.shape[3]])
        return writes

    def attend_backward_tiles(reads: Tensors, writes: Tensors, **block: int) -> Tensors:
        if len(reads) < 6:
            for write in writes:
                write.zero_()
            return writes
        todo = tiles(**block)
        if len(todo) > 1 and writes[0].element_size() < reads[4].element_size():
            wider = [write.to(reads[4].dtype) for write in writes]
            attend_backward_tiles(reads, wider, **block)
            for write, wide in zip(writes, wider):
                write.copy_(wide)
            return writes
        q, k, v, dout = map(_heads_first, reads[:4])
        lse, delta = map(_lse_heads_first, reads[4:])
        out, wide_v, wide_dout = _standing_in(dout, delta, v, lse_gradient)
        grads = [_heads_first(write) for write in writes]
        only = len(todo) == 1 and (todo[0].q1 - todo[0].q0, todo[0].k1 - todo[0].k0) == (q.shape[2], k.shape[2])
        for grad in [] if only else grads:
            grad.zero_()
        for tile in todo:
            rows, keys = (tile.q0, tile.q1), (tile.k0, tile.k1)
            args = _pick(q, *rows, tile), _pick(k, *keys, tile), _pick(wide_v, *keys, tile)
            causal = tile.kind != FULL
            backend = pick(*args, causal=causal, window=tile.window)
            tile_lse = lse[:, :, slice(*rows)]
            tile_lse = tile_lse.flip(2) if tile.kind == BACKWARDS else tile_lse
            found = backend.backward(
                _pick(wide_dout, *rows, tile), *args, _pick(out, *rows, tile), tile_lse,
                scale=scale, causal=causal, window=tile.window,
            )  # fmt: skip
            for grad, part, ends in zip(grads, found, (rows, keys, keys)):
                part = part.flip(2) if tile.kind == BACKWARDS else part
                part = part[..., : grad.shape[3]]
                if only:
                    grad.copy_(part)
                else:
                    grad[:, :, slice(*ends)] += part
        return writes

    def attend_joined(reads: Tensors, writes: Tensors, **block: object) -> None:
        """A block over the keys of several ranks, none of them hidden: one kernel call."""
        q, k, v = (_heads_first(x) for x in (reads[0], torch.cat(list(reads[1::2])), torch.cat(list(reads[2::2]))))
        kernel_of = pick(q, k, v, causal=False, window=None)
        part, part_lse = kernel_of.forward(q, k, v, scale=scale, causal=False, window=None)
        _heads_first(writes[0]).copy_(part)
        _lse_heads_first(writes[1]).copy_(part_lse)

    def attend_backward_joined(reads: Tensors, writes: Tensors, **block: object) -> None:
        """Its gradients: dq of all the keys, and each rank's dk and dv."""
        q, dout = map(_heads_first, reads[:2])
        lse, delta = map(_lse_heads_first, reads[2:4])
        k, v = (_heads_first(torch.cat(list(reads[at::2]))) for at in (4, 5))
        out, v, dout = _standing_in(dout, delta, v, lse_gradient)
        kernel_of = pick(q, k, v, causal=False, window=None)
        dq, dk, dv = kernel_of.backward(dout, q, k, v, out, lse, scale=scale, causal=False, window=None)
        _heads_first(writes[0]).copy_(dq)
        for grad, parts in ((dk, writes[1::2]), (dv, writes[2::2])):
            for part, rows in zip(parts, grad.split([part.shape[0] for part in parts], 2)):
                _heads_first(part).copy_(rows[..., : part.shape[3]])

    def in_sequence(op: Callable[..., None], of_reads: str, of_writes: str) -> Callable[..., None]:
        """`op` with rows in the order of the sequence. Which rows they are, each by a letter: of queries or of keys."""

        def run(reads: Tensors, writes: Tensors, **block: int) -> None:
            if len(reads) < len(of_reads):
                op(reads, writes, **block)
                return
            at = {name: dealt_rows(name, reads[0].device) for name in "qk"}
            sorted_writes = [torch.empty_like(x) for x in writes]
            op([x[at[name]] for name, x in zip(of_reads, reads)], sorted_writes, **block)
            for name, write, found in zip(of_writes, writes, sorted_writes):
                write[at[name]] = found

        return run

    @cache
    def dealt_rows(name: str, device: torch.device) -> Tensor:
        """Where each position's row lies."""
        ranks = problem.q_spans if name == "q" else problem.k_spans
        return torch.argsort(torch.cat([positions_of(spans) for spans in ranks])).to(device)

    if problem.dealt(inner):
        return {
            "attend": in_sequence(attend, "qkk", "qq"),
            "attend_backward": in_sequence(attend_backward, "qkkqqq", "qkk"),
            **COMMON,
        }
    return {
        "attend": attend,
        "attend_backward": attend_backward,
        "attend_joined": attend_joined,
        "attend_backward_joined": attend_backward_joined,
        **COMMON,
    }


def _standing_in(dout: Tensor, delta: Tensor, v: Tensor, column: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(out, v, dout) for a backward kernel, such that rowsum(dout * out) is `delta`."""
    if column:
        out = torch.zeros_like(dout)
        out, wide_v, wide_dout = (F.pad(t, (0, _COLUMNS)) for t in (out, v, dout))
        out[..., -1] = delta.to(out.dtype)
        wide_dout[..., -1] = 1
        return out, wide_v, wide_dout
    rows = standing_out(dout.permute(2, 0, 1, 3), delta.permute(2, 0, 1))  # as they lie in memory
    return _heads_first(rows), v, dout


def _merge_lse(reads: Tensors, writes: Tensors) -> None:
    """out, lse of parts [N, B, H, E], [N, B, H] to those of their union; may write over the first.

    A merge knows nothing of rows and heads, so the whole is one column of rows.
    """
    outs = [t.reshape(-1, t.shape[-1]) for t in (writes[0], *reads[::2])]
    lses = [t.reshape(-1) for t in (writes[1], *reads[1::2])]
    merge_parts_to(outs[0], lses[0], outs[1:], lses[1:])


def _add(reads: Tensors, writes: Tensors) -> None:
    """Sums of as many numbers as each group has; may write over the first group."""
    for at, write in enumerate(writes):
        add_parts_to(write, reads[at :: len(writes)])


def _split_heads(reads: Tensors, writes: Tensors) -> None:
    for part, write in zip(reads[0].chunk(len(writes), dim=2), writes):
        write.copy_(part)


def _join_heads(reads: Tensors, writes: Tensors) -> None:
    torch.cat(list(reads), dim=2, out=writes[0])


COMMON: Ops = {"merge_lse": _merge_lse, "add": _add, "split_heads": _split_heads, "join_heads": _join_heads}
