"""One team's part of an attention schedule: messages of what travels, blocks, and results on their way home.

Every buffer that is used again is guarded: its next value waits for the last reader of the former one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..actions import Slice
from ..terms import Content, join, origin
from .attention_block import Block, blocks_of
from .attention_cargo import Cargo
from .attention_goals import result_contents
from .attention_heads import gathered, take
from .attention_shape import INPUTS, RESULTS, Need, Shape
from .draft import Draft
from .routes import Route
from .running import Running

WAITING_ROWS, MOST_WAITING = 65536, 8


def batch_of(shape: Shape) -> int:
    """How many contributions to a result wait to be summed at once. A sum reads and writes the float32 result beside
    what it adds: for a block of 4096 keys on a GPU, one at a time, a tenth of the attention. Long blocks hide that, and
    need the memory."""
    rows = max(shape.team_rows(name, at) for name in ("q", "k") for at in range(len(shape.q_rows) // shape.inner))
    return min(max(WAITING_ROWS // max(rows, 1), 1), MOST_WAITING)


class Team:
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
        goals: bool,
        beside: bool,
    ) -> None:
        self.beside = beside
        self.batch = batch_of(shape) if beside else 1
        self.draft, self.shape, self.column, self.routes = draft, shape, column, routes
        self.moves, self.backward, self.bookends, self.goals = moves, backward, bookends, goals
        self.size = draft.world // shape.inner
        self.suffix = ".h" if shape.inner > 1 else ""
        self.cargo = Cargo(shape, routes, moves, self.size, backward=backward)
        self.blocks = blocks_of(shape, routes, moves, self.size, backward=backward)
        self.away_buffers = 2 * max(len(block.parts) for block in self.blocks)
        self.returned = {"kv": ("dk",), "q": ("out", "dq")}[moves]
        self.places: dict[tuple[int, str], dict[int, list[tuple[Slice, Slice]]]] = {}
        self.content: dict[tuple[int, str], Content] = {}
        self.results: dict[tuple[int, str], Content] = {}
        self.running: dict[tuple[int, str], Running] = {}
        self.held: dict[tuple[int, int, int], tuple[list[Slice], int, str]] = {}
        self.guards: dict[tuple[int, str], list[Slice]] = {}
        self.counts: dict[tuple[int, str], int] = {}

    def merge_lane(self, name: str) -> str:
        return "merge" if self.beside or name in self.returned else "compute"

    def rank(self, team: int) -> int:
        return team * self.shape.inner + self.column

    def build(self) -> None:
        for block in self.blocks:
            self.running[block.i, RESULTS[self.backward][0][0]].expect(block.q0, block.q1)
            for j, need in block.parts if self.backward else ():
                self.running[j, "dk"].expect(need.k0, need.k1)
        block_at = {(block.i, *block.parts[-1]): block for block in self.blocks}
        pairs = [(o, v) for o in range(self.size) for v in range(self.size) if o != v]
        last = max((route.step(*pair) for route in self.routes for pair in pairs), default=0)
        for step in range(last + 1):
            for part, route in enumerate(self.routes):
                for owner, visitor in pairs:
                    if route.step(owner, visitor) == step:
                        self._hop(owner, visitor, part)
            for team in range(self.size):
                self._computes(team, step, block_at)
        for team in range(self.size):
            for need in self.shape.needs[team, team][1:] if self.bookends else ():
                self._block(team, block_at[team, team, need], -1)
        self._goals()

    def begin(self, team: int) -> None:
        """Inputs with this share of the heads, and the results that will be made of them."""
        shape, rank, inner = self.shape, self.rank(team), self.shape.inner
        for name in INPUTS[self.backward]:
            if inner == 1:
                self.content[team, name] = origin(name, rank, 0, shape.rows(name, rank))
            else:
                found = gathered(self.draft, shape, rank, team, self.column, name)
                self.content[team, name], self.places[team, name] = found
        for group in RESULTS[self.backward]:
            fields = [(name + self.suffix, *shape.field(name, inner)[1:]) for name in group]
            role = "scratch" if self.suffix else "output"
            op, kind = ("merge_lse", "merge") if group[0] == "out" else ("add", "reduce")
            rows = shape.team_rows(group[0], team)
            ends = fields if self.suffix else [shape.whole(name) for name in group]
            self.running[team, group[0]] = Running(self.draft, rank, fields, rows, op, kind, role, ends, self.batch)

    def exchange(self, team: int, name: str, shift: int) -> None:
        """Take this share of the heads from the member `shift` before this one."""
        here = self.places[team, name][(self.column - shift) % self.shape.inner]
        take(self.draft, self.shape, self.rank(team), name, shift, here)

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
        carried = self.cargo.rows(owner, visitor, part)
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
            for name in self.cargo.payload
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
        return [Slice(n + self.suffix, 0, self.shape.team_rows(n, owner)) for n in self.cargo.payload], 0, ""

    def _computes(self, place: int, step: int, block_at: Mapping[tuple[int, int, Need], Block]) -> None:
        """The blocks whose last part is there in this step."""
        if step == 0:
            needs = self.shape.needs[place, place]
            for need in needs[:1] if self.bookends else needs:
                self._block(place, block_at[place, place, need], -1)
            return
        for part, route in enumerate(self.routes):
            for owner in range(self.size):
                if owner != place and route.step(owner, place) == step:
                    for key in self.cargo.needs(place, owner, part):
                        if key in block_at:
                            self._block(place, block_at[key], part)

    def _block(self, place: int, block: Block, part: int) -> None:
        """Compute a block at `place`, bring each result to where it is summed. `part` -1: nothing has travelled."""
        reads, slots = [], dict[str, None]()
        for name, (j, _), (low, high) in block.reads(self.backward):
            value, base = name + self.suffix, 0
            if part >= 0 and name in self.cargo.payload:
                values, base, slot = self._held(j if self.moves == "kv" else block.i, place, part)
                value = values[self.cargo.payload.index(name)].value
                slots |= {slot: None} if slot else {}
            reads.append(Slice(value, low - base, high - base))
        writes, after = [], []
        of_keys = [(group, j, need.k0, need.k1) for j, need in block.parts for group in RESULTS[self.backward][1:]]
        for group, home, low, high in [(RESULTS[self.backward][0], block.i, block.q0, block.q1), *of_keys]:
            if low == high:
                continue
            running = self.running[home, group[0]]
            if home == place and running.sole:
                writes += running.final(low, high)
                continue
            label = f"{'away' if home != place else 'part'}_{max(part, 0)}.{group[0]}"
            stays = home == place and running.begins(low, high)
            buffers = 0 if stays else self.batch + 1 if home == place else self.away_buffers if group[0] == "dk" else 2
            where, label = self._slot(place, f"own.{group[0]}" if stays else label, buffers)
            if where:
                self._free(place, where, "compute")
            parts = [
                self.draft.value(
                    self.rank(place), f"{n}.{label}", dtype, high - low, row,
                    slot=f"{n}.{where}" if where else "",
                )
                for n, (_, row, dtype) in zip(group, (self.shape.part(n, self.shape.inner) for n in group))
            ]  # fmt: skip
            writes += parts
            after.append((group, home, parts, low, high, where, max(part, 0)))
        if not writes:  # no rows here: a rank with padding only
            return
        engine = f"attention_{'backward' if self.backward else 'forward'}/{self.shape.heads.dtype}"
        self.draft.compute(
            self.rank(place), block.op(self.backward), reads, writes,
            flops=block.flops(self.shape, self.backward), engine=engine, params=block.params,
        )  # fmt: skip
        for slot in slots:
            self.guards[place, slot].append(writes[0])
        for item in after:
            self._deliver(place, *item)

    def _deliver(
        self, place: int, group: tuple[str, ...], home: int, parts: list[Slice],
        low: int, high: int, slot: str, part: int,
    ) -> None:  # fmt: skip
        running, lane = self.running[home, group[0]], self.merge_lane(group[0])
        if home == place:
            running.add(parts, low, high, lane, self.guards[place, slot] if slot else [])
            return
        done = self.draft.token(self.rank(place), f"returned.{parts[0].value}")
        self.guards[place, slot].append(done)
        stays = running.begins(low, high)
        came, label = self._slot(
            home, f"{'own' if stays else 'came'}_{part}.{group[0]}", 0 if stays else self.batch + 1
        )
        if came:
            self._free(home, came, f"back_{part}_in")
        values = [
            self.draft.value(
                self.rank(home), f"{n}.{label}", dtype, high - low, row, slot=f"{n}.{came}" if came else ""
            )
            for n, s, (_, row, dtype) in zip(group, parts, (self.shape.part(n, self.shape.inner) for n in group))
        ]
        tag = parts[0].value
        self.draft.send(self.rank(place), f"back_{part}_out", self.rank(home), tag, *parts, done=done)
        self.draft.recv(self.rank(home), f"back_{part}_in", self.rank(place), tag, *values)
        running.add(values, low, high, lane, self.guards[home, came] if came else [])

    def _goals(self) -> None:
        pieces = {}
        if self.goals:
            pieces = result_contents(
                self.shape, self.blocks, self.content, self.running, self.size, backward=self.backward
            )
        for group in RESULTS[self.backward]:
            for team in range(self.size):
                for name in group:
                    mine = pieces.get((team, name), [])
                    self.results[team, name] = join(content for _, content in mine)
                    for rows, content in mine if not self.suffix else ():
                        self.draft.goal(self.rank(team), rows, content)
                self.running[team, group[0]].finish()
