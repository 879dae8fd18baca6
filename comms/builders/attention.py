"""Sequence-parallel attention, forward and backward, as one builder: what travels, and by which route, are arguments.

Each (query team, key team) block is computed at home or away. If keys and values travel, it is computed where the
queries are (Liu et al. 2023); if queries travel, where the keys are, and what the traveller's owner needs back ((out,
lse) or dQ, as in TokenRing; dK, dV otherwise) goes straight home. Rows that nobody further on needs stay behind, which
is the half-query saving of TokenRing's zigzag form. With `inner` > 1 heads are exchanged among `inner` neighbouring
ranks first (Jacobs et al. 2023), and routes run between such teams. `delta` = rowsum(dout * out) travels instead of
out. Masks are not known here: `needs` says which rectangle of rows each block takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...dist.errors import UserError
from ..actions import Slice
from ..schedule import Schedule
from ..terms import Content, applied, combined, cut, join, op_text, origin
from .draft import Draft
from .routes import Route
from .running import Field, Running

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
class Heads:
    """Sizes of one row: `batch` × `q_heads` × `head_dim` of q, `kv_heads` of k, `v_dim` of v. `partial`: the dtype of
    partial results and of what they are summed in."""

    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    v_dim: int
    dtype: str = "float32"
    partial: str = "float32"


@dataclass(frozen=True)
class Shape:
    """Rows of each rank, and the needs of each (query team, key team). A team is `inner` neighbouring ranks."""

    q_rows: tuple[int, ...]
    kv_rows: tuple[int, ...]
    heads: Heads
    needs: Mapping[tuple[int, int], tuple[Need, ...]]
    inner: int = 1

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


def attention(
    name: str,
    shape: Shape,
    routes: Sequence[Route],
    *,
    moves: str = "kv",
    backward: bool = False,
    bookends: bool = False,
) -> Schedule:
    """The schedule. `moves`: 'kv' or 'q'. With several routes, need i of a pair travels by route i.

    Inputs `q` [rows, batch, q_heads, head_dim], `k`, `v`; backward also `dout` as out, `lse`, `delta` [rows, batch,
    q_heads]. Outputs `out`, `lse`, or `dq`, `dk`, `dv`, in the partial dtype. The needs of a pair (t, t) must cover all
    query rows with the first, and all key rows together. `bookends` keeps the last of them for the end: it hides the
    last return, as the first hides the first arrival.
    """
    draft = Draft(name, len(shape.q_rows), moves=moves, backward=backward, inner=shape.inner)
    for rank in range(draft.world):
        draft.lane(rank, "compute")
        for given in INPUTS[backward]:
            whole = draft.value(
                rank, given, shape.field(given)[2], shape.rows(given, rank), shape.field(given)[1], "input"
            )
            if shape.inner > 1 and whole.rows:
                shares = [
                    draft.value(
                        rank, f"{given}.to.{i}", shape.field(given)[2], whole.rows, shape.field(given, shape.inner)[1]
                    )
                    for i in range(shape.inner)
                ]
                draft.compute(rank, "split_heads", [whole], shares, lane="exchange")
    teams = [_Team(draft, shape, column, routes, moves, backward, bookends) for column in range(shape.inner)]
    for team in teams:
        for at in range(team.size):
            team.begin(at)
    for name in INPUTS[backward] if shape.inner > 1 else ():  # staggered, so that no two send to one rank at once
        for shift in range(shape.inner):
            for team in teams:
                for at in range(team.size):
                    team.exchange(at, name, shift)
    for team in teams:
        team.build()
    if shape.inner > 1:
        _collect_heads(draft, shape, teams, backward)
    return draft.done()


def _collect_heads(draft: Draft, shape: Shape, teams: Sequence[_Team], backward: bool) -> None:
    """Every rank gets its rows with all heads back; staggered as the way there."""
    inner = shape.inner
    for name in (name for group in RESULTS[backward] for name in group):
        parts: dict[tuple[int, int], Slice] = {}
        for shift in range(inner):
            for rank in range(draft.world):
                team, column = divmod(rank, inner)
                rows, other = shape.rows(name, rank), teams[(column - shift) % inner]
                start = sum(shape.rows(name, team * inner + m) for m in range(column))
                away = Slice(f"{name}.h", start, start + rows)
                if shift and rows:
                    _, row, dtype = shape.field(name, inner)
                    home = draft.value(rank, f"{name}.from.{other.column}", dtype, rows, row)
                    draft.send(other.rank(team), "results_out", rank, f"{name}.heads", away)
                    draft.recv(rank, "results_in", other.rank(team), f"{name}.heads", home)
                    away = home
                parts[rank, other.column] = away
        for rank in range(draft.world):
            team, column = divmod(rank, inner)
            rows = shape.rows(name, rank)
            start = sum(shape.rows(name, team * inner + m) for m in range(column))
            _, row, dtype = shape.field(name)
            out = draft.value(rank, name, dtype, rows, row, "output")
            if rows:
                contents = [cut(other.results[team, name], start, start + rows) for other in teams]
                draft.compute(rank, "join_heads", [parts[rank, i] for i in range(inner)], [out], lane="exchange")
                draft.goal(rank, out, applied("join_heads", contents, rows))


class _Team:
    """The ranks that hold share `column` of the heads: one of each team."""

    def __init__(
        self,
        draft: Draft,
        shape: Shape,
        column: int,
        routes: Sequence[Route],
        moves: str,
        backward: bool,
        bookends: bool,
    ) -> None:
        self.draft, self.shape, self.column, self.routes = draft, shape, column, routes
        self.moves, self.backward, self.bookends = moves, backward, bookends
        self.size = draft.world // shape.inner
        self.suffix = ".h" if shape.inner > 1 else ""
        self.payload = ("k", "v") if moves == "kv" else tuple(n for n in INPUTS[backward] if n in OF_QUERIES)
        self.returned = {"kv": ("dk",), "q": ("out", "dq")}[moves]
        self.places: dict[tuple[int, str], dict[int, Slice]] = {}
        self.content: dict[tuple[int, str], Content] = {}
        self.results: dict[tuple[int, str], Content] = {}
        self.running: dict[tuple[int, str], Running] = {}
        self.held: dict[tuple[int, int, int], tuple[list[Slice], int, str]] = {}
        self.carried: dict[tuple[int, int, int], tuple[int, int] | None] = {}
        self.guards: dict[tuple[int, str], list[Slice]] = {}
        self.counts: dict[tuple[int, str], int] = {}

    def rank(self, team: int) -> int:
        return team * self.shape.inner + self.column

    def rows(self, name: str, team: int) -> int:
        return sum(self.shape.rows(name, team * self.shape.inner + m) for m in range(self.shape.inner))

    def build(self) -> None:
        for (i, j), needs in self.shape.needs.items():
            for need in needs:
                if i == j or need.area:
                    self.running[i, RESULTS[self.backward][0][0]].expect(need.q0, need.q1)
                    if self.backward:
                        self.running[j, "dk"].expect(need.k0, need.k1)
        pairs = [(o, v) for o in range(self.size) for v in range(self.size) if o != v]
        last = max((route.step(*pair) for route in self.routes for pair in pairs), default=0)
        for step in range(last + 1):
            for part, route in enumerate(self.routes):
                for owner, visitor in pairs:
                    if route.step(owner, visitor) == step:
                        self._hop(owner, visitor, part)
            for team in range(self.size):
                self._computes(team, step)
        for team in range(self.size):
            for need in self.shape.needs[team, team][1:] if self.bookends else ():
                self._block(team, team, team, need, -1)
        self._goals()

    def begin(self, team: int) -> None:
        """Inputs with this share of the heads, and the results that will be made of them."""
        shape, rank, inner = self.shape, self.rank(team), self.shape.inner
        for name in INPUTS[self.backward]:
            if inner == 1:
                self.content[team, name] = origin(name, rank, 0, shape.rows(name, rank))
                continue
            _, row, dtype = shape.field(name, inner)
            self.draft.value(rank, f"{name}.h", dtype, self.rows(name, team), row)
            at, parts, places = 0, [], {}
            for member in range(team * inner, (team + 1) * inner):
                rows = shape.rows(name, member)
                places[member % inner] = Slice(f"{name}.h", at, at + rows)
                at += rows
                parts.append(applied("split_heads", [origin(name, member, 0, rows)], rows, output=self.column))
            self.places[team, name] = places
            self.content[team, name] = join(parts)
        for group in RESULTS[self.backward]:
            fields = [(name + self.suffix, *shape.field(name, inner)[1:]) for name in group]
            role = "scratch" if self.suffix else "output"
            op, kind = ("merge_lse", "merge") if group[0] == "out" else ("add", "reduce")
            self.running[team, group[0]] = Running(self.draft, rank, fields, self.rows(group[0], team), op, kind, role)

    def exchange(self, team: int, name: str, shift: int) -> None:
        """Take this share of the heads from the member `shift` before this one; 0 is this rank itself."""
        inner, rank = self.shape.inner, self.rank(team)
        member = (self.column - shift) % inner
        here = self.places[team, name][member]
        share, source = Slice(f"{name}.to.{self.column}", 0, here.rows), team * inner + member
        if here.rows and not shift:
            self.draft.compute(rank, "copy", [share], [here], kind="copy", lane="exchange")
        elif here.rows:
            self.draft.send(source, "heads_out", rank, f"{name}.heads", share)
            self.draft.recv(rank, "heads_in", source, f"{name}.heads", here)

    def _needs(self, place: int, owner: int, part: int) -> list[tuple[int, int, Need]]:
        """(query team, key team, need) of the blocks that `place` computes once part `part` of `owner` is there."""
        pair = (place, owner) if self.moves == "kv" else (owner, place)
        needs = self.shape.needs.get(pair, ())
        return [(*pair, n) for n in (needs[part : part + 1] if len(self.routes) > 1 else needs) if n.area]

    def _carried(self, owner: int, visitor: int, part: int) -> tuple[int, int] | None:
        """Rows of `owner` that come to `visitor`: what it needs, and what those need to whom it hands on."""
        key = owner, visitor, part
        if key not in self.carried:
            self.carried[key] = self._find_carried(*key)
        return self.carried[key]

    def _find_carried(self, owner: int, visitor: int, part: int) -> tuple[int, int] | None:
        route = self.routes[part]
        if not route.narrow:
            rows = self.rows(self.payload[0], owner)
            return (0, rows) if rows else None
        kv = self.moves == "kv"
        ends = [(n.k0, n.k1) if kv else (n.q0, n.q1) for _, _, n in self._needs(visitor, owner, part)]
        for other in range(self.size):
            if other not in (owner, visitor) and route.parent(owner, other) == visitor:
                ends += filter(None, [self._carried(owner, other, part)])
        return (min(a for a, _ in ends), max(b for _, b in ends)) if ends else None

    def _slot(self, place: int, kind: str, buffers: int) -> tuple[str, str]:
        """The next of `buffers` slots of this kind ('' for memory of one's own), and a name for what will be there."""
        count = self.counts[place, kind] = self.counts.get((place, kind), -1) + 1
        return (f"{kind}.{count % buffers}" if buffers else ""), f"{kind}.{count}"

    def _free(self, place: int, slot: str, lane: str) -> None:
        """Hold `lane` until the slot's earlier value is no longer needed."""
        for guard in self.guards.pop((place, slot), ()):
            self.draft.wait(self.rank(place), lane, guard)
        self.guards[place, slot] = []

    def _hop(self, owner: int, visitor: int, part: int) -> None:
        """One message of what travels."""
        carried = self._carried(owner, visitor, part)
        if carried is None:
            return
        low, high = carried
        route, lane = self.routes[part], f"{self.moves}_{part}"
        parent = route.parent(owner, visitor)
        source, base, source_slot = self._held(owner, parent, part)
        slot, label = self._slot(visitor, lane, route.buffers)
        if slot:
            self._free(visitor, slot, f"{lane}_in")
        values = [
            self.draft.value(
                self.rank(visitor),
                f"{name}.{label}",
                self.shape.field(name)[2],
                high - low,
                self.shape.field(name, self.shape.inner)[1],
                slot=f"{name}.{slot}" if slot else "",
            )
            for name in self.payload
        ]
        parts = [Slice(s.value, s.start + low - base, s.start + high - base) for s in source]
        done = None
        if source_slot:
            done = self.draft.token(self.rank(parent), f"sent.{owner}.{part}.to.{visitor}")
            self.guards[parent, source_slot].append(done)
        self.draft.send(self.rank(parent), f"{lane}_out", self.rank(visitor), f"{lane}.of.{owner}", *parts, done=done)
        self.draft.recv(self.rank(visitor), f"{lane}_in", self.rank(parent), f"{lane}.of.{owner}", *values)
        self.held[owner, visitor, part] = values, low, slot

    def _held(self, owner: int, place: int, part: int) -> tuple[list[Slice], int, str]:
        """What `place` has of `owner`, the row of `owner` at which it begins, and the slot that it is in."""
        if place != owner:
            return self.held[owner, place, part]
        return [Slice(n + self.suffix, 0, self.rows(n, owner)) for n in self.payload], 0, ""

    def _computes(self, place: int, step: int) -> None:
        if step == 0:
            needs = self.shape.needs[place, place]
            for need in needs[:1] if self.bookends else needs:
                self._block(place, place, place, need, -1)
            return
        for part, route in enumerate(self.routes):
            for owner in range(self.size):
                if owner != place and route.step(owner, place) == step:
                    for i, j, need in self._needs(place, owner, part):
                        self._block(place, i, j, need, part)

    def _block(self, place: int, i: int, j: int, need: Need, part: int) -> None:
        """Compute one block at `place`, bring each result to where it is summed. `part` -1: nothing has travelled."""
        owner = place if part < 0 else (j if self.moves == "kv" else i)
        reads, slot = [], ""
        for name in INPUTS[self.backward]:
            low, high = (need.q0, need.q1) if name in OF_QUERIES else (need.k0, need.k1)
            if part >= 0 and name in self.payload:
                values, base, slot = self._held(owner, place, part)
                value = values[self.payload.index(name)].value
            else:
                value, base = name + self.suffix, 0
            if low < high:
                reads.append(Slice(value, low - base, high - base))
        writes, after = [], []
        for group in RESULTS[self.backward]:
            home, (low, high) = (i, (need.q0, need.q1)) if group[0] in OF_QUERIES else (j, (need.k0, need.k1))
            if low == high:
                continue
            running = self.running[home, group[0]]
            if home == place and running.sole:
                writes += running.final(low, high)
                continue
            label = f"{'away' if home != place else 'part'}_{max(part, 0)}.{group[0]}"
            stays = home == place and running.begins(low, high)
            where, label = self._slot(place, f"own.{group[0]}" if stays else label, 0 if stays else 2)
            if home != place:
                self._free(place, where, "compute")
            parts = [
                self.draft.value(
                    self.rank(place), f"{n}.{label}", dtype, high - low, row,
                    slot=f"{n}.{where}" if where else "",
                )
                for n, (_, row, dtype) in zip(group, (self.shape.field(n, self.shape.inner) for n in group))
            ]  # fmt: skip
            writes += parts
            after.append((group, home, parts, low, high, where, max(part, 0)))
        if not writes:  # no rows here: a rank with padding only
            return
        h, area = self.shape.heads, need.area
        width = 2 * (3 * h.head_dim + 2 * h.v_dim) if self.backward else 2 * (h.head_dim + h.v_dim)
        op = "attend_backward" if self.backward else "attend"
        engine = f"attention_{'backward' if self.backward else 'forward'}/{h.dtype}"
        flops = area * h.batch * (h.q_heads // self.shape.inner) * width
        self.draft.compute(self.rank(place), op, reads, writes, flops=flops, engine=engine, params=_params(i, j, need))
        if slot:
            self.guards[place, slot].append(writes[0])
        for item in after:
            self._deliver(place, *item)

    def _deliver(
        self, place: int, group: tuple[str, ...], home: int, parts: list[Slice],
        low: int, high: int, slot: str, part: int,
    ) -> None:  # fmt: skip
        running = self.running[home, group[0]]
        lane = "merge" if group[0] in self.returned else "compute"
        if home == place:
            running.add(parts, low, high, lane)
            return
        done = self.draft.token(self.rank(place), f"returned.{parts[0].value}")
        self.guards[place, slot].append(done)
        came, label = self._slot(home, f"came_{part}.{group[0]}", 2)
        self._free(home, came, f"back_{part}_in")
        values = [
            self.draft.value(self.rank(home), f"{n}.{label}", dtype, high - low, row, slot=f"{n}.{came}")
            for n, s, (_, row, dtype) in zip(group, parts, (self.shape.field(n, self.shape.inner) for n in group))
        ]
        tag = parts[0].value
        self.draft.send(self.rank(place), f"back_{part}_out", self.rank(home), tag, *parts, done=done)
        self.draft.recv(self.rank(home), f"back_{part}_in", self.rank(place), tag, *values)
        self.guards[home, came].extend(running.add(values, low, high, lane))

    def _goals(self) -> None:
        """From the definition: every row is the sum over all needs that hold it."""
        op = "attend_backward" if self.backward else "attend"
        output = 0
        for group in RESULTS[self.backward]:
            queries = group[0] in OF_QUERIES
            for team in range(self.size):
                running = self.running[team, group[0]]
                found: list[list[Content]] = [[] for _ in group]
                for segment in running.segments:
                    blocks: list[list[Content]] = [[] for _ in group]
                    for (i, j), needs in self.shape.needs.items():
                        for need in needs if (i if queries else j) == team else ():
                            low, high = (need.q0, need.q1) if queries else (need.k0, need.k1)
                            if not (low <= segment.start and segment.stop <= high) or not (i == j or need.area):
                                continue
                            first = output if need.q0 < need.q1 else 0
                            for at, into in enumerate(blocks):
                                into.append(
                                    applied(
                                        op_text(op, sorted(_params(i, j, need).items())),
                                        self._args(i, j, need),
                                        segment.stop - segment.start,
                                        output=first + at,
                                        start=segment.start - low,
                                    )
                                )
                    for at, parts in enumerate(blocks):
                        found[at].append(combined(running.op, parts))
                for name, contents in zip(group, found):
                    self.results[team, name] = join(contents)
                    if not self.suffix:
                        for segment, content in zip(running.segments, contents):
                            self.draft.goal(self.rank(team), Slice(name, segment.start, segment.stop), content)
                running.finish()
            output += len(group)

    def _args(self, i: int, j: int, need: Need) -> list[Content]:
        ends = [
            (
                self.content[(i if n in OF_QUERIES else j), n],
                (need.q0, need.q1) if n in OF_QUERIES else (need.k0, need.k1),
            )
            for n in INPUTS[self.backward]
        ]
        return [cut(content, low, high) for content, (low, high) in ends if low < high]


def _params(i: int, j: int, need: Need) -> dict[str, int]:
    return {"q": i, "k": j, "q0": need.q0, "q1": need.q1, "k0": need.k0, "k1": need.k1}
