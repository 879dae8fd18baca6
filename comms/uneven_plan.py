"""A plan whose products do not end where the ranks' chunks do, because a BLAS is faster with other rows than a chunk's.

cuBLAS makes 2048 rows of a product (8192 columns, K 16384) in 671 us on an H200, 256 in 98 and 320 in 116: 1792 rows of
other ranks take seven of the former, 686, or five of the latter and one of 192, 664, and their last message is 192 rows
long. So the other ranks' rows are made so many at a time, in the same staggered order,
whatever chunk they belong to. What a product has finished leaves behind it: rows of one owner or of several, each a
message of its own. Such messages are the same for all ranks, counted from their own rows, only where all chunks have
equally many rows; other plans have products that end with the chunks. The own rows are one product, made last.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from ..dist.errors import UserError
from .chunk_plan import Block, ChunkPlan, Hop, Piece
from .schedule import Schedule


@dataclass(frozen=True)
class UnevenPlan(ChunkPlan):
    """`product_rows`: rows of each product, but of the last one of the other ranks' rows, and of the own rows'."""

    product_rows: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.product_rows < 1 or len(set(self.sizes)) > 1:
            raise UserError(
                f"products of {self.product_rows} rows for chunks of {self.sizes}",
                expected="at least 1, and chunks of equally many rows",
            )
        if self.subchunks > 1 or self.columns or self.tile_rows or self.algorithm != "direct":
            raise UserError(
                f"products of {self.product_rows} rows, {self.algorithm}, with {self.subchunks} subchunks, "
                f"{self.columns} columns and tiles of {self.tile_rows} rows",
                expected="1 subchunk of rows, without tiles, direct",
            )

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.rank, self.sizes, self.product_rows))

    @cached_property
    def hops(self) -> tuple[Hop, ...]:
        """A product each. Rows are counted from the end of the own ones, so that all ranks cut alike."""
        others = self.rows - self.sizes[self.rank]
        ends = [*range(0, others, self.product_rows), others]
        return tuple(self._product(low, high) for low, high in pairwise(ends))

    def _product(self, low: int, high: int) -> Hop:
        each, sends, receives = self.sizes[self.rank], list[Piece](), list[tuple[int, Piece]]()
        for step in range(low // each + 1, -(-high // each) + 1):  # of the owner that is so many ranks away
            first, last = max(low - (step - 1) * each, 0), min(high - (step - 1) * each, each)
            to, source = (self.rank + step) % self.world, (self.rank - step) % self.world
            sends.append(Piece(to, 0, to * each + first, to * each + last))
            own = self.own[0]
            receives.append((source, Piece(self.rank, 0, own + first, own + last)))
        start, wrap = self.own[1], self.rows - self.own[1]  # behind the last rank's rows come the first one's
        cuts = [low, wrap, high] if low < wrap < high else [low, high]
        blocks = [Block((start + a) % self.rows, (start + b - 1) % self.rows + 1, 0, 0, ()) for a, b in pairwise(cuts)]
        return Hop(0, tuple(blocks), tuple(sends), tuple(receives))

    def expect(self, rank: int, world: int, *, rows: bool = False) -> None:
        super().expect(rank, world, rows=rows)
        if rows:
            raise UserError(
                f"a plan of products of {self.product_rows} rows", expected="one whose products end with the chunks"
            )

    def schedule(self, k: int, n: int, dtype: str = "float32", *, overlap: bool = True) -> Schedule:
        raise UserError("a schedule of products that do not end with the chunks", expected="a ChunkPlan")
