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

import itertools
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...comms.ops import Giving, Ops
from ..blocks import flex, measured
from ..blocks.types import Backend
from ..kernels.row_products import standing_out
from ..masks import BACKWARDS, FULL, Tile
from ..merge import lse_dtype, merge
from ..partition import positions_of
from .kernel_choice import WITH_FLEX, picker
from .problem import Problem
from .sum_ops import SUMS_AND_HEADS
from .whole_blocks import FEWEST_TILES, plan_of

Tensors = Sequence[Tensor]
Way = Callable[[], Tensors]
ONE_CALL = "one call"
LSE = (1,)  # of the results of a forward block
_COLUMNS = 8  # flash kernels take head dims in multiples of 8


def _rows_first(x_BHND: Tensor) -> Tensor:
    """As values are; most kernels lay results out as their inputs, so that this is dense."""
    return x_BHND.permute(2, 0, 1, 3)


def _heads_first(x_NBHD: Tensor) -> Tensor:
    return x_NBHD.permute(1, 2, 0, 3)


def _lse_heads_first(x_NBH: Tensor) -> Tensor:
    return x_NBH.permute(1, 2, 0)


def _pick(x_BHND: Tensor, start: int, stop: int, tile: Tile) -> Tensor:
    part = x_BHND[:, :, start:stop]
    return part.flip(2) if tile.kind == BACKWARDS else part


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

    def in_one_call(given: Tensors, phase: str, tiled: Way, whole: Way, **block: int) -> bool:
        """Whether a block of several tiles is computed by one call of FlexAttention."""
        if not whole_too or (count := len(tiles(**block))) < 2:
            return False
        q, k, v = map(_heads_first, given[:3])
        if not flex.supports(q, k, v, causal=True, window=None):
            return False
        if kernel == flex.NAME or count < FEWEST_TILES:
            return kernel == flex.NAME
        lengths = (q.shape[2], k.shape[2], count)
        key = (phase, q.device, q.dtype, q.shape[:2], k.shape[1], q.shape[3], v.shape[3],
               *map(measured.size_class, lengths))  # fmt: skip
        label = f"{phase} {list(q.shape)} × {list(k.shape)}, {count} tiles"
        return measured.fastest(key, {"tiles": tiled, ONE_CALL: whole}, q.device, label) == ONE_CALL

    @cache
    def tiles(q: int, k: int, q0: int, q1: int, k0: int, k1: int) -> tuple[Tile, ...]:
        return problem.tiles(q, k, inner, (q0, q1), (k0, k1))

    def attend(reads: Tensors, **block: int) -> Tensors | None:
        """(out, lse) as the kernel made them, of a block that is one call."""
        if len(reads) < 3:
            return None
        whole = partial(attend_whole, reads, **block)
        if in_one_call(reads, "attend", lambda: attend_tiles(reads, _blank_results(reads), **block), whole, **block):
            return whole()
        todo, (q, k, v) = tiles(**block), map(_heads_first, reads)
        if len(todo) != 1 or (todo[0].q0, todo[0].q1) != (0, q.shape[2]):
            return None
        return _results_rows_first(*attend_tile(todo[0], q, k, v))

    def attend_whole(reads: Tensors, **block: int) -> Tensors:
        q, k, v = map(_heads_first, reads)
        return _results_rows_first(*flex.forward_planned(q, k, v, plan(q.device, **block), scale=scale))

    def attend_tile(tile: Tile, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        args = _pick(q, tile.q0, tile.q1, tile), _pick(k, tile.k0, tile.k1, tile), _pick(v, tile.k0, tile.k1, tile)
        causal = tile.kind != FULL
        backend = pick(*args, causal=causal, window=tile.window)
        part, part_lse = backend.forward(*args, scale=scale, causal=causal, window=tile.window)
        return (part.flip(2), part_lse.flip(2)) if tile.kind == BACKWARDS else (part, part_lse)

    def attend_tiles(reads: Tensors, writes: Tensors, **block: int) -> Tensors:
        todo = tiles(**block) if len(reads) == 3 else ()
        if len(todo) > 1 and writes[0].element_size() < writes[1].element_size():  # a sum needs the wider type
            wide = torch.empty_like(writes[0], dtype=writes[1].dtype)
            attend_tiles(reads, (wide, writes[1]), **block)
            writes[0].copy_(wide)
            return writes
        out, lse = _heads_first(writes[0]), _lse_heads_first(writes[1])
        out.zero_()
        lse.fill_(float("-inf"))
        done: list[tuple[int, int]] = []
        for tile in todo:
            part, part_lse = attend_tile(tile, *map(_heads_first, reads))
            rows = slice(tile.q0, tile.q1)
            if any(a < tile.q1 and tile.q0 < b for a, b in done):
                part, part_lse = merge(out[:, :, rows], lse[:, :, rows], part.to(out.dtype), part_lse)
            out[:, :, rows] = part
            lse[:, :, rows] = part_lse
            done.append((tile.q0, tile.q1))
        return writes

    def attend_backward(reads: Tensors, **block: int) -> Tensors | None:
        """(dq, dk, dv) as the kernel made them, of a block that is one call."""
        if len(reads) < 6:
            return None
        whole, tiled = (partial(way, reads, **block) for way in (backward_whole, backward_tiles))
        if in_one_call(reads, "attend_backward", lambda: tiled(_blank_gradients(reads)), whole, **block):
            return whole()
        todo = tiles(**block)
        if [(tile.q1 - tile.q0, tile.k1 - tile.k0) for tile in todo] != [(reads[0].shape[0], reads[1].shape[0])]:
            return None
        return _gradients_rows_first(backward_tile(todo[0], *standing_in(reads)), reads)

    def backward_whole(reads: Tensors, **block: int) -> Tensors:
        dout, q, k, v, out, lse = standing_in(reads)
        found = flex.backward_planned(dout, q, k, v, out, lse, plan(q.device, **block), scale=scale)
        return _gradients_rows_first(found, reads)

    def standing_in(reads: Tensors) -> tuple[Tensor, ...]:
        """(dout, q, k, v, out, lse) as a backward kernel wants them."""
        q, k, v, dout = map(_heads_first, reads[:4])
        lse, delta = map(_lse_heads_first, reads[4:])
        out, v, dout = _standing_in(dout, delta, v, lse_gradient)
        return dout, q, k, v, out, lse

    def backward_tile(
        tile: Tile, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, ...]:
        rows, keys, causal = (tile.q0, tile.q1), (tile.k0, tile.k1), tile.kind != FULL
        args = _pick(q, *rows, tile), _pick(k, *keys, tile), _pick(v, *keys, tile)
        backend = pick(*args, causal=causal, window=tile.window)
        lse = lse[:, :, slice(*rows)]
        found = backend.backward(
            _pick(dout, *rows, tile), *args, _pick(out, *rows, tile), lse.flip(2) if tile.kind == BACKWARDS else lse,
            scale=scale, causal=causal, window=tile.window,
        )  # fmt: skip
        return tuple(part.flip(2) for part in found) if tile.kind == BACKWARDS else found

    def backward_tiles(reads: Tensors, writes: Tensors, **block: int) -> Tensors:
        todo = tiles(**block) if len(reads) == 6 else ()
        if len(todo) > 1 and writes[0].element_size() < reads[4].element_size():
            wider = [torch.empty_like(write, dtype=reads[4].dtype) for write in writes]
            backward_tiles(reads, wider, **block)
            for write, wide in zip(writes, wider):
                write.copy_(wide)
            return writes
        for write in writes:
            write.zero_()
        given = standing_in(reads) if todo else ()
        for tile in todo:
            ends = (tile.q0, tile.q1), (tile.k0, tile.k1), (tile.k0, tile.k1)
            for write, part, (start, stop) in zip(writes, backward_tile(tile, *given), ends):
                _heads_first(write)[:, :, start:stop] += part[..., : write.shape[3]]
        return writes

    def attend_joined(reads: Tensors, **block: object) -> Tensors:
        """A block over the keys of several ranks, none of them hidden: one kernel call."""
        q, k, v = (_heads_first(x) for x in (reads[0], torch.cat(list(reads[1::2])), torch.cat(list(reads[2::2]))))
        kernel_of = pick(q, k, v, causal=False, window=None)
        return _results_rows_first(*kernel_of.forward(q, k, v, scale=scale, causal=False, window=None))

    def attend_backward_joined(reads: Tensors, **block: object) -> Tensors:
        """Its gradients: dq of all the keys, and each rank's dk and dv."""
        keys, values = reads[4::2], reads[5::2]
        dout, q, k, v, out, lse = standing_in((reads[0], torch.cat(list(keys)), torch.cat(list(values)), *reads[1:4]))
        kernel_of = pick(q, k, v, causal=False, window=None)
        dq, dk, dv = kernel_of.backward(dout, q, k, v, out, lse, scale=scale, causal=False, window=None)
        parts = (grad.split([key.shape[0] for key in keys], 2) for grad in (dk, dv[..., : values[0].shape[3]]))
        return [_rows_first(part) for part in (dq, *itertools.chain(*zip(*parts)))]

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

    forward, backward = _giving(attend, attend_tiles, loose=LSE), _giving(attend_backward, backward_tiles)
    if problem.dealt(inner):
        return {
            "attend": in_sequence(forward, "qkk", "qq"),
            "attend_backward": in_sequence(backward, "qkkqqq", "qkk"),
            **SUMS_AND_HEADS,
        }
    return {
        "attend": forward,
        "attend_backward": backward,
        "attend_joined": _giving(attend_joined, loose=LSE),
        "attend_backward_joined": _giving(attend_backward_joined),
        **SUMS_AND_HEADS,
    }


def _giving(
    give: Callable[..., Tensors | None], pieces: Callable[..., object] | None = None, *, loose: Sequence[int] = ()
) -> Giving:
    """The operation that gives, or that fills its writes: by `pieces` where nothing is given."""

    def fill(reads: Tensors, writes: Tensors, **block: object) -> None:
        found = give(reads, **block)
        if found is None:
            assert pieces is not None
            pieces(reads, writes, **block)
        else:
            for write, part in zip(writes, found):
                write.copy_(part)

    return Giving(fill, give, frozenset(loose))


def _results_rows_first(out_BHNE: Tensor, lse_BHN: Tensor) -> Tensors:
    """A kernel's results as values. On a CPU the log-sum-exp is made dense: strides change the last bits of sums."""
    lse = lse_BHN.permute(2, 0, 1)
    return _rows_first(out_BHNE), lse if lse.is_cuda else lse.contiguous()


def _gradients_rows_first(grads_BHND: Tensors, like_NBHD: Tensors) -> Tensors:
    return [_rows_first(grad[..., : x.shape[3]]) for grad, x in zip(grads_BHND, like_NBHD)]


def _blank_results(reads: Tensors) -> Tensors:
    """Memory for (out, lse) of a block of several tiles, in the dtype of sums."""
    q, _, v = reads
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=lse_dtype(q.dtype), device=q.device)
    return out, out.new_empty(q.shape[:3])


def _blank_gradients(reads: Tensors) -> Tensors:
    return [torch.empty_like(x, dtype=reads[4].dtype) for x in reads[:3]]


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
