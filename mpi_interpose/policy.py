"""From measured cells to the table that the preload decides by, and how good that table's choices are.

A row (table.py) says what a call took without us and with us at one point; csrc/core/policy.hh answers between the
points, and Python asks that same code. Pass-through is the default: a row shows a gain only where it is clear at 95 %.
For a message there are four ways (ways.py), and the rows of its two sides make one of them the choice.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from . import core, ways
from .samples import Cell
from .table import CLASSES, LINKS, USES, Row, read_sections, sections, text
from .ways import WAYS, Message, Point

__all__ = ["CLASSES", "LINKS", "USES", "WAYS", "Row", "read_sections", "sections", "text"]

GAIN = 1.04  # kGain of csrc/abi/model.hh
OWN, SHIPPED, SHIPPED_LARGE = 1.04, 1.08, 1.25  # least clear gains
LARGE = 1 << 18  # bytes; from here on a machine's memory and the way between its cores set the pace
Least = Callable[[int], float]  # of so many bytes


def own(_nbytes: int) -> float:
    """The least clear gain that counts in a table for this machine."""
    return OWN


def shipped(nbytes: int) -> float:
    """The one in a table for every machine of a kind."""
    return SHIPPED_LARGE if nbytes >= 0.95 * LARGE else SHIPPED


def _row(cell: Cell, least: Least) -> Row:
    """The row of a pack or unpack; its gain is cut to 1 where it is not clear."""
    before, after = cell.library_ns(), cell.median_ns("forced")
    if cell.clear_gain("forced") < least(cell.size):
        after = max(after, before)
    return Row(cell.use, cell.cls, cell.block, cell.step, cell.size, max(1.0, before), max(1.0, after), leaf=cell.leaf)


def known(
    cells: Iterable[Cell], least: Least = own, peer: str | None = None, *, held: bool = False
) -> list[Row | Message]:
    """What the cells that are to be fitted say, and with `held` those kept from it, too.

    `peer`: another of LINKS than the cells' own. Messages of one dense block are the library's.
    """
    return [
        (_row(cell, least) if cell.use != "message" else ways.measured(cell, least(cell.size), peer or cell.link))
        for cell in cells
        if (held or not cell.held)
        and not cell.use.startswith("call")
        and not (cell.use == "message" and cell.cls == "contiguous")
    ]


def rows(cells: Iterable[Cell], least: Least = own, peer: str | None = None) -> list[Row]:
    """The table's rows of the cells that are to be fitted."""
    found = known(cells, least, peer)
    return [row for item in found for row in (ways.merged([item]) if isinstance(item, Message) else [item])]


def at_least(table: Iterable[Row], least: Least) -> list[Row]:
    """A table's rows without the gains that are less; of a message neither side is taken then."""
    return [
        row if row.ratio >= least(row.size) else replace(row, with_ns=max(row.with_ns, row.without_ns)) for row in table
    ]


def least_gains(runs: Sequence[Sequence[Row | Message]]) -> list[Row]:
    """One table for several runs, tables or machines: of each point the row with the least gain, of each message the
    way that all know to gain; points that one lacks go, but for a run of messages alone, or of packs and unpacks."""
    local = [found for found in map(_by_point, runs) if found]
    shared = [key for key in local[0] if all(key in table for table in local)] if local else []
    return [min((table[key] for table in local), key=lambda row: row.ratio) for key in shared] + _messages(runs)


def _by_point(run: Sequence[Row | Message]) -> dict[tuple, Row]:
    """Packs and unpacks by their points; where two datatypes are the same point, the row with the less gain."""
    found: dict[tuple, Row] = {}
    for row in run:
        if not isinstance(row, Row) or row.use not in ("pack", "unpack"):
            continue
        point = (row.use, row.cls, row.block, row.step, row.size, row.leaf)
        if point not in found or row.ratio < found[point].ratio:
            found[point] = row
    return found


def _messages(runs: Sequence[Sequence[Row | Message]]) -> list[Row]:
    """The rows of the messages at all points that each run has."""
    found = [messages for messages in map(_messages_by_point, runs) if messages]
    shared = [point for point in found[0] if all(point in run for run in found)] if found else []
    return [row for point in shared for row in ways.merged([message for run in found for message in run[point]])]


