"""The four ways of a message (neither side packed, the send, the receive, both), and which of them a table chooses.

One run knows the times of all four; a table that was written knows of each point the way that it took, and what the
other side would have added. Several runs, or several datatypes at one point, agree on the way whose least gain is the
greatest: one side alone may lose where both win, so a way counts only where each of them knows that it gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .samples import Cell
from .table import Row

FEWER_SIDES = 1.03  # a way with fewer sides may take so much longer than the fastest
WAYS = {"library": (False, False), "send": (True, False), "recv": (False, True), "both": (True, True)}
SIDES = ("send", "recv")
Point = tuple[str, str, int, int, int, int]  # link, class, block, step, bytes, leaf


@dataclass(frozen=True)
class Message:
    """What is known of the messages at one point. `ns`: by way, the library's always; `clear`: ways sure to gain."""

    point: Point
    ns: dict[str, float]
    clear: frozenset[str]

    def gain(self, way: str) -> float:
        return self.ns["library"] / self.ns[way]

    def rows(self, way: str) -> list[Row]:
        """The rows of the send and the receive that make a table choose `way`."""
        link, cls, block, step, size, leaf = self.point
        sides, found = WAYS[way], []
        for k, side in enumerate(SIDES):
            place = (f"{side}_{link}", cls, block, step, size)
            if sides[k]:
                found.append(Row(*place, self.ns["library"], self.ns[way], 1 / sum(sides), leaf))
                continue
            wider = tuple(taken or i == k for i, taken in enumerate(sides))
            more = next(other for other, taken in WAYS.items() if taken == wider)
            found.append(Row(*place, self.ns[way], max(self.ns[way], self.ns.get(more, 0)), leaf=leaf))
        return found


def measured(cell: Cell, least: float, link: str) -> Message:
    """Of a cell; a way is clear where its gain is at least `least` for sure."""
    ns = {way: max(1.0, cell.library_ns() if way == "library" else cell.median_ns(way)) for way in WAYS}
    clear = frozenset(way for way in WAYS if way != "library" and cell.clear_gain(way) >= least)
    return Message((link, cell.cls, cell.block, cell.step, cell.size, cell.leaf), ns, clear)


def written(send: Row, recv: Row) -> Message:
    """Of the two rows of a table; rows that do not belong together, which older tables have, say nothing but a time."""
    point = (send.use.partition("_")[2], send.cls, send.block, send.step, send.size, send.leaf)
    gains = (send.ratio > 1, recv.ratio > 1)
    if send.share < 1 and recv.share < 1 and all(gains):
        least = min((send, recv), key=lambda row: row.ratio)
        return Message(point, {"library": least.without_ns, "both": least.with_ns}, frozenset({"both"}))
    if send.share == recv.share == 1 and any(gains) and not all(gains):
        way, taken, other = ("send", send, recv) if gains[0] else ("recv", recv, send)
        ns = {"library": taken.without_ns, way: taken.with_ns, "both": other.with_ns}
        return Message(point, ns, frozenset({way}))
    if send.share == recv.share == 1 and not any(gains):
        return Message(point, {"library": send.without_ns, "send": send.with_ns, "recv": recv.with_ns}, frozenset())
    return Message(point, {"library": send.without_ns}, frozenset())


def choose(messages: Sequence[Message]) -> str:
    """The way that a table should take: of those that each knows to gain, that of the greatest least gain."""
    least = {way: min(m.gain(way) for m in messages) for way in WAYS if all(way in m.clear for m in messages)}
    if not least:
        return "library"
    near = [way for way, gain in least.items() if FEWER_SIDES * gain >= max(least.values())]
    return min(near, key=lambda way: (sum(WAYS[way]), -least[way]))


def merged(messages: Sequence[Message]) -> list[Row]:
    """The two rows of one point: of the way that is chosen the least gains."""
    way = choose(messages)
    return [min(rows, key=lambda row: row.ratio) for rows in zip(*(m.rows(way) for m in messages), strict=True)]
