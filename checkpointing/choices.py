"""Rank 0 chooses a generation of memory for each save, and the others hear which."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeVar

from ..dist.errors import PeerLost
from .coordinate import Coordinator

T = TypeVar("T")
AHEAD = 8  # ranks are never that many saves apart: older words are deleted
LATE_S = 60.0  # whoever has waited so long makes it none for all: a late choice costs one save


class Choices:
    """The choices of one job. All ranks ask for each save alike."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._said: deque[str] = deque()

    def tidy(self) -> None:
        """Delete the words that all have heard; in a background thread, which the store may keep waiting."""
        while len(self._said) > AHEAD:
            self._coordinator.forget(self._said.popleft())

    def tell(
        self, name: str, mine: T | None, *, undo: Callable[[T], None], but: Callable[[], bool] | None = None
    ) -> T | None:
        """Rank 0's choice `mine` on all ranks, under one `name`; None where there is none or it came too late. `undo`
        is called with a choice that does not hold. `PeerLost` with the reason that a rank has given for it instead.
        None on another rank as soon as `but` is true."""
        chosen = self._coordinator.lead(name, mine, otherwise=None, timeout_s=LATE_S, but=but)
        if mine is not None and mine != chosen:
            undo(mine)
        if self._coordinator.rank == 0:
            self._said.append(name)
        if isinstance(chosen, str):
            raise PeerLost(chosen)
        return chosen