def _messages_by_point(run: Sequence[Row | Message]) -> dict[Point, list[Message]]:
    found: dict[Point, list[Message]] = {}
    sends: dict[Point, Row] = {}
    for item in run:
        if isinstance(item, Message):
            found.setdefault(item.point, []).append(item)
            continue
        side, _, link = item.use.partition("_")
        point = (link, item.cls, item.block, item.step, item.size, item.leaf)
        if side == "send":
            sends[point] = item
        elif side == "recv" and point in sends:
            found.setdefault(point, []).append(ways.written(sends.pop(point), item))
    return found


class Policy:
    """A table as the preload reads it; `version`: what the library says of itself, which picks its rows, as does the
    kind of `processor` (default: this machine's)."""

    def __init__(self, table: str, version: str = "", processor: str | None = None) -> None:
        self._lib = core.load()
        make, free, ratio = (getattr(self._lib, f"undertow_core_policy{end}") for end in ("", "_free", "_ratio"))
        number, handle = ctypes.c_double, ctypes.c_void_p
        make.restype, make.argtypes = handle, [*[ctypes.c_char_p] * 3, ctypes.POINTER(ctypes.c_int)]
        free.restype, free.argtypes = None, [handle]
        ratio.restype = number
        ratio.argtypes = [handle, ctypes.c_int, ctypes.c_int, number, number, number, number, ctypes.POINTER(number)]
        self._free, self._ratio, rows = free, ratio, ctypes.c_int()
        words = (table, version, processor or core.processor())
        self._table = make(*(word.encode() for word in words), ctypes.byref(rows))
        self.rows = rows.value

    def __del__(self) -> None:
        if getattr(self, "_table", None):
            self._free(self._table)

    def ask(self, use: str, cls: str, block: int, step: int, size: int, leaf: int = 0) -> tuple[float, float]:
        """(gain, ns saved per call); (0, 0) where nothing near was measured. `leaf` 0: of elements of any size."""
        saved = ctypes.c_double()
        place = (block, step, size, leaf)
        gain = self._ratio(self._table, USES.index(use), CLASSES.index(cls), *place, ctypes.byref(saved))
        return gain, saved.value

    def takes(self, use: str, cell: Cell) -> bool:
        if cell.cls == "contiguous" and cell.use == "message":
            return False
        return self.ask(use, cell.cls, cell.block, cell.step, cell.size, cell.leaf)[0] >= GAIN

    def way(self, cell: Cell) -> str:
        """The arm of the cell that the table chooses."""
        if cell.use != "message":
            return "forced" if self.takes(cell.use, cell) else "library"
        sides = (self.takes(f"send_{cell.link}", cell), self.takes(f"recv_{cell.link}", cell))
        return next(way for way, s in WAYS.items() if s == sides)


@dataclass(frozen=True)
class Verdict:
    """A table's choice in one cell against the best that was measured there."""

    cell: Cell
    chosen: str
    best: str
    regret: float  # time of the choice / least time - 1

    @property
    def right(self) -> bool:
        """The choice is the best one, or within 2 % of it, or not to be told apart from it at 95 %."""
        return self.regret <= 0.02 or self.cell.ratio(self.best, self.chosen).low <= 1


def judge(cells: Iterable[Cell], policy: Policy) -> list[Verdict]:
    """A verdict for every cell with a choice."""
    verdicts = []
    for cell in cells:
        if cell.use.startswith("call"):
            continue
        ways = list(WAYS) if cell.use == "message" else ["library", "forced"]
        times = {way: cell.library_ns() if way == "library" else cell.median_ns(way) for way in ways}
        chosen, best = policy.way(cell), min(times, key=lambda way: times[way])
        verdicts.append(Verdict(cell, chosen, best, times[chosen] / times[best] - 1))
    return verdicts


def summary(verdicts: Sequence[Verdict]) -> str:
    """'n cells: right in x %, mean regret y %, worst z'."""
    if not verdicts:
        return "no cells"
    right = mean(v.right for v in verdicts)
    worst = max(verdicts, key=lambda v: v.regret)
    return (
        f"{len(verdicts)} cells: right in {right:.1%}, mean regret {mean(v.regret for v in verdicts):.2%}, "
        f"worst {worst.regret:.0%} ({worst.cell.title}: {worst.chosen} instead of {worst.best})"
    )
