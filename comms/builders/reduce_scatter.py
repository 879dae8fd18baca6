"""Reduce-scatter, direct and ring, of rows that are an input or that operations still produce.

Direct: each partial goes straight to its owner, which sums all of them in one fixed order. That is as many bytes as the
ring, W - 2 fewer dependent hops, and with `sum_order='rank'` the bits of a plain sum over ranks 0, 1, 2, …, whoever
owns the rows. Ring: partial sums travel and grow (T3's form, Pati et al., ASPLOS 2024, section 4). Both are staggered:
rank r ends with its own chunk, and begins where nobody else begins; without that all ranks ask for one link at once.
A chunk may go in `subchunks` pieces, so that the last exposed message is small.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...dist.errors import UserError
from ..actions import Slice
from ..schedule import Schedule
from ..terms import combined, origin
from .draft import Draft, Rows, bounds, per_rank, pieces


def direct_reduce_scatter(
    world: int,
    rows: Rows,
    row_shape: Sequence[int | str] = (),
    dtype: str = "float32",
    *,
    subchunks: int = 1,
    staggered: bool = True,
    sum_order: str = "rank",
    sum_dtype: str | None = None,
) -> Schedule:
    """Input `x` [rows of all ranks, *row_shape] → output `out` [rows of this rank, *row_shape], summed over ranks.

    `sum_order`: 'rank' adds rank 0 first, 'distance' adds what arrives first first (also fixed). `sum_dtype`: of the
    partial sums, `dtype` by default.
    """
    return _plain("direct", world, rows, row_shape, dtype, subchunks, staggered, sum_order, sum_dtype)


def ring_reduce_scatter(
    world: int, rows: Rows, row_shape: Sequence[int | str] = (), dtype: str = "float32", *, subchunks: int = 1
) -> Schedule:
    """As `direct_reduce_scatter`; each chunk is summed along the ring, beginning with its owner's successor."""
    return _plain("ring", world, rows, row_shape, dtype, subchunks, True, "rank", None)


def _plain(algorithm, world, rows, row_shape, dtype, subchunks, staggered, sum_order, sum_dtype) -> Schedule:
    sizes = per_rank(rows, world)
    draft = Draft(f"{algorithm}_reduce_scatter", world, subchunks=subchunks)
    for rank in range(world):
        draft.value(rank, "x", dtype, sum(sizes), row_shape, "input")
    scatter(draft, "x", sizes, row_shape, dtype, algorithm, subchunks, staggered, sum_order, sum_dtype)
    for rank, (start, stop) in enumerate(bounds(sizes)):
        if start < stop:
            draft.goal(
                rank,
                Slice("out", 0, stop - start),
                combined("add", [origin("x", r, start, stop) for r in range(world)]),
            )
    return draft.done()


def chunk_order(world: int, rank: int, algorithm: str, staggered: bool = True) -> list[int]:
    """The order in which `rank` hands out chunks. Staggered: its own last."""
    if not staggered:
        return list(range(world))
    step = 1 if algorithm == "direct" else -1
    return [(rank + step * (s + 1)) % world for s in range(world)]


def scatter(
    draft: Draft,
    source: str,
    sizes: Sequence[int],
    row_shape: Sequence[int | str],
    dtype: str,
    algorithm: str,
    subchunks: int,
    staggered: bool = True,
    sum_order: str = "rank",
    sum_dtype: str | None = None,
) -> None:
    """Add to `draft` the reduce-scatter of value `source`, which every rank declares, into the output `out`."""
    if subchunks < 1 or sum_order not in ("rank", "distance") or algorithm not in ("direct", "ring"):
        raise UserError(
            f"algorithm {algorithm!r} with {subchunks} subchunks, summed by {sum_order!r}",
            expected="'direct' or 'ring', at least one subchunk, and sum_order 'rank' or 'distance'",
        )
    if algorithm == "ring" and not staggered:
        raise UserError(
            "an unstaggered ring", expected="a ring's order is what makes it a ring; use algorithm='direct'"
        )
    for rank in range(draft.world):
        draft.value(rank, "out", dtype, sizes[rank], row_shape, "output")
    if draft.world == 1:
        if sizes[0]:
            draft.compute(
                0, "copy", [Slice(source, 0, sizes[0])], [Slice("out", 0, sizes[0])], kind="copy", lane="reduce"
            )
    elif algorithm == "ring":
        for rank in range(draft.world):
            _ring(draft, rank, source, sizes, row_shape, dtype, subchunks)
    else:
        for rank in range(draft.world):
            _direct_sends(draft, rank, source, sizes, subchunks, staggered)
            _direct_sums(draft, rank, source, sizes, row_shape, dtype, subchunks, sum_order, sum_dtype or dtype)


