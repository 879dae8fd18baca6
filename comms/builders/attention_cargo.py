"""Which rows of what one rank owns come to another, along a route: what it needs, and what those behind it need.

Rows that nobody further on needs stay behind, which is the half-query saving of TokenRing's zigzag form.
"""

from __future__ import annotations

from collections.abc import Sequence

from .attention_shape import INPUTS, OF_QUERIES, Need, Shape
from .routes import Route


class Cargo:
    """What travels between `size` teams. `moves`: 'kv' or 'q'; with several routes, need i of a pair takes route i."""

    def __init__(self, shape: Shape, routes: Sequence[Route], moves: str, size: int, *, backward: bool) -> None:
        self.shape, self.routes, self.moves, self.size = shape, routes, moves, size
        self.payload = ("k", "v") if moves == "kv" else tuple(n for n in INPUTS[backward] if n in OF_QUERIES)
        self._found: dict[tuple[int, int, int], tuple[int, int] | None] = {}

    def needs(self, place: int, owner: int, part: int) -> list[tuple[int, int, Need]]:
        """(query team, key team, need) of the blocks that `place` computes once part `part` of `owner` is there."""
        pair = (place, owner) if self.moves == "kv" else (owner, place)
        needs = self.shape.needs.get(pair, ())
        return [(*pair, n) for n in (needs[part : part + 1] if len(self.routes) > 1 else needs) if n.area]

    def rows(self, owner: int, visitor: int, part: int) -> tuple[int, int] | None:
        """Rows of `owner` that come to `visitor`: what it needs, and what those need to whom it hands on."""
        key = owner, visitor, part
        if key not in self._found:
            self._found[key] = self._find(*key)
        return self._found[key]

    def _find(self, owner: int, visitor: int, part: int) -> tuple[int, int] | None:
        route = self.routes[part]
        if not route.narrow:
            rows = self.shape.team_rows(self.payload[0], owner)
            return (0, rows) if rows else None
        kv = self.moves == "kv"
        ends = [(n.k0, n.k1) if kv else (n.q0, n.q1) for _, _, n in self.needs(visitor, owner, part)]
        for other in range(self.size):
            if other not in (owner, visitor) and route.parent(owner, other) == visitor:
                ends += filter(None, [self.rows(owner, other, part)])
        return (min(a for a, _ in ends), max(b for _, b in ends)) if ends else None
