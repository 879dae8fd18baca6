"""What an attention builder is told: how many rows each rank has, how long a row is, and who needs what of whom.

Masks are not known here: `needs` says which rectangle of rows each (query team, key team) block takes, and how many
pairs of it the mask shows. A team is `inner` neighbouring ranks that exchange heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...dist.errors import UserError
from .running import Field

INPUTS = (("q", "k", "v"), ("q", "k", "v", "dout", "lse", "delta"))  # forward, backward
RESULTS = ((("out", "lse"),), (("dq",), ("dk", "dv")))
OF_QUERIES = ("q", "dout", "lse", "delta", "out", "dq")


@dataclass(frozen=True)
class Need:
    """Rows q0:q1 of a query team against rows k0:k1 of a key team; `area` counts the pairs that the mask shows."""

    q0: int
    q1: int
    k0: int
    k1: int
    area: int


@dataclass(frozen=True)
class Run:
    """Rows start:stop of a rank that are one run in its team, from row `at` on."""

    start: int
    stop: int
    at: int

    @property
    def end(self) -> int:
        return self.at + self.stop - self.start


@dataclass(frozen=True)
class Heads:
    """Sizes of one row: `batch` × `q_heads` × `head_dim` of q, `kv_heads` of k, `v_dim` of v. `partial`: the dtype
    that partial results are summed in; `wire`: the one that they are computed and sent in ('' for the same); `result`:
    the one that the last sum of each row is rounded to ('' for the same), where no heads are exchanged."""

    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    dtype: str = "float32"
    partial: str = "float32"
    wire: str = ""
    result: str = ""


@dataclass(frozen=True)
class Shape:
    """Rows of each rank, and the needs of each (query team, key team). A team is `inner` neighbouring ranks. `joined`:
    how many arrivals may be one kernel call, forward and backward (see `attention_block`). `q_order`, `kv_order`: where
    each rank's rows lie among its team's; without them, the ranks' rows one after the other."""

    q_rows: tuple[int, ...]
    kv_rows: tuple[int, ...]
    heads: Heads
    needs: Mapping[tuple[int, int], tuple[Need, ...]]
    inner: int = 1
    joined: tuple[int, int] = (1, 1)
    q_order: tuple[tuple[Run, ...], ...] = ()
    kv_order: tuple[tuple[Run, ...], ...] = ()

    def __post_init__(self) -> None:
        if len(self.q_rows) % self.inner or self.heads.q_heads % self.inner or self.heads.kv_heads % self.inner:
            raise UserError(
                f"{self.heads.q_heads} query and {self.heads.kv_heads} key heads exchanged among {self.inner} of "
                f"{len(self.q_rows)} ranks",
                expected="all three divisible by the number of ranks that exchange heads",
            )

    def rows(self, name: str, rank: int) -> int:
        return (self.q_rows if name in OF_QUERIES else self.kv_rows)[rank]

    def field(self, name: str, share: int = 1) -> Field:
        """Name, shape of a row and dtype, with one of `share` shares of the heads."""
        h = self.heads
        heads = (h.q_heads if name in OF_QUERIES else h.kv_heads) // share
        width = {"lse": [], "delta": []}.get(name, [h.v_dim if name in ("v", "dv", "out", "dout") else h.head_dim])
        exact = "float64" if h.dtype == "float64" else "float32"
        dtype = {"lse": exact, "delta": exact}.get(name, h.dtype if name in ("q", "k", "v", "dout") else h.partial)
        return name, [h.batch, heads, *width], dtype

    def part(self, name: str, share: int = 1) -> Field:
        """The same for a block's contribution to a result, before it is summed."""
        _, row, dtype = self.field(name, share)
        return name, row, self.heads.wire if self.heads.wire and name != "lse" else dtype

    def whole(self, name: str) -> Field:
        """The same for a result when all has been summed."""
        _, row, dtype = self.field(name)
        return name, row, self.heads.result if self.heads.result and name != "lse" else dtype

    def team_rows(self, name: str, team: int) -> int:
        return sum(self.rows(name, team * self.inner + member) for member in range(self.inner))

    def runs(self, name: str, rank: int) -> tuple[Run, ...]:
        """Where the rows of `rank` lie in its team, in the order of its rows."""
        if order := self.q_order if name in OF_QUERIES else self.kv_order:
            return order[rank]
        first = rank - rank % self.inner
        rows = self.rows(name, rank)
        return (Run(0, rows, sum(self.rows(name, member) for member in range(first, rank))),) if rows else ()
