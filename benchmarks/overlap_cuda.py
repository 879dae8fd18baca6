"""GEMM → reduce-scatter on one GPU whose link is pinned host memory: real copy engines, both directions at once.

One rank of a world of eight makes its bf16 product; what a peer should get goes to pinned host memory, and what it
would send comes from there, as many bytes as a real rank moves each way. Sequential is one cuBLAS call and all copies
behind it, in the same engine; beside it stands what a script would have, one `mm` and one copy each way. `pieces` is
what the gate chose (0: sequential; negative: that many, by the Triton kernel that counts its tiles; with `columns` 1
they are columns of all rows, else rows of each rank), `ideal` the speed-up of a perfect overlap, (product + copies) /
max(product, copies), `copy/gemm` their ratio, `pieces/whole` how much longer the chosen way's products take by
themselves than the whole one, and `triton/cublas` the whole product's time by that kernel, from times measured just
before. Every answer is compared with the float32 sum, and every byte in the peers' memory with the
product. Each row of `auto` keeps what the gate says of its choice.
`--filter table`, `wide`, `sweep`, `few rows` and `ahead` run a part; with `--minutes` the most telling cases come
first, and the JSON is written after each. Calls of the group `ahead` are queued before the device begins them, as in a
model that keeps its GPU busy: what the host takes for the many copies of a short product is in no arm's time there. The
gate's calls are queued so, too.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from undertow.benchmarks.case import Arm, Benchmark, Case, Context, Trial
from undertow.benchmarks.overlap_choice import known
from undertow.comms import cuda_driver
from undertow.comms.chunk_plan import ChunkPlan, chunk_rows
from undertow.comms.cuda_events import Call
from undertow.comms.cuda_messengers import PinnedMessenger
from undertow.comms.overlap_cuda import CudaOverlapEngine
from undertow.comms.placement import Placement
from undertow.comms.spans import Memory, Span
from undertow.dist.errors import UserError
from undertow.parallel import overlap_gate
from undertow.parallel.kernels.ordered_sum import ordered_sum
from undertow.parallel.kernels.tracked_matmul import tracked_matmul, tracked_product, unusable
from undertow.parallel.overlap_arms import CUDA_ARMS, in_columns
from undertow.parallel.overlap_arms import Arm as Way
from undertow.parallel.overlap_products import panel_of, rows_of

WORLD = 8
TABLE = [(4096, 8192, 16384), (8192, 8192, 8192), (4096, 8192, 8192), (8192, 8192, 28672), (2048, 8192, 16384),
         (4096, 8192, 4096)]  # fmt: skip
WIDE = [(4096, 12288, 49152), (4096, 49152, 12288)]
# copy / product depends on K alone and what a call costs the host on M, so short of time every K comes with some M; the
# longest are last.
SWEEP = [(m, n, k) for m in (4096, 1024, 16384, 256, 2048, 8192, 512, 128, 32768)
         for n, k in ((8192, 28672), (28672, 8192), (28672, 28672), (8192, 8192))]  # fmt: skip
FEW = 2048  # rows up to which a case of the sweep is named `few rows`, and timed once more, queued ahead
PLAIN = "mm, then one copy each way"
SLEEP_CYCLES, LONGEST = 20_000_000, 1_000_000_000  # 10 ms and more, in which a call is queued; at most


def cases(context: Context) -> list[Case]:
    """M, N, K: rows of all ranks, columns, and this rank's inner dimension."""
    named = [("table", shape) for shape in TABLE] + [("wide", shape) for shape in WIDE]
    named += [("few rows" if shape[0] <= FEW else "sweep", shape) for shape in SWEEP if shape not in TABLE]
    named += [("ahead", shape) for shape in (*SWEEP, TABLE[4]) if shape[0] <= FEW]
    named = named[:2] if context.quick else named
    return [
        Case(
            name=f"{group} {m}×{n}×{k}",
            build=partial(trial, m, n, k, context.seed, ahead=group == "ahead"),
            plain="sequential",
            ours="auto",
            nbytes=m * n * 2 * (WORLD - 1) // WORLD,
            group=f"N {n}, K {k}" if group not in ("table", "wide") else group,
            x=m,
            wrong=_too_far,
        )
        for group, (m, n, k) in named
    ]


