"""One attention problem over P ranks, and its schedules by name. Pure: no tensor, no process group, no clock.

A `Problem` is what all ranks must agree on: lengths, heads, mask, layout. From it follow each rank's spans, the
rectangle of rows that each pair of ranks needs, and with a name the whole `Schedule`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from ...comms.actions import ITEM_BYTES
from ...comms.builders.attention import attention
from ...comms.builders.attention_named import BOOKENDED, HALVES, JOINED, SCHEDULES, best_routes, moves_of
from ...comms.builders.attention_shape import Heads, Need, Run, Shape
from ...comms.builders.attention_totals import Totals
from ...comms.builders.routes import Route
from ...comms.schedule import Schedule
from ...dist.errors import UserError
from ..masks import Mask, Tile, tiles
from ..partition import Span, rows_of, shards

MOST_RUNS = 4  # of a shard that a team brings into the order of the sequence: each is a slice of every message


@dataclass(frozen=True)
class Problem:
    """Global sizes: `lq` queries and `lk` keys over `world` ranks in `layout`; `dtype` by torch's name."""

    world: int
    lq: int
    lk: int
    heads: Heads
    mask: Mask = Mask()
    layout: str = "zigzag"
    node: int = 0  # ranks per node for two-level schedules; 0: the divisor of world nearest to its root

    def __post_init__(self) -> None:
        h = self.heads
        if h.q_heads % h.kv_heads:
            raise UserError(
                f"{h.q_heads} query heads over {h.kv_heads} key heads",
                expected="a whole ratio: each key head serves as many query heads",
            )
        self.mask.documents(self.lq, self.lk)

    @cached_property
    def q_spans(self) -> tuple[tuple[Span, ...], ...]:
        return shards(self.lq, self.world, self.layout, self.mask.cu_seqlens_q)

    @cached_property
    def k_spans(self) -> tuple[tuple[Span, ...], ...]:
        return shards(self.lk, self.world, self.layout, self.mask.cu_seqlens_k or self.mask.cu_seqlens_q)

    def tiles(self, q: int, k: int, inner: int, q_rows: tuple[int, int], k_rows: tuple[int, int]) -> tuple[Tile, ...]:
        """Kernel calls of rows `q_rows` of query team q against rows `k_rows` of key team k, counted from there."""
        return tiles(*self.rows(q, k, inner, q_rows, k_rows), self.mask, self.lq, self.lk)

    def rows(
        self, q: int, k: int, inner: int, q_rows: tuple[int, int], k_rows: tuple[int, int]
    ) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
        """Which positions those rows of query team q and key team k are."""
        return _rows(self.team(self.q_spans, q, inner), *q_rows), _rows(self.team(self.k_spans, k, inner), *k_rows)

    def team(self, spans: Sequence[tuple[Span, ...]], team: int, inner: int) -> tuple[Span, ...]:
        """The positions of a team's rows, in the order in which its blocks are computed."""
        if self.dealt(inner):
            return tuple(span for span in (Span(0, sum(map(rows_of, spans))),) if span.count)
        return _ordered(tuple(spans[team * inner : (team + 1) * inner]))[0]

    def dealt(self, inner: int) -> bool:
        """Is every `inner`-th token one rank's, and all tokens the team's? Their rows lie one rank after the other, but
        blocks are computed in the order of the sequence, where they are one kernel call."""
        return self.layout == "striped" and inner == self.world > 1

    @property
    def area(self) -> int:
        """Visible (query, key) pairs."""
        whole = tuple(Span(0, n) if n else Span(0, 0) for n in (self.lq, self.lk))
        return sum(t.area for t in tiles(whole[:1], whole[1:], self.mask, self.lq, self.lk))

    def inner(self, name: str) -> int:
        """How many ranks exchange heads in the schedule called `name`."""
        if name == "ulysses":
            return self.world
        if name in ("ulysses_ring", "ulysses_token"):
            fitting = [u for u in range(2, self.world) if self.world % u == 0 and self._exchangeable(u)]
            return max(fitting, default=self.world)
        return 1

    def _exchangeable(self, inner: int) -> bool:
        return self.heads.q_heads % math.lcm(self.heads.kv_heads, inner) == 0

    def possible(self, name: str) -> str:
        """'' or why this problem has no such schedule."""
        inner = self.inner(name)
        if not self._exchangeable(inner):
            return f"{self.heads.q_heads} query and {self.heads.kv_heads} key heads cannot be dealt to {inner} ranks"
        if name in ("ulysses_ring", "ulysses_token") and inner in (1, self.world):
            return f"{self.world} ranks have no divisor that deals the heads evenly"
        if name in JOINED and self.world < 3:
            return "one arrival has no other to be joined with"
        return ""

    def kv_copies(self, name: str) -> int:
        """How often a key head must be repeated before heads are exchanged; 1 wherever it can be."""
        return math.lcm(self.heads.kv_heads, self.inner(name)) // self.heads.kv_heads

    def schedule(self, name: str, *, backward: bool = False, goals: bool = True) -> Schedule:
        """The schedule called `name`; remembered. `UserError` for a name or a combination that does not exist.

        Without `goals` it is made faster, but only for planning: it cannot be checked, nor compared with one that has.
        """
        return _build(self, name, backward, goals)

    def totals(self, name: str, *, backward: bool = False) -> list[Totals]:
        """What each rank sends and computes in the schedule called `name`, without building it."""
        return _plan(self, name, backward)[1]


