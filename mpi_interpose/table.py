"""The table's rows and its file: what a call took without us and with us, at points of a small space.

The preload reads the same text (csrc/core/policy.hh, which also says what counts between the points).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

USES = ("pack", "unpack", "send_local", "recv_local", "send_remote", "recv_remote", "send_socket", "recv_socket")
LINKS = {"socket": "the same socket", "local": "the same host", "remote": "another host"}  # places of a peer
CLASSES = ("contiguous", "strided", "crossed", "table", "mixed", "records")


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


def text(rows_: Iterable[Row], facts: Sequence[str]) -> str:
    """The table's file: facts as comments, then rows."""
    head = [f"# {line}" for line in (*facts, "use class block step bytes without_ns with_ns share leaf; see policy.hh")]
    return "\n".join([*head, *(row.text() for row in sorted(rows_, key=_order))]) + "\n"


def sections(tables: dict[str, list[Row]], facts: Sequence[str]) -> str:
    """One file of several tables, each for a library's major version and perhaps a kind of processor, such as
    '4 on amd-26-avx512' (see csrc/core/policy.hh, which says what counts where none fits)."""
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
