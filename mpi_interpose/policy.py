"""From measured cells to the table that the preload decides by, and how good that table's choices are.

A row says what a call took without us and with us at one point (see csrc/core/policy.hh, which also answers between
the points; Python asks that same code). Pass-through is the default: a row shows a gain only where the lower end of
its 95 % interval does. For a message there are four ways (neither side, the send, the receive, both); the fastest
becomes the choice, fewer sides where the difference is small, and its rows say so for either side.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from . import core
from .samples import Cell

GAIN = 1.08  # kGain of csrc/abi/model.hh
OWN, SHIPPED = 1.04, 1.08  # least lower bound of a gain: in a table for this machine, in one for every machine
FEWER_SIDES = 1.03
USES = ("pack", "unpack", "send_local", "recv_local", "send_remote", "recv_remote", "send_socket", "recv_socket")
LINKS = {"socket": "the same socket", "local": "the same host", "remote": "another host"}  # places of a peer
CLASSES = ("contiguous", "strided", "crossed", "table", "mixed", "records")
WAYS = {"library": (False, False), "send": (True, False), "recv": (False, True), "both": (True, True)}


@dataclass(frozen=True)
class Row:
    """One point of the table; times in ns, `share` of the saving that this side of a message calls its own.

    `leaf`: bytes of a basic element, 0 where that is not known.
    """

    use: str
    cls: str
    block: int
    step: int
    size: int
    without_ns: float
    with_ns: float
    share: float = 1.0
    leaf: int = 0

    @property
    def ratio(self) -> float:
        return self.without_ns / self.with_ns

    def text(self) -> str:
        times = f"{self.without_ns:.0f} {self.with_ns:.0f} {self.share:g}"
        return f"{self.use} {self.cls} {self.block} {self.step} {self.size} {times}" + (
            f" {self.leaf}" if self.leaf else ""
        )


def _row(cell: Cell, use: str, without: str, with_: str, least: float, share: float = 1.0) -> Row:
    """The row of `use`; its gain is cut to 1 where it is not clear."""
    gain = min(cell.ratio(with_, without).low, cell.ratio(with_, "again").low if without == "library" else 1e9)
    before = cell.library_ns() if without == "library" else cell.median_ns(without)
    after = cell.median_ns(with_)
    if gain < least:
        after = max(after, before)
    return Row(use, cell.cls, cell.block, cell.step, cell.size, max(1.0, before), max(1.0, after), share, cell.leaf)


def best_way(cell: Cell, least: float) -> str:
    """The way of a message that a table should choose: the fastest of those clearly faster, else 'library'."""
    gains = {way: min(cell.ratio(way).low, cell.ratio(way, "again").low) for way in WAYS if way != "library"}
    clear = [way for way, gain in gains.items() if gain >= least]
    if not clear:
        return "library"
    fastest = min(cell.median_ns(way) for way in clear)
    return min(
        (way for way in clear if cell.median_ns(way) <= FEWER_SIDES * fastest),
        key=lambda way: (sum(WAYS[way]), cell.median_ns(way)),
    )


def rows(cells: Iterable[Cell], least: float = OWN, peer: str | None = None, *, held: bool = False) -> list[Row]:
    """The table's rows of the cells that are to be fitted, and with `held` of those kept from it, too.

    `peer`: another of LINKS than the cells' own.
    """
    found = []
    for cell in cells:
        if (cell.held and not held) or cell.use.startswith("call"):
            continue
        if cell.use != "message":
            found.append(_row(cell, cell.use, "library", "forced", least))
            continue
        if cell.cls == "contiguous":
            continue  # nothing to pack: messages of one dense block are the library's
        way = best_way(cell, least)
        sides = WAYS[way]
        link = peer or cell.link
        for k, use in enumerate((f"send_{link}", f"recv_{link}")):
            if sides[k]:
                found.append(_row(cell, use, "library", way, least, 1 / sum(sides)))
                continue
            other = tuple(side or i == k for i, side in enumerate(sides))
            without, with_ = cell.median_ns(way), cell.median_ns(next(w for w, s in WAYS.items() if s == other))
            place = (cell.cls, cell.block, cell.step, cell.size)
            found.append(Row(use, *place, max(1.0, without), max(1.0, without, with_), leaf=cell.leaf))
    return found


def least_gains(tables: Sequence[list[Row]]) -> list[Row]:
    """One table for several runs or machines: of each point the row with the least gain; points that one lacks go."""
    keyed = [_by_point(table) for table in tables]
    shared = [key for key in keyed[0] if all(key in table for table in keyed)]
    return [_least([table[key] for table in keyed]) for key in shared]


def _least(rows_: Sequence[Row]) -> Row:
    """The row with the least gain. None is left where one run takes a side of a message alone and another both: one
    side may lose where both win (csrc/core/policy.hh has the same rule)."""
    least = min(rows_, key=lambda row: row.ratio)
    if len({row.share for row in rows_}) > 1:
        return replace(least, with_ns=max(least.with_ns, least.without_ns))
    return least


def _by_point(table: list[Row]) -> dict[tuple, Row]:
    """The rows by their points; where two datatypes are the same point, the row with the less gain."""
    found: dict[tuple, Row] = {}
    for row in table:
        point = (row.use, row.cls, row.block, row.step, row.size, row.leaf)
        if point not in found or row.ratio < found[point].ratio:
            found[point] = row
    return found


def text(rows_: Iterable[Row], facts: Sequence[str]) -> str:
    """The table's file: facts as comments, then rows."""
    head = [f"# {line}" for line in (*facts, "use class block step bytes without_ns with_ns share leaf; see policy.hh")]
    return "\n".join([*head, *(row.text() for row in sorted(rows_, key=_order))]) + "\n"


def sections(tables: dict[str, list[Row]], facts: Sequence[str]) -> str:
    """One file of several tables, each for a library's major version and perhaps a kind of processor, '4 on amd-avx512'
    (see csrc/core/policy.hh, which says what counts where none fits)."""
    parts = [f"for {whom}\n" + text(found, []).partition("\n")[2] for whom, found in tables.items()]
    return text([], facts) + "".join(parts)


def read_sections(text_: str) -> tuple[dict[str, list[Row]], list[str]]:
    """(rows by whom they are for, facts) of what `sections` wrote."""
    tables: dict[str, list[Row]] = {}
    facts = [line[2:] for line in text_.splitlines() if line.startswith("# ") and not line.startswith("# use ")]
    for line in text_.splitlines():
        words = line.split()
        if line.startswith("for "):
            tables[line.removeprefix("for ").strip()] = []
        elif words and not line.startswith("#"):
            block, step, size = map(int, words[2:5])
            without, with_, share, *leaf = map(float, words[5:])
            row = Row(words[0], words[1], block, step, size, without, with_, share, int(*leaf))
            tables[list(tables)[-1]].append(row)
    return tables, facts


def _order(row: Row) -> tuple:
    return USES.index(row.use), row.cls, row.block, row.step, row.size, row.leaf


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
