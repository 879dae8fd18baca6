"""In which order a rank makes the rows of a product, so that a collective can carry off what is finished.

Rows are split into one chunk per rank, and a chunk into sub-chunks. Reduce-scatter is staggered (Pati et al., ASPLOS
2024, sections 4.2 and 4.4): rank r begins with the chunk of rank r + 1 and ends with its own, which needs no message.
All-gather is the mirror image: own rows first, then those of r + 1, which arrive first. Without the stagger all ranks
ask for one link at once, and next to nothing is hidden. The plan is pure: it knows no tensor, group or clock.

A chunk is cut into rows or into columns. A product of some rows reads the whole second operand, one of some columns the
whole first, so pieces read again what they do not cut: `reads` counts that, and the smaller operand should be the one
that is read often. A product of columns has a piece for every owner, so columns need fewer products than rows do. The
own rows are one product, made last as ever, which hides what leaves last; or, where the rows are so few that to read
the second operand is what a product takes, they are among those of each piece (`whole`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Any

from ..dist.errors import UserError
from .builders.draft import bounds, pieces
from .builders.gemm_reduce_scatter import gemm_reduce_scatter
from .builders.reduce_scatter import chunk_order
from .schedule import Schedule

GROWTH = 0.95  # of the growth of pieces of columns with which a link that takes as long as the product waits least
TILE = 128, 256  # rows and columns of a product that a GPU's processor makes at a time


@lru_cache(maxsize=1024)  # asked for at every call of a layer
def chunk_rows(rows: int, world: int) -> tuple[int, ...]:
    """How many of `rows` each rank keeps: as torch.chunk cuts, so that DTensor's Shard agrees."""
    each = -(-rows // world)
    return tuple(max(0, min(each, rows - rank * each)) for rank in range(world))


@lru_cache(maxsize=1024)
def panels(columns: int, parts: int, world: int) -> tuple[tuple[int, int], ...]:
    """`columns` in at most `parts` pieces, each wider than the one before it.

    The link should get its first piece early, and the next one when it has sent that: while it sends a piece of share w
    in w s, the product makes the next one, of the other ranks' rows, in w' g (W - 1) / W. Where the link takes as long
    as the product, w' = w W / (W - 1) keeps both busy; `GROWTH` of that loses little on either side. Widths are
    multiples of the 256 columns of a kernel's tile where the pieces are that wide, of 8 (16 bytes of half precision, as
    kernels want rows to begin) where they are at least that.
    """
    ratio = max(1.0, GROWTH * world / max(1, world - 1))
    return _cut(columns, list(accumulate(ratio**part for part in range(parts))))


@lru_cache(maxsize=1024)
def waves(columns: int, parts: int, rows: int, processors: int) -> tuple[tuple[int, int], ...]:
    """`columns` in some `parts` pieces of `rows` rows, each made in whole rounds of the GPU's `processors`.

    A round of which many processors have no tile takes as long as a full one, so pieces that all end with such a round
    take longer than the product in one. Hence all pieces but the last, which is what is left, have about as many tiles
    as some rounds have, and pieces may be more or fewer than `parts`. Products of less than two rounds, for which a
    BLAS takes smaller tiles, and those of which not one column of tiles fits into a round are cut evenly.
    """
    tall, wide = -(-rows // TILE[0]), -(-columns // TILE[1])
    width = 0
    if tall * wide >= 2 * processors > 0:
        width = max(1, round(tall * wide / (processors * parts))) * processors // tall * TILE[1]
    if not width or width >= columns:
        return _cut(columns, range(1, parts + 1))
    return tuple(pairwise((*range(0, columns, width), columns)))


def _cut(columns: int, weights: Sequence[float]) -> tuple[tuple[int, int], ...]:
    """`columns` where the rising `weights` are of the last one, to whole units."""
    unit = next(unit for unit in (256, 8, 1) if columns >= unit * len(weights) or unit == 1)
    ends = {min(columns, round(columns / unit * weight / weights[-1]) * unit) for weight in weights[:-1]} | {0, columns}
    return tuple(pairwise(sorted(ends)))


@dataclass(frozen=True)
class Piece:
    """Rows [low, high) of the whole product: sub-chunk `part` of the chunk that rank `owner` keeps.

    `left`, `right`: of these rows the columns [left, right); all of them where both are 0.
    """

    owner: int
    part: int
    low: int
    high: int
    left: int = 0
    right: int = 0

    def __str__(self) -> str:
        columns = f", columns {self.left}–{self.right}" if self.right else ""
        return f"chunk {self.owner} part {self.part} (rows {self.low}–{self.high}{columns})"


@dataclass(frozen=True)
class Block:
    """What one product makes: rows [low, high), of them the columns [left, right) or, where both are 0, all; and of
    which pieces it is the last part."""

    low: int
    high: int
    left: int
    right: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Hop:
    """What leaves and comes together, `part` of the chunks: after the products of `blocks` the pieces of `sends` go to
    their owners, and pieces of the own chunk come from other ranks, (source, piece)."""

    part: int
    blocks: tuple[Block, ...]
    sends: tuple[Piece, ...]
    receives: tuple[tuple[int, Piece], ...]


@dataclass(frozen=True)
class ChunkPlan:
    """The pieces of a product of sum(`sizes`) rows as `rank` makes them.

    `sizes`: rows of each rank's chunk. `subchunks`: pieces of a chunk (empty ones are left out). `tile_rows`: rows that
    one tile of the kernel covers; a piece has `tiles(piece)` of them, and the tracker counts that many. `algorithm`:
    'direct' (each piece straight to its owner) or 'ring'; the engines run 'direct', `schedule` gives either. `columns`:
    of the product, where chunks are cut into pieces of columns; 0: of rows. `whole`: pieces of columns have the own
    rows too, and are cut for a GPU of so many `processors` (`waves`) where that is not 0.
    """

    rank: int
    sizes: tuple[int, ...]
    subchunks: int = 1
    algorithm: str = "direct"
    tile_rows: int = 0
    columns: int = 0
    whole: bool = False
    processors: int = 0

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 0 or not 0 <= self.rank < len(self.sizes):
            raise UserError(
                f"rank {self.rank} with chunks of {self.sizes} rows", expected="one chunk ≥ 0 for each rank"
            )
        if self.subchunks < 1 or self.algorithm not in ("direct", "ring"):
            raise UserError(
                f"algorithm {self.algorithm!r} with {self.subchunks} subchunks",
                expected="'direct' or 'ring', at least 1",
            )
        if self.columns < 0 or (self.columns and (self.tile_rows or self.algorithm != "direct")):
            raise UserError(
                f"pieces of {self.columns} columns, {self.algorithm}, with tiles of {self.tile_rows} rows",
                expected="columns ≥ 0, and 'direct' without tile_rows where there are some",
            )

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """A plan is looked up at every call. Of numbers only: a copy in another process keeps it."""
        return hash((self.rank, self.sizes, self.subchunks, self.tile_rows, self.columns, self.whole))

    @property
    def world(self) -> int:
        return len(self.sizes)

    @cached_property
    def rows(self) -> int:
        return sum(self.sizes)

    @cached_property
    def own(self) -> tuple[int, int]:
        """The rows that this rank keeps."""
        return bounds(self.sizes)[self.rank]

    def chunk(self, owner: int) -> tuple[Piece, ...]:
        """The pieces of one chunk, in the order of rows."""
        return self._chunks[owner]

    @cached_property
    def _chunks(self) -> list[tuple[Piece, ...]]:
        if self.columns:
            return [
                tuple(Piece(owner, part, low, high, *ends) for part, ends in enumerate(self._cut) if low < high)
                for owner, (low, high) in enumerate(bounds(self.sizes))
            ]
        return [
            tuple(Piece(owner, part, *rows) for part, rows in enumerate(pieces(*ends, self.subchunks)))
            for owner, ends in enumerate(bounds(self.sizes))
        ]

    @cached_property
    def scatter_order(self) -> tuple[Piece, ...]:
        """For product → reduce-scatter: others' pieces first, staggered; the own ones last."""
        order = chunk_order(self.world, self.rank, self.algorithm)
        if self.columns:
            foreign = (p for part in range(self.parts) for owner in order[:-1] for p in self.chunk(owner)[part:][:1])
            return (*foreign, *self.chunk(self.rank))
        return tuple(p for owner in order for p in self.chunk(owner))

    @cached_property
    def _cut(self) -> tuple[tuple[int, int], ...]:
        if self.processors and self.whole:
            return waves(self.columns, self.subchunks, self.rows, self.processors)
        return panels(self.columns, self.subchunks, self.world)

    @cached_property
    def edges(self) -> tuple[int, ...]:
        """Where the pieces of columns begin and end; none for pieces of rows."""
        return (0, *(right for _, right in self._cut)) if self.columns else ()

    @cached_property
    def parts(self) -> int:
        """The most pieces of a chunk."""
        return len(self.edges) - 1 if self.columns else self.subchunks

    @cached_property
    def hops(self) -> tuple[Hop, ...]:
        """For product → reduce-scatter: what every rank makes and exchanges, in the same order on all of them."""
        others = range(1, self.world)
        if self.columns:  # all owners' pieces at once, whose rows lie above and below the own ones
            return tuple(self._hop(part, others, self._around(part)) for part in range(self.parts))
        return tuple(
            self._hop(part, (step,), tuple(_of_rows(p) for p in self.chunk((self.rank + step) % self.world)[part:][:1]))
            for step in others
            for part in range(self.parts)
        )

    def _hop(self, part: int, steps: Iterable[int], blocks: tuple[Block, ...]) -> Hop:
        own = self.chunk(self.rank)[part:][:1]
        sends = tuple(p for step in steps for p in self.chunk((self.rank + step) % self.world)[part:][:1])
        receives = tuple(((self.rank - step) % self.world, piece) for step in steps for piece in own)
        return Hop(part, blocks, sends, receives)

    def _around(self, part: int) -> tuple[Block, ...]:
        """The products of a piece of columns: all rows, or those below the own ones, then those above."""
        low, high = self.own
        left, right = self._cut[part]
        if self.whole:
            ready = tuple(piece for owner in range(self.world) for piece in self.chunk(owner)[part:][:1])
            return (Block(0, self.rows, left, right, ready),) if ready else ()
        found = []
        for first, last, owners in ((high, self.rows, range(self.rank + 1, self.world)), (0, low, range(self.rank))):
            if first < last:
                ready = tuple(piece for owner in owners for piece in self.chunk(owner)[part:][:1])
                found.append(Block(first, last, left, right, ready))
        return tuple(found)

    @cached_property
    def tables(self) -> dict[Any, Any]:
        """What `placement.messages` has made of this plan, by the product's columns."""
        return {}

    @cached_property
    def among(self) -> ChunkPlan:
        """The same with the own rows among those of each piece of columns."""
        return self if self.whole else replace(self, whole=True)

    @cached_property
    def kept(self) -> tuple[Block, ...]:
        """The products of the own rows, after all hops."""
        own = self.chunk(self.rank)
        if not self.columns:
            return tuple(_of_rows(piece) for piece in own)
        return (Block(*self.own, 0, self.columns, own),) if own and not self.whole else ()

    def expect(self, rank: int, world: int, *, rows: bool = False) -> None:
        """`UserError` where an engine of `rank` cannot run this plan; `rows`: a pattern of pieces of rows only."""
        if (self.rank, self.world) != (rank, world) or self.algorithm != "direct":
            raise UserError(
                f"a {self.algorithm} plan of rank {self.rank} of {self.world}",
                expected=f"a direct one of rank {rank} of {world}",
            )
        if rows and self.columns:
            raise UserError("a plan of columns", expected="one of rows: only a reduce-scatter is cut into columns")

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """All products, in order; one of all rows where nothing is to leave before the end."""
        if not self.columns:
            return (Block(0, self.rows, 0, 0, ()),)
        return (*(block for hop in self.hops for block in hop.blocks), *self.kept)

    def reads(self, k: int, n: int) -> int:
        """Numbers that the products read of their operands [rows, k] and [k, n], each its rows and its columns once."""
        blocks = [block for hop in self.hops for block in hop.blocks] + list(self.kept)
        return sum((b.high - b.low) * k + k * (b.right - b.left or n) for b in blocks)

    @cached_property
    def gather_order(self) -> tuple[Piece, ...]:
        """For all-gather → product: the own rows first, then the others' as they arrive."""
        owners = [(self.rank + step) % self.world for step in range(self.world)]
        return tuple(piece for owner in owners for piece in self.chunk(owner))

    @property
    def receivers(self) -> tuple[int, ...]:
        """For all-gather: to whom the own pieces go, so that everyone gets its successor's first."""
        return tuple((self.rank - step) % self.world for step in range(1, self.world))

    def tiles(self, piece: Piece) -> int:
        """Tiles whose completion completes the piece."""
        return -(-(piece.high - piece.low) // self.tile_rows) if self.tile_rows else 1

    def schedule(self, k: int, n: int, dtype: str = "float32", *, overlap: bool = True) -> Schedule:
        """The same exchange as a schedule, to be checked, simulated or drawn."""
        if self.columns:
            raise UserError("a schedule of pieces of columns", expected="pieces of rows (columns=0)")
        return gemm_reduce_scatter(
            self.world,
            list(self.sizes),
            k,
            n,
            dtype,
            algorithm=self.algorithm,
            subchunks=self.subchunks,
            overlap=overlap,
        )


def _of_rows(piece: Piece) -> Block:
    return Block(piece.low, piece.high, 0, 0, (piece,))