@lru_cache(maxsize=256)
def _build(problem: Problem, name: str, backward: bool, goals: bool) -> Schedule:
    routes = _plan(problem, name, backward)[0]
    return attention(
        name,
        shape_of(problem, name),
        routes,
        moves=moves_of(name),
        backward=backward,
        bookends=name in BOOKENDED,
        goals=goals,
    )


@lru_cache(maxsize=1024)
def _plan(problem: Problem, name: str, backward: bool) -> tuple[list[Route], list[Totals]]:
    """The routes whose busiest rank sends least, and the totals of each rank."""
    if name not in SCHEDULES:
        raise UserError(f"schedule {name!r}", expected=f"'auto' or one of {', '.join(SCHEDULES)}")
    if reason := problem.possible(name):
        raise UserError(
            f"schedule '{name}' on {problem.world} ranks: {reason}",
            expected="query heads that the ranks which exchange them divide (key heads are repeated where they must)",
            remedy="choose ring_kv, or schedule='auto', or a number of ranks that divides the heads",
        )
    shape = shape_of(problem, name)
    return best_routes(name, shape, causal=problem.mask.causal, backward=backward, node=problem.node)


def shape_of(problem: Problem, name: str) -> Shape:
    """The rows, heads and needs of the schedule called `name`."""
    joined = JOINED.get(name, (1, 1))
    return _shape_of_teams(problem, problem.inner(name), problem.kv_copies(name), HALVES.get(name, ""), joined)


@lru_cache(maxsize=256)
def _shape_of_teams(problem: Problem, inner: int, copies: int, halves: str, joined: tuple[int, int]) -> Shape:
    size, h = problem.world // inner, problem.heads
    needs = {(i, j): found for i in range(size) for j in range(size) if (found := _needs(problem, inner, i, j, halves))}
    return Shape(
        tuple(map(rows_of, problem.q_spans)),
        tuple(map(rows_of, problem.k_spans)),
        replace(
            h,
            kv_heads=h.kv_heads * copies,
            wire=h.wire
            or ("" if copies > 1 else _lossless(problem, inner, needs)),  # copies' gradients are summed last
            result=h.result or (h.dtype if inner == 1 else ""),
        ),
        needs,
        inner,
        joined,
        *(
            tuple(run for t in range(size) for run in _ordered(tuple(spans[t * inner : (t + 1) * inner]))[1])
            for spans in ((problem.q_spans, problem.k_spans) if inner > 1 else ())
        ),
    )


