"""In which order a rank makes the rows of a product, so that a collective can carry off what is finished.

Rows are split into one chunk per rank, and a chunk into sub-chunks. Reduce-scatter is staggered (Pati et al., ASPLOS
2024, sections 4.2 and 4.4): rank r begins with the chunk of rank r + 1 and ends with its own, which needs no message.
All-gather is the mirror image: own rows first, then those of r + 1, which arrive first. Without the stagger all ranks
ask for one link at once, and next to nothing is hidden. The plan is pure: it knows no tensor, group or clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..dist.errors import UserError
from .builders.draft import bounds, pieces
from .builders.gemm_reduce_scatter import gemm_reduce_scatter
from .builders.reduce_scatter import chunk_order
from .schedule import Schedule


def chunk_rows(rows: int, world: int) -> tuple[int, ...]:
    """How many of `rows` each rank keeps: as torch.chunk cuts, so that DTensor's Shard agrees."""
    each = -(-rows // world)
    return tuple(max(0, min(each, rows - rank * each)) for rank in range(world))


@dataclass(frozen=True)
class Piece:
    """Rows [low, high) of the whole product: sub-chunk `part` of the chunk that rank `owner` keeps."""

    owner: int
    part: int
    low: int
    high: int

    def __str__(self) -> str:
        return f"chunk {self.owner} part {self.part} (rows {self.low}–{self.high})"


@dataclass(frozen=True)
class ChunkPlan:
    """The pieces of a product of sum(`sizes`) rows as `rank` makes them.

    `sizes`: rows of each rank's chunk. `subchunks`: pieces of a chunk (empty ones are left out). `tile_rows`: rows that
    one tile of the kernel covers; a piece has `tiles(piece)` of them, and the tracker counts that many. `algorithm`:
    'direct' (each piece straight to its owner) or 'ring'; the engines run 'direct', `schedule` gives either.
    """

    rank: int
    sizes: tuple[int, ...]
    subchunks: int = 1
    algorithm: str = "direct"
    tile_rows: int = 0

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

    @property
    def world(self) -> int:
        return len(self.sizes)

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    @property
    def own(self) -> tuple[int, int]:
        """The rows that this rank keeps."""
        return bounds(self.sizes)[self.rank]

    def chunk(self, owner: int) -> tuple[Piece, ...]:
        """The pieces of one chunk, in the order of rows."""
        return self._chunks[owner]

    @cached_property
    def _chunks(self) -> list[tuple[Piece, ...]]:
        return [
            tuple(Piece(owner, part, *rows) for part, rows in enumerate(pieces(*ends, self.subchunks)))
            for owner, ends in enumerate(bounds(self.sizes))
        ]

    @cached_property
    def scatter_order(self) -> tuple[Piece, ...]:
        """For product → reduce-scatter: others' pieces first, staggered; the own ones last."""
        return tuple(p for owner in chunk_order(self.world, self.rank, self.algorithm) for p in self.chunk(owner))

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