def _direct_sends(draft: Draft, rank: int, source: str, sizes: Sequence[int], subchunks: int, staggered: bool) -> None:
    for owner in chunk_order(draft.world, rank, "direct", staggered):
        if owner != rank:
            for part, ends in enumerate(pieces(*bounds(sizes)[owner], subchunks)):
                draft.send(rank, "out", owner, f"part.{part}", Slice(source, *ends))


def _direct_sums(
    draft: Draft, rank: int, source: str, sizes, row_shape, dtype: str, subchunks: int, sum_order: str, sum_dtype: str
) -> None:
    world, (base, end) = draft.world, bounds(sizes)[rank]
    arrivals = [(rank - distance) % world for distance in range(1, world)]
    staged = {peer: draft.value(rank, f"from.{peer}", dtype, end - base, row_shape) for peer in arrivals if end > base}
    parts = pieces(0, end - base, subchunks)
    for peer in staged:
        for part, ends in enumerate(parts):
            draft.recv(rank, "in", peer, f"part.{part}", Slice(f"from.{peer}", *ends))
    terms = sorted([*arrivals, rank]) if sum_order == "rank" else [*arrivals, rank]
    for at in range(1, world - 1) if parts else ():
        draft.value(rank, f"sum.{at}", sum_dtype, end - base, row_shape, slot="sum")
    for low, high in parts:
        rows = [
            Slice(source, base + low, base + high) if peer == rank else Slice(f"from.{peer}", low, high)
            for peer in terms
        ]
        for at in range(1, world):
            left = rows[0] if at == 1 else Slice(f"sum.{at - 1}", low, high)
            target = Slice("out" if at == world - 1 else f"sum.{at}", low, high)
            draft.compute(rank, "add", [left, rows[at]], [target], kind="reduce", lane="reduce")


def _ring(draft: Draft, rank: int, source: str, sizes, row_shape, dtype: str, subchunks: int) -> None:
    """Step s: send the sum of chunk r-1-s so far, receive that of chunk r-2-s, add the own rows to it.

    Two buffers each for what arrives and for what leaves: a receive waits until the sum before the last has been
    made, a sum until the send before the last has left.
    """
    world, order = draft.world, chunk_order(draft.world, rank, "ring")
    free: dict[str, Slice] = {}  # by slot: what shows that its latest owner is no longer needed
    total: dict[int, Slice] = {}  # by subchunk: the sum that the next step sends
    for step in range(world - 1):
        leaving, arriving = (_pieces(sizes, order[step + i], subchunks) for i in (0, 1))
        for part, (low, high) in leaving.items():
            rows, token = total.get(part, Slice(source, low, high)), None
            if 0 < step < world - 3:  # a later sum takes over this one's slot
                token = free[f"leaving.{(step - 1) % 2}.{part}"] = draft.token(rank, f"sent.{step}.{part}")
            draft.send(rank, "to_next", (rank + 1) % world, f"step.{step}.{part}", rows, done=token)
        total = {}
        for part, (low, high) in arriving.items():
            got_slot, sum_slot = f"arriving.{step % 2}.{part}", f"leaving.{step % 2}.{part}"
            got = draft.value(rank, f"got.{step}.{part}", dtype, high - low, row_shape, slot=got_slot)
            if got_slot in free:
                draft.wait(rank, "from_previous", free[got_slot])
            draft.recv(rank, "from_previous", (rank - 1) % world, f"step.{step}.{part}", got)
            if step == world - 2:
                base = bounds(sizes)[rank][0]
                total[part] = Slice("out", low - base, high - base)
            else:
                total[part] = draft.value(rank, f"sum.{step}.{part}", dtype, high - low, row_shape, slot=sum_slot)
                if sum_slot in free:
                    draft.wait(rank, "reduce", free[sum_slot])
            draft.compute(rank, "add", [got, Slice(source, low, high)], [total[part]], kind="reduce", lane="reduce")
            free[got_slot] = total[part]


def _pieces(sizes: Sequence[int], chunk: int, subchunks: int) -> dict[int, tuple[int, int]]:
    """The rows of each piece of a chunk; a piece without rows is left out."""
    return dict(enumerate(pieces(*bounds(sizes)[chunk], subchunks)))