def _lossless(problem: Problem, inner: int, needs: Mapping[tuple[int, int], tuple[Need, ...]]) -> str:
    """The narrowest dtype that keeps all bits of every block's results; '' for that of the sums.

    A kernel rounds to the dtype of its inputs. Where each block is one kernel call, its results are that already.
    """
    if ITEM_BYTES[problem.heads.dtype] >= ITEM_BYTES[problem.heads.partial]:
        return ""
    calls = (
        len(problem.tiles(i, j, inner, (n.q0, n.q1), (n.k0, n.k1))) for (i, j), found in needs.items() for n in found
    )
    return problem.heads.dtype if all(count <= 1 for count in calls) else ""


def _needs(problem: Problem, inner: int, i: int, j: int, halves: str) -> tuple[Need, ...]:
    """What query team i needs of key team j; the pair (i, i) always covers all rows."""
    q_rows, k_rows = rows_of(problem.team(problem.q_spans, i, inner)), rows_of(problem.team(problem.k_spans, j, inner))
    whole = problem.tiles(i, j, inner, (0, q_rows), (0, k_rows))
    low, high = (min((t.k0 for t in whole), default=0), max((t.k1 for t in whole), default=0))
    if i == j:
        low, high = 0, k_rows
    edges = [low, high]
    if high - low > 1 and (halves == "all" or (halves == "local" and i == j)):
        edges = [low, (low + high) // 2, high]
    found = []
    for k0, k1 in zip(edges, edges[1:]):
        part = problem.tiles(i, j, inner, (0, q_rows), (k0, k1)) if len(edges) > 2 else whole
        q0, q1 = min((t.q0 for t in part), default=0), max((t.q1 for t in part), default=0)
        if i == j:
            q0, q1 = 0, q_rows
        if i == j or part:
            found.append(Need(q0, q1, k0, k1, sum(t.area for t in part)))
        elif halves == "all":
            found.append(Need(0, 0, k0, k1, 0))
    return tuple(found)


@lru_cache(maxsize=1024)
def _ordered(members: tuple[tuple[Span, ...], ...]) -> tuple[tuple[Span, ...], tuple[tuple[Run, ...], ...]]:
    """The spans of ranks that exchange heads, and where the rows of each lie among them: in the order of the sequence,
    where neighbouring spans become one, or, if a rank has many or its tokens are apart, one rank after the other."""
    found = [
        (span, rank, row)
        for rank, mine in enumerate(members)
        for span, row in zip(mine, _first_rows(mine))
        if span.count
    ]
    sorts = all(len(m) <= MOST_RUNS and all(s.stride == 1 for s in m) for m in members) and len(members) > 1
    spans, runs, at = list[Span](), [list[Run]() for _ in members], 0
    for span, rank, row in sorted(found, key=lambda item: item[0].start) if sorts else found:
        if sorts and spans and spans[-1].start + spans[-1].count == span.start:
            spans[-1] = Span(spans[-1].start, spans[-1].count + span.count)
        else:
            spans.append(span)
        runs[rank].append(Run(row, row + span.count, at))
        at += span.count
    return tuple(spans), tuple(tuple(_joined(sorted(mine, key=lambda run: run.start))) for mine in runs)


def _first_rows(spans: Sequence[Span]) -> list[int]:
    return [sum(span.count for span in spans[:at]) for at in range(len(spans))]


def _joined(runs: Sequence[Run]) -> list[Run]:
    """Runs that follow each other in the rank and in the team are one; empty ones are none."""
    found = list[Run]()
    for run in runs:
        if found and (found[-1].stop, found[-1].end) == (run.start, run.at):
            found[-1] = Run(found[-1].start, run.stop, found[-1].at)
        elif run.stop > run.start:
            found.append(run)
    return found


def _rows(spans: Sequence[Span], start: int, stop: int) -> tuple[Span, ...]:
    """Rows `start` ≤ r < `stop` of a shard, as spans."""
    found, row = [], 0
    for span in spans:
        a, b = max(start - row, 0), min(stop - row, span.count)
        if a < b:
            found.append(Span(span.start + a * span.stride, b - a, span.stride))
        row += span.count
    return tuple(found)
