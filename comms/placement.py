"""Where the pieces of a product lie: in what is made, in what comes from a peer, and in the sum.

A message is one piece of memory. Rows of a matrix are, and lie where they belong. Columns are not, so a product of
columns is stored by pieces: first the rows that the rank keeps, [own rows, columns], then for each piece of columns the
other ranks' rows, [rows, width]; a `whole` plan has only the pieces, with all rows. What a peer sends is stored
likewise, [own rows, width] for each piece, and the sum, which reads every part anyway, writes each number to its place
in the matrix: no copy is made of either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..dist.errors import UserError
from .chunk_plan import Block, ChunkPlan, Hop, Piece

Product = Callable[[int, int], None]  # make rows [low, high) of the product
Panel = Callable[[int, int, int, int, torch.Tensor], None]  # rows [low, high) and columns [left, right) into a tensor


class Messages(NamedTuple):
    """Of one hop: (first number in the product, how many, to whom), and (which landing, first number in it, how many,
    from whom). None is empty."""

    hop: Hop
    sends: tuple[tuple[int, int, int], ...]
    receives: tuple[tuple[int, int, int, int], ...]


def messages(plan: ChunkPlan, columns: int) -> tuple[Messages, ...]:
    """All hops of a product of so many columns; made once for each of them."""
    found = plan.tables.get(columns)
    if found is None:
        empty = torch.empty(plan.rows, columns, device="meta")
        place, landing, table = Placement(plan, empty), torch.empty_like(empty[slice(*plan.own)]), []
        for hop in plan.hops:
            made = [(place.made(piece), piece.owner) for piece in hop.sends]
            landed = [(place.landed(landing, piece), source) for source, piece in hop.receives]
            table.append(
                Messages(
                    hop,
                    tuple((int(part.storage_offset()), part.numel(), to) for part, to in made if part.numel()),
                    tuple(
                        (source - (source > plan.rank), int(part.storage_offset()), part.numel(), source)
                        for part, source in landed
                        if part.numel()
                    ),
                )
            )
        found = plan.tables[columns] = tuple(table)
    return found


class Placement:
    """Of one plan, in `y`, contiguous [rows, columns]: what a rank makes, by pieces where the plan cuts columns.

    `apart`: the own rows are one product and stand before the pieces; else they are among the rows of each piece.
    `alike`: sums are of all ranks' rows, and lie as what is made.
    """

    def __init__(self, plan: ChunkPlan, y_MN: torch.Tensor, *, alike: bool = False) -> None:
        self.plan, self.y, self.apart, self.alike = plan, y_MN, not plan.whole, alike
        self._low, self._high = plan.own
        self._kept = self._high - self._low

    def fill(self, product: Product | None, panel: Panel | None) -> Callable[[Block], None]:
        """What makes a block: `product`, or `panel` where the plan is of columns; `UserError` where that is missing."""
        if product is not None and not self.plan.columns:
            return by_rows(product)
        if panel is None:
            raise UserError("a plan of columns without `panel`", expected="what makes some rows and columns")
        return lambda block: panel(block.low, block.high, block.left, block.right, self.block(block))

    def block(self, block: Block) -> torch.Tensor:
        """What one product of a plan of columns makes."""
        whole = block.right - block.left == self.plan.columns
        if self.apart and whole and (block.low, block.high) == self.plan.own:
            return self.y.narrow(0, 0, self._kept)
        return self._panel(block.low, block.high, block.left, block.right)

    @property
    def own(self) -> torch.Tensor:
        """What the rank keeps, [own rows, columns]; of pieces of columns where the own rows are apart."""
        return self.y.narrow(0, 0 if self.plan.columns else self._low, self._kept)

    def made(self, piece: Piece) -> torch.Tensor:
        """A piece of the product; another rank's is one piece of memory."""
        if not piece.right:
            return self.y.narrow(0, piece.low, piece.high - piece.low)
        if self.apart and piece.owner == self.plan.rank:
            return self.y[: self._kept, piece.left : piece.right]
        return self._panel(piece.low, piece.high, piece.left, piece.right)

    def landed(self, landing: torch.Tensor, piece: Piece) -> torch.Tensor:
        """An own piece in `landing`, contiguous [own rows, columns], as another rank sends it: one piece of memory."""
        if not piece.right:
            return landing.narrow(0, piece.low - self._low, piece.high - piece.low)
        width = piece.right - piece.left
        start = int(landing.storage_offset()) + self._kept * piece.left
        return landing.as_strided((self._kept, width), (width, 1), start)

    def summed(self, out: torch.Tensor, piece: Piece) -> torch.Tensor:
        """An own piece in the sum, [own rows, columns], or [rows, columns] of sums that lie `alike`."""
        if not piece.right:
            return out.narrow(0, piece.low - self._low, piece.high - piece.low)
        if self.alike:
            return Placement(self.plan, out).made(piece)
        return out.narrow(1, piece.left, piece.right - piece.left)

    def _panel(self, low: int, high: int, left: int, right: int) -> torch.Tensor:
        start, _ = self._start(low, high, left, right)
        width = right - left
        return self.y.as_strided((high - low, width), (width, 1), int(self.y.storage_offset()) + start)

    def _start(self, low: int, high: int, left: int, right: int) -> tuple[int, int]:
        """(first number, how many): other ranks' rows stand one below the other without the own ones, if those are
        apart."""
        width, count = right - left, (high - low) * (right - left)
        if not self.apart:
            return self.plan.rows * left + low * width, count
        above = low if low < self._low else low - self._kept
        return self._kept * self.plan.columns + (self.plan.rows - self._kept) * left + above * width, count

    def place(self, piece: Piece) -> tuple[int, int]:
        """(first number, how many) of a piece of columns that is one piece of memory."""
        return self._start(piece.low, piece.high, piece.left, piece.right)


def by_rows(product: Product) -> Callable[[Block | Piece], None]:
    """What makes the rows of a block, or of a piece."""
    return lambda rows: product(rows.low, rows.high)
