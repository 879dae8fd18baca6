"""Products whose pieces leave or arrive while they are made: the engine of a CPU communication thread over a messenger.

The caller's thread multiplies piece by piece in the plan's order and bumps the tracker; the communication thread fires
the output map's copies. An owner adds all partials in rank order in float32 (float64 for float64), whoever sent first,
so a result repeats bit for bit. `comms.p2p` runs any schedule, at about half a millisecond per action; this knows three
patterns only, and does less for each piece. Gloo matches messages of one pair and tag in order, so a staging buffer
that the next call reuses cannot get its message early: its receive is not posted yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..dist.errors import PeerLost, UndertowError
from ..dist.trace import Trace
from .board import Worker
from .chunk_plan import Block, ChunkPlan, Piece
from .link import LinkModel
from .output_map import OutputMap, Rule
from .placement import Panel, Placement, Product, by_rows
from .slow_messenger import SlowMessenger
from .tracker import Tracker, TrackerStopped
from .trigger import GlooMessenger, Messenger, fire

_MAPS = {"scatter": OutputMap.reduce_scatter, "gather": OutputMap.all_gather, "spread": OutputMap.spread}
_SPREAD = 1 << 14  # tags of an all-reduce's second half, beside those of its first
_KEPT = 64  # plans whose trackers and staging buffers are kept


@dataclass
class _Prepared:
    """What calls of one plan share: the map, its tracker, and where foreign partials arrive."""

    rules: OutputMap
    tracker: Tracker
    staged: dict[int, torch.Tensor]
    tag: int  # of part 0


class OverlapEngine:
    """The ranks of `group` that multiply together; create, use and `close` on every rank alike, from one thread.

    `messenger` replaces gloo. `timeout_s`: the longest that a piece may be waited for. After an error the engine
    refuses to go on, because messages of the broken call may still be on their way. `trace`: a span for each piece.
    `link` makes gloo as slow as a given link (`comms.slow_messenger`).
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        messenger: Messenger | None = None,
        timeout_s: float = 300.0,
        trace: Trace | None = None,
        link: LinkModel | None = None,
    ) -> None:
        self.messenger = messenger or GlooMessenger(group, timeout_s)
        if link is not None:
            self.messenger = SlowMessenger(self.messenger, link)
        self.rank, self.world = self.messenger.rank, self.messenger.world
        self.timeout_s, self.trace = timeout_s, trace or Trace(None)
        self._thread = Worker(f"undertow-overlap-{self.rank}")
        self._prepared: dict[tuple[Any, ...], _Prepared] = {}
        self._broken: list[Any] = []  # of the failed call: tensors must outlive messages on their way

    def plan(self, sizes: tuple[int, ...], subchunks: int = 1, columns: int = 0, *, whole: bool = False) -> ChunkPlan:
        return ChunkPlan(self.rank, sizes, subchunks, columns=columns, whole=whole)

    def reduce_scatter(
        self,
        plan: ChunkPlan,
        product: Product,
        y_MN: torch.Tensor,
        *,
        overlap: bool = True,
        panel: Panel | None = None,
    ) -> torch.Tensor:
        """Make `y` by `product`, and return this rank's rows of its sum over the ranks. Collective.

        `product(low, high)` must fill y[low:high]. `overlap=False` makes all of `y` first and sends then: the same bits
        where the product's rows do not depend on how many are made at once. A plan of columns is made by
        `panel(low, high, left, right, out)`, which must fill `out` with these rows and columns, and `y` is its memory:
        contiguous, and not the product's matrix (`placement`).
        """
        out = y_MN.new_empty((plan.own[1] - plan.own[0], y_MN.shape[1]))
        return self._scatter(plan, Placement(plan, y_MN).fill(product, panel), y_MN, overlap, out)

    def all_reduce(
        self, plan: ChunkPlan, product: Product, y_MN: torch.Tensor, *, overlap: bool = True
    ) -> torch.Tensor:
        """Make `y` by `product`, and return its sum over the ranks, the same bits on all of them. Collective.

        A piece of the own chunk goes to everyone as soon as it is summed, while later ones are still on their way.
        """
        self._usable(plan, rows=True)
        whole = torch.empty_like(y_MN)
        ready = self._prepare("spread", plan, None)
        epoch = ready.tracker.begin()
        arrivals: dict[Piece, Any] = {}
        low, high = plan.own
        try:
            for piece in plan.gather_order:
                if piece.owner != self.rank:
                    arrivals[piece] = self._expect(whole[piece.low : piece.high], piece, piece.owner, ready.tag)
            self._scatter(plan, by_rows(product), y_MN, overlap, whole[low:high], ready, epoch, whole)
            for piece, handle in arrivals.items():
                self._arrived(handle, piece, piece.owner)
        except BaseException as error:
            self._fail(ready, error, arrivals, whole)
            raise
        return whole

    def _scatter(
        self,
        plan: ChunkPlan,
        fill: Callable[[Block], None],
        y_MN: torch.Tensor,
        overlap: bool,
        out: torch.Tensor,
        spread: _Prepared | None = None,
        spread_epoch: int = 0,
        whole: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Reduce-scatter into `out`; with `spread`, each summed piece of `whole` then goes where that map says."""
        self._usable(plan)
        ready = self._prepare("scatter", plan, y_MN)
        epoch = ready.tracker.begin()
        arrivals: dict[tuple[int, int], Any] = {}
        own, place = plan.chunk(self.rank), Placement(plan, y_MN)
        try:
            for peer, landing in ready.staged.items():
                for piece in own:
                    arrivals[peer, piece.part] = self._expect(place.landed(landing, piece), piece, peer, ready.tag)
            sending = [self._thread.submit(lambda: self._fire(ready, epoch, place))]
            if spread is not None and whole is not None:
                spreading = Placement(plan, whole)
                sending.append(self._thread.submit(lambda: self._fire(spread, spread_epoch, spreading)))
            if not overlap:
                for block in plan.blocks:
                    self._make("all rows", fill, block)
            for block in (*(block for hop in plan.hops for block in hop.blocks), *plan.kept):
                if overlap:
                    self._make(", ".join(map(str, block.pieces)), fill, block)
                for piece in block.pieces:
                    ready.tracker.bump(piece, plan.tiles(piece))
            for piece in own:
                for peer in ready.staged:
                    self._arrived(arrivals[peer, piece.part], piece, peer)
                add_pieces(place, list(ready.staged.values()), (piece,), out)
                if spread is not None:
                    spread.tracker.bump(piece)
            for each in sending:
                self._left(each.get())
        except BaseException as error:
            self._fail(ready, error, arrivals, y_MN)
            raise
        return out

    def all_gather(
        self, plan: ChunkPlan, shard: torch.Tensor, whole: torch.Tensor, use: Product, *, overlap: bool = True
    ) -> None:
        """Fill `whole` with all ranks' `shard`s, and call `use(low, high)` for its rows as they arrive. Collective."""
        self._usable(plan, rows=True)
        ready = self._prepare("gather", plan, None)
        epoch = ready.tracker.begin()
        arrivals: dict[Piece, Any] = {}
        low, high = plan.own
        try:
            for piece in plan.gather_order:
                if piece.owner != self.rank:
                    arrivals[piece] = self._expect(whole[piece.low : piece.high], piece, piece.owner, ready.tag)
            whole[low:high].copy_(shard)
            for piece in plan.chunk(self.rank):
                ready.tracker.bump(piece)
            place, fill = Placement(plan, whole), by_rows(use)
            sending = self._thread.submit(lambda: self._fire(ready, epoch, place))
            for piece in plan.gather_order:
                if piece in arrivals:
                    self._arrived(arrivals[piece], piece, piece.owner)
                if overlap:
                    self._make(str(piece), fill, piece)
            if not overlap:
                self._make("all rows", fill, Block(0, plan.rows, 0, 0, ()))
            self._left(sending.get())
        except BaseException as error:
            self._fail(ready, error, arrivals, whole)
            raise

    def close(self) -> None:
        """End the thread and, unless a call has failed, the messenger; collective."""
        self._thread.stop()
        if not self._broken:
            self.messenger.close()

    def _usable(self, plan: ChunkPlan, *, rows: bool = False) -> None:
        if self._broken:
            raise UndertowError(f"rank {self.rank}: this engine has failed before; close it and make a new one")
        plan.expect(self.rank, self.world, rows=rows)

    def _prepare(self, kind: str, plan: ChunkPlan, y: torch.Tensor | None) -> _Prepared:
        key = (kind, plan) if y is None else (kind, plan, y.shape[1], y.dtype)
        found = self._prepared.pop(key, None)
        if found is None:
            rules = _MAPS[kind](plan)
            need = {piece: plan.tiles(piece) if y is not None else 1 for piece in plan.scatter_order}
            shape = (plan.own[1] - plan.own[0], 0 if y is None else y.shape[1])
            peers = [peer for peer in range(self.world) if peer != self.rank] if y is not None and all(shape) else []
            staged = {peer: y.new_empty(shape) for peer in peers} if y is not None else {}
            found = _Prepared(rules, Tracker(need), staged, _SPREAD if kind == "spread" else 0)
        self._prepared[key] = found
        if len(self._prepared) > _KEPT:
            del self._prepared[next(iter(self._prepared))]
        return found

    def _fire(self, ready: _Prepared, epoch: int, place: Placement) -> list[tuple[Rule, Any]]:
        """In the communication thread."""

        def send(rule: Rule) -> Any:
            rows = place.made(rule.piece)
            if not rows.numel():
                return None
            with self.trace.span(f"send {rule.piece} to {rule.dst}", lane="send"):
                try:
                    return self.messenger.post_send(rows, rule.dst, ready.tag + rule.piece.part)
                except RuntimeError as error:
                    raise self._not_taken(rule, error) from error

        return fire(ready.rules, ready.tracker, epoch, send, self.timeout_s)

    def _make(self, name: str, fill: Callable[[Any], None], what: Block | Piece) -> None:
        with self.trace.span(f"product {name}", lane="compute"):
            fill(what)

    def _expect(self, rows: torch.Tensor, piece: Piece, peer: int, tag: int) -> Any:
        """Post the receive of a piece; None when it is empty."""
        try:
            return self.messenger.post_recv(rows, peer, tag + piece.part) if rows.numel() else None
        except RuntimeError as error:
            raise self._missing(piece, peer, error) from error

    def _arrived(self, handle: Any, piece: Piece, peer: int) -> None:
        if handle is None:
            return
        with self.trace.span(f"wait for {piece} from {peer}", lane="compute"):
            try:
                self.messenger.wait(handle, self.timeout_s)
            except RuntimeError as error:
                raise self._missing(piece, peer, error) from error

    def _missing(self, piece: Piece, peer: int, error: RuntimeError) -> PeerLost:
        return PeerLost(f"rank {self.rank}: {piece} did not come from rank {peer} ({_short(error)})")

    def _not_taken(self, rule: Rule, error: RuntimeError) -> PeerLost:
        return PeerLost(f"rank {self.rank}: {rule.piece} was not taken by rank {rule.dst} ({_short(error)})")

    def _left(self, sent: list[tuple[Rule, Any]]) -> None:
        for rule, handle in sent:
            try:
                if handle is not None:
                    self.messenger.wait(handle, self.timeout_s)
            except RuntimeError as error:
                raise self._not_taken(rule, error) from error

    def _fail(self, ready: _Prepared, error: BaseException, *alive: Any) -> None:
        ready.tracker.fail(error if not isinstance(error, TrackerStopped) else error.__cause__ or error)
        self._broken.append((ready, alive))


def add_pieces(place: Placement, landings: Sequence[torch.Tensor], pieces: Sequence[Piece], out: torch.Tensor) -> None:
    """The partials of own pieces, the others' `landings` in rank order, each sum rounded once, into `out`."""
    for piece in pieces:
        parts = [place.landed(landing, piece) for landing in landings]
        parts.insert(place.plan.rank, place.made(piece))
        add_in_order(parts, place.summed(out, piece))


def add_in_order(parts: list[torch.Tensor], out: torch.Tensor) -> None:
    """The sum of `parts`, first to last, in float32 at least, rounded once."""
    if len(parts) == 1:
        out.copy_(parts[0])
        return
    if len(parts) == 2 and parts[0].dtype == parts[1].dtype == out.dtype:
        torch.add(parts[0], parts[1], out=out)  # computes in float32 at least, and rounds once
        return
    wide = out if out.dtype in (torch.float32, torch.float64) else parts[0].float()
    torch.add(parts[0], parts[1], out=wide) if wide is out else wide.add_(parts[1])
    for part in parts[2:]:
        wide.add_(part)
    if wide is not out:
        out.copy_(wide)


def _short(error: Exception) -> str:
    return str(error).split("] ", 1)[-1].split(". ")[0]
