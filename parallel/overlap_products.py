"""A product as the overlap engines ask for it: some rows into a matrix, or some rows and columns into a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from ..comms.placement import Panel, Product


def rows_of(a_MK: Tensor, b_KN: Tensor, y_MN: Tensor) -> Product:
    """Fill rows of `y` with those of a @ b."""

    def product(low: int, high: int) -> None:
        torch.mm(a_MK[low:high], b_KN, out=y_MN[low:high])  # half the time of `narrow`, which a GPU may wait for

    return product


def panel_of(a_MK: Tensor, b_KN: Tensor) -> Panel:
    """Fill a tensor with some rows and columns of a @ b."""
    rows = dict[int, Tensor]()  # pieces of columns want the same ones again, and a view costs the host its time

    def panel(low: int, high: int, left: int, right: int, out: Tensor) -> None:
        if low not in rows or rows[low].shape[0] != high - low:
            rows[low] = a_MK.narrow(0, low, high - low)
        torch.mm(rows[low], b_KN.narrow(1, left, right - left), out=out)

    return panel
