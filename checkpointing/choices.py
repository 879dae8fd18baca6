"""Rank 0 chooses a generation of memory for each save, and the others hear which."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ..dist.errors import PeerLost
from .coordinate import Coordinator

T = TypeVar("T")
AHEAD = 16  # words that stay, two of a save at most: ranks are never so many saves apart, and older ones are deleted
LATE_S = 60.0  # whoever has waited so long makes it none for all: a late choice costs one save


@dataclass(frozen=True)
class StateFirst:
    """Rank 0's word where it cannot choose yet: all ranks read the state, and ask again. `anew`: what there was to
    choose from is lost, so make it anew before."""

    anew: bool = False


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
        self,
        name: str,
        mine: T | StateFirst | None,
        *,
        undo: Callable[[T], None],
        but: Callable[[], bool] | None = None,
        patience_s: float | None = None,
    ) -> T | StateFirst | None:
        """Rank 0's choice `mine` on all ranks, under one `name`; None where there is none or it came too late. `undo`
        is called with a choice that does not hold. `PeerLost` with the reason that a rank has given for it instead, as
        it is after `patience_s`, where that is said. None on another rank as soon as `but` is true."""
        late = f"rank {self._coordinator.rank} waited {patience_s:g} s in vain for rank 0" if patience_s else None
        chosen = self._coordinator.lead(name, mine, otherwise=late, timeout_s=patience_s or LATE_S, but=but)
        if mine is not None and mine != chosen and not isinstance(mine, StateFirst):
            undo(mine)
        if self._coordinator.rank == 0:
            self._said.append(name)
        if isinstance(chosen, str):
            raise PeerLost(chosen)
        return chosen
