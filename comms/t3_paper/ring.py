"""T3's fused GEMM and ring reduce-scatter, event by event (paper sections 4.1-4.4, figures 7 and 8).

Each GPU makes its chunks in the order in which the ring wants them, so that neighbours work one position apart. The
stores of the first position are remote-mapped: they go over the link as updates and touch no local memory. At every
other position the tracker counts the updates of a piece, its own stores and those that arrive; at two of each byte the
DMA of that piece is triggered, except at the last position, where the piece is finished and stays. All GPUs run the
same timeline, so one GPU whose link leads back to itself stands for the ring; `gpus=world` simulates every one, which
is what unequal links need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...dist.errors import UserError
from .clock import Clock
from .gemm import Gemm
from .hardware import Hardware
from .memory import Memory, Policy, Stream

_ROUNDING = 1e-9  # of a piece: shares of pieces are sums of floats
_MOST_PIECES = 10_000  # of a GPU: larger products (over 80 000 tiles) get larger pieces, to end in seconds


@dataclass(frozen=True)
class Span:
    """Something that occupied `lane` ('compute' or 'link') of the first GPU."""

    lane: str
    label: str
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class Fused:
    """What happened. Times are those of the slowest GPU, bytes those of the first GPU.

    `gemm_s`: its last store is in memory; `reduced_s`: every own chunk holds all partial sums; `first_send_s`: the
    first byte leaves. `served_bytes` by kind: gemm_reads, gemm_writes, rs_reads, rs_updates.
    """

    gemm_s: float
    reduced_s: float
    first_send_s: float
    sent_bytes: float
    served_bytes: Mapping[str, float]
    trace: list[tuple[str, float, float, float]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return max(self.gemm_s, self.reduced_s)


def fuse(
    gemm: Gemm,
    world: int,
    hw: Hardware,
    policy: Policy,
    *,
    gpus: int = 1,
    links_bytes_per_s: Sequence[float] = (),
    traced: bool = False,
) -> Fused:
    """Simulate `gemm` with its reduce-scatter over `world` GPUs.

    `gpus`: 1 for the symmetric ring, or `world`; `links_bytes_per_s` gives then each GPU's outgoing link.
    """
    return _simulate(gemm, world, hw, policy, gpus, links_bytes_per_s, traced, computed=False)


def reduce_scatter_alone(gemm: Gemm, world: int, hw: Hardware) -> Fused:
    """The same DMA and updates with the whole output in memory from the start: the ring with NMC and no GEMM."""
    return _simulate(gemm, world, hw, Policy.SHARED, 1, (), False, computed=True)


def _simulate(
    gemm: Gemm,
    world: int,
    hw: Hardware,
    policy: Policy,
    gpus: int,
    links: Sequence[float],
    traced: bool,
    *,
    computed: bool,
) -> Fused:
    if world < 2 or gpus not in (1, world) or len(links) not in (0, gpus):
        raise UserError(
            f"world {world}, gpus {gpus}, {len(links)} links", expected="world >= 2, gpus 1 or world, one link per GPU"
        )
    clock = Clock()
    nodes = [
        _Gpu(clock, gemm, world, hw, policy, links[rank] if links else hw.link_bytes_per_s, traced and rank == 0)
        for rank in range(gpus)
    ]
    for rank, node in enumerate(nodes):
        node.neighbour = nodes[rank - 1]
    for node in nodes:
        node.begin(computed)
    clock.run()
    first = nodes[0]
    return Fused(
        gemm_s=max(node.gemm_s for node in nodes),
        reduced_s=max(node.reduced_s for node in nodes),
        first_send_s=min(node.first_send_s for node in nodes),
        sent_bytes=first.sent_bytes,
        served_bytes=first.memory.served_bytes,
        trace=first.memory.trace or [],
        spans=first.spans,
    )


class _Gpu:
    """One GPU. Pieces are numbered in the order in which it makes them; piece g + pieces_per_chunk is the neighbour's
    name for the same bytes, one position later."""

    def __init__(
        self, clock: Clock, gemm: Gemm, world: int, hw: Hardware, policy: Policy, link: float, traced: bool
    ) -> None:
        self.clock, self.gemm, self.hw, self.traced = clock, gemm, hw, traced
        self.memory = Memory(clock, hw, policy, traced=traced)
        self.neighbour: _Gpu = self
        self.per_chunk = max(1, round(min(gemm.tiles / hw.piece_tiles, _MOST_PIECES) / world))
        self.pieces = self.per_chunk * world
        self.piece_bytes = gemm.output_bytes / self.pieces
        self.updates = [0.0] * self.pieces  # the tracker: updates received, in pieces
        self.link_bytes_per_s, self.link_free_s = link, 0.0
        self.sent_bytes, self.first_send_s = 0.0, float("inf")
        self.gemm_s = self.reduced_s = 0.0
        self.unwritten = 0
        self.spans: list[Span] = []

    def begin(self, computed: bool) -> None:
        if not computed:
            self._begin_stage(0)
            return
        for piece in range(self.pieces):
            self.updates[piece] = 1.0
        for piece in range(self.per_chunk):
            self._dma(piece)

    # The GEMM

    def _begin_stage(self, stage: int) -> None:
        """The first load, then computation beside the other loads; the stage ends when both have."""
        begun_s, running = self.clock.now_s, [2]

        def part() -> None:
            running[0] -= 1
            if not running[0]:
                self._end_stage(stage, begun_s)

        first = self.gemm.exposed * self.gemm.stage_reads_bytes
        rest = self.gemm.stage_reads_bytes - first
        self.memory.submit(
            Stream.COMPUTE, "gemm_reads", first, lambda: self.clock.after(self.gemm.stage_compute_s, part)
        )
        self.memory.submit(Stream.COMPUTE, "gemm_reads", rest, part)

    def _end_stage(self, stage: int, begun_s: float) -> None:
        """Store the stage's tiles: the first position over the link, the others as local updates."""
        self._span("compute", f"stage {stage}", begun_s)
        for piece, share in self._made_in(stage):
            if piece < self.per_chunk:
                self._send(piece, share)
            else:
                self.unwritten += 1
                self.memory.submit(
                    Stream.COMPUTE,
                    "gemm_writes",
                    share * self.piece_bytes,
                    lambda piece=piece, share=share: self._stored(piece, share),
                    cost=self.hw.update_cost,
                )
        self.gemm_s = self.clock.now_s
        if stage + 1 < self.gemm.stages:
            self._begin_stage(stage + 1)

    def _made_in(self, stage: int) -> list[tuple[int, float]]:
        """(piece, share of it) for the pieces that a stage's tiles touch."""
        piece_tiles = self.gemm.tiles / self.pieces
        low = stage * self.gemm.tiles_per_stage / piece_tiles
        high = min((stage + 1) * self.gemm.tiles_per_stage, self.gemm.tiles) / piece_tiles
        found = []
        for piece in range(int(low), min(int(high) + 1, self.pieces)):
            share = min(high, piece + 1) - max(low, piece)
            if share > _ROUNDING:
                found.append((piece, share))
        return found

    def _stored(self, piece: int, share: float) -> None:
        self.unwritten -= 1
        if not self.unwritten:
            self.gemm_s = self.clock.now_s
        self._update(piece, share)

    # Tracker, DMA and link

    def _update(self, piece: int, share: float) -> None:
        """Count an update; at two of every byte the piece is whole: trigger its DMA, or it is part of the result."""
        before = self.updates[piece]
        self.updates[piece] = before + share
        if before < 2 - _ROUNDING <= self.updates[piece]:
            if piece < self.pieces - self.per_chunk:
                self._dma(piece)
            else:
                self.reduced_s = self.clock.now_s

    def _dma(self, piece: int) -> None:
        self.memory.submit(Stream.COMMUNICATION, "rs_reads", self.piece_bytes, lambda: self._send(piece, 1.0))

    def _send(self, piece: int, share: float) -> None:
        """Over the link after what is already on it; then an update in the neighbour's memory."""
        nbytes = share * self.piece_bytes
        begin_s = max(self.clock.now_s, self.link_free_s)
        self.link_free_s = begin_s + nbytes / self.link_bytes_per_s
        self.first_send_s = min(self.first_send_s, begin_s)
        self.sent_bytes += nbytes
        if self.traced:
            position = piece // self.per_chunk
            self.spans.append(Span("link", f"position {position}", begin_s, self.link_free_s))
        arrival_s = self.link_free_s + self.hw.link_latency_s
        there = self.neighbour
        self.clock.after(arrival_s - self.clock.now_s, lambda: there._arrived(piece + self.per_chunk, share))

    def _arrived(self, piece: int, share: float) -> None:
        self.memory.submit(
            Stream.COMMUNICATION,
            "rs_updates",
            share * self.piece_bytes,
            lambda: self._update(piece, share),
            cost=self.hw.update_cost,
        )

    def _span(self, lane: str, label: str, begin_s: float) -> None:
        if self.traced:
            self.spans.append(Span(lane, label, begin_s, self.clock.now_s))