@dataclass
class _Rank:
    """Rank 0's product and what its peers hold in pinned memory."""

    a: torch.Tensor
    b: torch.Tensor
    partials: torch.Tensor
    engine: CudaOverlapEngine
    messenger: PinnedMessenger
    sizes: tuple[int, ...]

    def plan(self, arm: Way) -> ChunkPlan:
        return self.engine.plan(self.sizes, arm.subchunks, self.b.shape[1] if arm.columns else 0, whole=arm.whole)

    def scatter(self, arm: Way, *, check: bool = False) -> torch.Tensor:
        """This rank's rows of the sum. `check`: compare what the peers got with the product, bit by bit."""
        plan = self.plan(arm)
        if arm.replayed and not check:
            queue = partial(self._queue, plan, arm)
            return self.engine.recorder.run(plan, (self.a, self.b), self.b.shape[1], queue)
        y = self.a.new_empty(self.a.shape[0], self.b.shape[1])
        out = self._queue(plan, arm, y)
        if check:
            self._expect(y, arm)
        if check and arm.replayed:  # the same bytes again, by the recording
            for _ in range(3):
                self.messenger.forget()
                again = self.scatter(arm)
                self._expect(y, arm)
                if not torch.equal(again.view(torch.int16), out.view(torch.int16)):
                    raise AssertionError(f"the sum is another one by a replay: {arm.name}")
        return out

    def _queue(self, plan: ChunkPlan, arm: Way, y: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        tracked = tracked_product(self.a, self.b, y) if arm.tracked else None
        product, panel = rows_of(self.a, self.b, y), panel_of(self.a, self.b)
        return self.engine.reduce_scatter(plan, product, y, overlap=arm.overlap, tracked=tracked, panel=panel, out=out)

    def products(self, arm: Way) -> None:
        """Those of an arm that makes pieces one after the other, without messages and the sum."""
        plan, y = self.plan(arm), self.a.new_empty(self.a.shape[0], self.b.shape[1])
        fill = Placement(plan, y).fill(rows_of(self.a, self.b, y), panel_of(self.a, self.b))
        for block in (*(block for hop in plan.hops for block in hop.blocks), *plan.kept):
            fill(block)

    def _expect(self, y: torch.Tensor, arm: Way) -> None:
        """The peers got what was made."""
        torch.cuda.synchronize()
        place, plan = Placement(self.plan(arm), y), self.plan(arm)
        for piece in (piece for owner in range(1, WORLD) for piece in plan.chunk(owner)):
            made = place.made(piece)
            sent = self.messenger.sent(made).to(made.device)  # where they are compared fastest
            if not torch.equal(sent.view(torch.int16), made.reshape(-1).view(torch.int16)):
                raise AssertionError(f"the other ranks got other bytes than were made: {arm.name}, {piece}")

    def wanted(self, arm: Way, own: torch.Tensor) -> torch.Tensor:
        """The right answer: `own`, this rank's rows of its product, plus what its peers hold; pieces of columns take
        that as it lies, piece after piece."""
        plan = self.plan(arm)
        theirs, place = self.partials.to(own.device).to(own.dtype).sum(0), Placement(plan, own)
        total = own.clone()
        for piece in plan.chunk(0):
            place.summed(total, piece).add_(place.landed(theirs, piece))
        return total


def rank_of(m: int, n: int, k: int, seed: int, copies: Any = cuda_driver.copies) -> _Rank:
    """Rank 0 of `WORLD`, its operands on the current GPU, its peers' partial sums in pinned memory; `copies`: how those
    of a piece are queued."""
    if not torch.cuda.is_available():
        raise UserError("no CUDA device", remedy="run it on a machine with a GPU, or `undertow bench overlap` here")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(seed)
    a = torch.randn(m, k, dtype=torch.bfloat16, device=device)
    b = torch.randn(k, n, dtype=torch.bfloat16, device=device) / k**0.5
    sizes = chunk_rows(m, WORLD)
    theirs = torch.randn(WORLD - 1, sizes[0], n, dtype=torch.bfloat16, device=device)
    partials = torch.empty(theirs.shape, dtype=theirs.dtype, pin_memory=True).copy_(theirs)

    messenger = PinnedMessenger(0, WORLD, device, partials, copies=copies)
    engine = CudaOverlapEngine(device=device, messenger=messenger, add=ordered_sum)
    return _Rank(a, b, partials, engine, messenger, sizes)


def trial(m: int, n: int, k: int, seed: int, *, ahead: bool = False) -> Trial:
    """Buffers on the GPU and in pinned memory, and the arms over them; `ahead`: each call queued before it begins."""
    rank = rank_of(m, n, k, seed)
    a, b = rank.a, rank.b
    own = a[: rank.sizes[0]].float() @ b.float()
    why_not = unusable(a, b)
    usable = [arm for arm in CUDA_ARMS if not (arm.tracked and why_not)]
    for arm in usable:
        rank.scatter(arm, check=True)
    seconds = partial(_seconds, ahead=ahead)
    copies_s, product_s = seconds(partial(copies, rank)), seconds(partial(torch.mm, a, b))
    gate = _decided(rank, usable, seconds)
    chosen = gate.chosen()
    assert chosen is not None
    facts = {
        "ideal": (product_s + copies_s) / max(product_s, copies_s),
        "copy/gemm": copies_s / product_s,
        "pieces": float(chosen.subchunks * chosen.overlap * (-1 if chosen.tracked else 1)),
        "columns": float(chosen.columns),
        **known(WORLD, 2.0 * m * n * k, m * n * 2 * (WORLD - 1) / WORLD, product_s, copies_s),
    }
    if chosen.overlap and not chosen.tracked:
        facts["pieces/whole"] = _seconds(partial(rank.products, chosen), ahead=True) / product_s
    if not why_not:
        facts["triton/cublas"] = _seconds(partial(_counted, a, b)) / product_s

    arms = [
        Arm(arm.name, partial(rank.scatter, arm), device="cuda", ahead=ahead, reference=partial(rank.wanted, arm, own))
        if arm in usable
        else Arm.missing(arm.name, why_not)
        for arm in CUDA_ARMS
    ]
    right = partial(rank.wanted, chosen, own)
    auto = Arm("auto", partial(rank.scatter, chosen), device="cuda", reference=right, said=gate.explain(), facts=facts)
    arms += [replace(auto, ahead=ahead), Arm(PLAIN, _plain(rank), device="cuda", ahead=ahead)]
    return Trial(arms, reference=partial(rank.wanted, CUDA_ARMS[0], own))


def _decided(rank: _Rank, arms: list[Way], seconds: Callable[..., float]) -> overlap_gate.Gate:
    """The gate that has chosen for this product, from calls of its own."""
    short_s, again_s = overlap_gate.SHORT_S, overlap_gate.AGAIN_S
    gate, (k, n) = overlap_gate.Gate(arms, lambda mine: [mine], short_s=short_s, again_s=again_s), rank.b.shape

    def can(arm: Way) -> bool:
        return not arm.columns or in_columns(arm, rank.sizes, k, n, rank.b.element_size(), gpu=True)

    while gate.chosen() is None:
        at = gate.choose("product", can=can)
        if gate.measuring("product"):
            call, row = partial(rank.scatter, gate.arms[at]), gate.row("product")
            taken_s, each_s = seconds(call, repeats=1), 0.0
            if row:
                each_s = seconds(lambda call=call, row=row: [call() for _ in range(row)], repeats=1) / row
            gate.took("product", at, taken_s, each_s)
    return gate


def _counted(a: torch.Tensor, b: torch.Tensor) -> None:
    """The product alone by the kernel that counts its tiles, as one piece."""
    y = a.new_empty(a.shape[0], b.shape[1])
    tracked_matmul(a, b, y, [(0, a.shape[0])], torch.zeros(1, dtype=torch.int32, device=a.device))


def copies(rank: _Rank) -> None:
    """All that leaves and all that comes, without a product."""
    y = rank.a.new_empty(rank.a.shape[0], rank.b.shape[1])
    own, n, made = rank.sizes[0], y.shape[1], Memory(y)
    staged = [Memory(landing) for landing in rank.messenger.landings(y[:own])]
    call, current, low = Call(torch.cuda.Event), torch.cuda.current_stream(), own
    start = call.event(current)
    for peer, size in enumerate(rank.sizes[1:], 1):
        sends = [(Span(made, low * n, size * n), peer)] if size else []
        for event in rank.messenger.exchange(call, start, sends, [(Span(staged[peer - 1], 0, own * n), peer)]):
            if event is not None:
                event.wait(current)
        low += size


def _plain(rank: _Rank) -> Callable[[], torch.Tensor]:
    """What a script would do: the product, then all foreign rows out and all partials in, each in one copy."""
    own, side = rank.sizes[0], torch.cuda.Stream()
    out = torch.empty(rank.a.shape[0] - own, rank.b.shape[1], dtype=rank.a.dtype, pin_memory=True)

    def run() -> torch.Tensor:
        y, current = rank.a @ rank.b, torch.cuda.current_stream()
        staged = torch.empty(rank.partials.shape, dtype=y.dtype, device=y.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            staged.copy_(rank.partials, non_blocking=True)
        out.copy_(y[own:], non_blocking=True)
        current.wait_stream(side)
        return (y[:own].float() + staged.float().sum(0)).to(y.dtype)

    return run


def _seconds(call: Callable[[], Any], repeats: int = 5, *, ahead: bool = False) -> float:
    """The median time of a call on the device; `ahead`: which sleeps until the host has queued all of it."""
    times, cycles = list[float](), SLEEP_CYCLES
    while len(times) < repeats + (repeats > 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()  # nothing earlier may run into the sample
        if ahead:
            torch.cuda._sleep(cycles)
        start.record()
        call()
        stop.record()
        late = ahead and start.query() and cycles < LONGEST
        stop.synchronize()
        if late:
            cycles *= 2
        else:
            times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times[-repeats:])


def _too_far(found: torch.Tensor, wanted: torch.Tensor) -> int:
    """bf16 (8 bits) rounds the own partial, of magnitude below 8, and the sum, below 32: 2^-8 · (8 + 32) = 0.16."""
    return int((~((found.float() - wanted).abs() <= 0.16)).sum())


BENCHMARK = Benchmark(
    name="overlap_cuda",
    claim="a product hides its reduce-scatter on copy engines, and the gate is never slower than sequential",
    cases=cases,
    rounds=15,
    packages=("torch",),
    x_label="rows",
    choices=tuple(arm.name for arm in CUDA_ARMS),
)

if __name__ == "__main__":
    from undertow.benchmarks.cli import main

    sys.exit(main(["overlap_cuda", *sys.argv[1:]]))
