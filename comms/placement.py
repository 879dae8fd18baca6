"""Where the pieces of a product lie: in what is made, in what comes from a peer, and in the sum.

A message is one piece of memory. Rows of a matrix are, and lie where they belong. Columns are not, so a product of
columns is stored by pieces: first the rows that the rank keeps, [own rows, columns], then for each piece of columns the
other ranks' rows, [rows, width]. What a peer sends is stored likewise, [own rows, width] for each piece, and the sum,
which reads every part anyway, writes each number to its place in the matrix: no copy is made of either.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..dist.errors import UserError
from .chunk_plan import Block, ChunkPlan, Piece

Product = Callable[[int, int], None]  # make rows [low, high) of the product
Panel = Callable[[int, int, int, int, torch.Tensor], None]  # rows [low, high) and columns [left, right) into a tensor


class Placement:
    """Of one plan, in `y`, contiguous [rows, columns]: what a rank makes, by pieces where the plan cuts columns."""

    def __init__(self, plan: ChunkPlan, y_MN: torch.Tensor) -> None:
        self._plan, self._y = plan, y_MN
        self._low, self._high = plan.own
        self._kept = self._high - self._low

    def fill(self, product: Product, panel: Panel | None) -> Callable[[Block], None]:
        """What makes a block: `product`, or `panel` where the plan is of columns; `UserError` where that is missing."""
        if not self._plan.columns:
            return by_rows(product)
        if panel is None:
            raise UserError("a plan of columns without `panel`", expected="what makes some rows and columns")
        return lambda block: panel(block.low, block.high, block.left, block.right, self.block(block))

    def block(self, block: Block) -> torch.Tensor:
        """What one product of a plan of columns makes."""
        if block.low == self._low and block.right - block.left == self._plan.columns and block.high == self._high:
            return self._y.narrow(0, 0, self._kept)
        return self._panel(block.low, block.high, block.left, block.right)

    def made(self, piece: Piece) -> torch.Tensor:
        """A piece of the product; another rank's is one piece of memory."""
        if not piece.right:
            return self._y.narrow(0, piece.low, piece.high - piece.low)
        if piece.owner == self._plan.rank:
            return self._y[: self._kept, piece.left : piece.right]
        return self._panel(piece.low, piece.high, piece.left, piece.right)

    def landed(self, landing: torch.Tensor, piece: Piece) -> torch.Tensor:
        """An own piece in `landing`, contiguous [own rows, columns], as another rank sends it: one piece of memory."""
        if not piece.right:
            return landing.narrow(0, piece.low - self._low, piece.high - piece.low)
        width = piece.right - piece.left
        start = int(landing.storage_offset()) + self._kept * piece.left
        return landing.as_strided((self._kept, width), (width, 1), start)

    def summed(self, out: torch.Tensor, piece: Piece) -> torch.Tensor:
        """An own piece in the sum, [own rows, columns]."""
        if not piece.right:
            return out.narrow(0, piece.low - self._low, piece.high - piece.low)
        return out.narrow(1, piece.left, piece.right - piece.left)

    def _panel(self, low: int, high: int, left: int, right: int) -> torch.Tensor:
        """Other ranks' rows, which stand one below the other without the own ones."""
        width, rows = right - left, self._plan.rows - self._kept
        above = low if low < self._low else low - self._kept
        start = self._kept * self._plan.columns + rows * left + above * width
        return self._y.as_strided((high - low, width), (width, 1), int(self._y.storage_offset()) + start)


def by_rows(product: Product) -> Callable[[Block | Piece], None]:
    """What makes the rows of a block, or of a piece."""
    return lambda rows: product(rows.low, rows.high)
