"""What cutting attention into a rank's blocks costs on one device: the sum of the blocks against 1/P of the whole.

    python benchmarks/attention_blocks.py --output attention_blocks.json
    python benchmarks/attention_blocks.py --masks causal,window:4096,documents:64 --flex --lengths 65536 --ranks 4
    python benchmarks/attention_blocks.py --device cpu --lengths 2048 --ranks 2,4 --heads 4:2 --seconds 20

The operations are taken out of the schedules themselves, with the shapes, tiles and memory that an executor gives them
(a kernel's result is kept where it can be), so nothing is timed that would not run. Each distinct operation is timed
once (device events, queued ahead, all backends interleaved, the median), and a rank's time is the sum over its program.
Then, for the shortest length and the most ranks, what a merge and the attention beside it cost each other
(`attention_beside`). Nothing is sent: what is modelled elsewhere from these figures says so. With ``--flex``
FlexAttention is timed too (compiled first), blocks of several tiles in one call; that is what kernel='auto+flex' sees.
Cells are run from short to long until `--seconds` is used up; tables come last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from undertow.benchmarks import attention_beside
from undertow.benchmarks.attention_beside import ATTEND, Pair
from undertow.benchmarks.facts import facts
from undertow.comms.actions import Compute
from undertow.comms.adoption import Adopted, adoptable, perform
from undertow.comms.builders.attention_shape import Heads
from undertow.comms.graph import Graph, build
from undertow.comms.ops import table as op_table
from undertow.comms.queue_order import own_lanes
from undertow.comms.schedule import Schedule
from undertow.comms.storage import Storage, layout_of
from undertow.parallel.blocks.select import ORDER, backend
from undertow.parallel.blocks.types import Backend
from undertow.parallel.masks import Mask, Tile
from undertow.parallel.token_ring.block_ops import ops
from undertow.parallel.token_ring.problem import Problem

CAUSAL = "causal zigzag"


@dataclass(frozen=True)
class Cell:
    """One row of the result; times in ms, of the slowest rank. `blocks_ms` are attention alone, `sums_ms` what adds
    their results up, `ideal_ms` the same backend's monolithic call divided by the ranks."""

    heads: str
    length: int
    mask: str
    ranks: int
    wire: str
    schedule: str
    phase: str
    backend: str
    whole_ms: float
    ideal_ms: float
    blocks_ms: float
    sums_ms: float
    shapes: dict[str, float]

    @property
    def blocks_over(self) -> float:
        """How much longer the blocks take than 1/P of the whole, as a share."""
        return self.blocks_ms / self.ideal_ms - 1

    @property
    def sums_share(self) -> float:
        return self.sums_ms / self.blocks_ms


class Clock:
    """Median milliseconds of interleaved calls; on CUDA between events on the current stream, which is kept busy while
    the call is being queued: an executor queues ahead, so what a host takes to launch is no part of a block's time."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def times(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        for call in calls:  # builds plans and fills caches
            call()
            call()
        found: list[list[float]] = [[] for _ in calls]
        for _ in range(self.repeats):
            for at, call in enumerate(calls):
                found[at].append(self._once(call))
        return [statistics.median(samples) for samples in found]

    def _once(self, call: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(attention_beside.QUEUE_CYCLES)
        begin.record()
        call()
        end.record()
        end.synchronize()  # this event alone
        return begin.elapsed_time(end)


def backends(device: torch.device, heads: Heads, also: Sequence[str] = ("efficient",)) -> list[Backend]:
    """Those that run this shape on this device, those that are had by name only too; plain tiles in 32 bits only."""
    dtype = getattr(torch, heads.dtype)
    q, k, v = (
        torch.empty(1, h, 256, d, device=device, dtype=dtype)
        for h, d in ((heads.q_heads, heads.head_dim), (heads.kv_heads, heads.head_dim), (heads.kv_heads, heads.v_dim))
    )
    fitting = [b for b in (*ORDER, *map(backend, also)) if b.supports(q, k, v, causal=True, window=None)]
    return [b for b in fitting if b.NAME != "tiled" or (q.is_cuda and dtype == torch.float32)] or fitting


def whole_ms(problem: Problem, kernels: Sequence[Backend], clock: Clock) -> dict[tuple[str, bool], float]:
    """The monolithic call in one go: (backend, backward) → ms; where kernels do not know the mask, one rank's block."""
    if problem.mask.window or problem.mask.cu_seqlens_q:
        alone, found = replace(problem, world=1), {}
        operations = Operations(alone, kernels, clock)
        for backward in (False, True):
            plan = alone.schedule("ring_kv", backward=backward)
            action = next(a for _, _, _, a in plan.actions() if isinstance(a, Compute) and a.op in ATTEND)
            found |= {(name, backward): ms for name, ms in operations.ms(plan, 0, action).items()}
        return found
    h, dtype = problem.heads, getattr(torch, problem.heads.dtype)
    sizes = (h.q_heads, h.head_dim), (h.kv_heads, h.head_dim), (h.kv_heads, h.v_dim), (h.q_heads, h.v_dim)
    rows_first = [torch.randn(problem.lq, 1, *size, device=clock.device, dtype=dtype) for size in sizes]
    q, k, v, dout = (x.permute(1, 2, 0, 3) for x in rows_first)
    options: dict[str, Any] = dict(scale=h.head_dim**-0.5, causal=problem.mask.causal)
    calls, keys = [], []
    for kernel in kernels:
        out, lse = kernel.forward(q, k, v, **options)
        keys += [(kernel.NAME, False), (kernel.NAME, True)]
        calls.append(lambda kernel=kernel: kernel.forward(q, k, v, **options))
        calls.append(
            lambda kernel=kernel, out=out, lse=lse: kernel.backward(dout, q, k, v, out, lse, **options)
        )  # fmt: skip
    return dict(zip(keys, clock.times(calls)))


class Operations:
    """Times of a schedule's operations, each distinct one measured once for every backend."""

    def __init__(self, problem: Problem, kernels: Sequence[Backend], clock: Clock) -> None:
        self.problem, self.kernels, self.clock = problem, kernels, clock
        self.known: dict[tuple, dict[str, float]] = {}
        self.lies: dict[tuple, tuple[int, ...]] = {}  # strides of what a block gives, by shape and dtype
        self.graphs: dict[str, Graph] = {}  # by digest
        self.kept: dict[tuple[str, int], Adopted] = {}

    def ms(self, schedule: Schedule, rank: int, action: Compute) -> dict[str, float]:
        key = self.key(schedule, rank, action)
        if key not in self.known:
            names = [kernel.NAME for kernel in self.kernels] if action.op in ATTEND else ["any"]
            self.known[key] = dict(zip(names, self.clock.times(self.calls(schedule, rank, action, names))))
        return self.known[key]

    def calls(self, schedule: Schedule, rank: int, action: Compute, names: Sequence[str]) -> list[Callable[[], None]]:
        """The operation in memory of its own, by each of the backends called `names`: as an executor does it, which
        keeps what a kernel returns where it can."""
        layout, kept, device = layout_of(schedule, rank), self.adopted(schedule, rank), self.clock.device
        inputs = {
            name: torch.empty(layout.shapes[name], dtype=getattr(torch, layout.values[name].dtype), device=device)
            for name in layout.inputs
        }
        storage = Storage(layout, inputs, device=device, former=kept.former, sent=kept.sent)
        for part in action.reads:
            if part.value in kept.former:
                shape, dtype = storage.form(layout.values[part.value].all())
                lies = self.lies.get((shape, dtype)) or torch.empty(shape, device="meta").stride()
                storage.tensors[part.value] = torch.empty_strided(shape, lies, dtype=dtype, device=device)
            storage.rows(part).normal_()
        calls = []
        for name in names:
            how: Any = {"kernel": name} if name == "flex" else {"pick": _always(name)}
            mine = ops(self.problem, 1, self.problem.heads.head_dim**-0.5, **how)
            op = op_table(schedule, mine)[action.op]
            calls.append(partial(perform, op, action, storage, dict(action.params)))
        if action.op in ATTEND:
            calls[0]()
            for part in action.writes:
                if part.value in kept.former:
                    self.lies[storage.form(part)] = storage.tensors[part.value].stride()
        return calls

    def adopted(self, schedule: Schedule, rank: int) -> Adopted:
        """What an executor keeps as the kernels made it."""
        if (schedule.digest, rank) not in self.kept:
            if schedule.digest not in self.graphs:
                self.graphs[schedule.digest] = build(schedule)
            graph = self.graphs[schedule.digest]
            self.kept[schedule.digest, rank] = adoptable(graph, rank, own_lanes(graph)[rank], frozenset(ATTEND))
        return self.kept[schedule.digest, rank]

    def beside(self, schedule: Schedule, phase: str) -> list[Pair]:
        """Blocks by their fastest backend, each with a merge beside it; on CUDA for both priorities of its stream."""
        found, h, device = [], self.problem.heads, self.clock.device
        places = attention_beside.placed_pairs(schedule, lambda placed: self.key(schedule, *placed))
        for (rank, block), (_, total) in places:
            times = self.ms(schedule, rank, block)
            attend = self.calls(schedule, rank, block, [min(times, key=lambda name: times[name])])[0]
            merge = self.calls(schedule, rank, total, ["any"])[0]
            rows = f"{total.op} {total.writes[0].rows}"
            for priority in (0, -1) if device.type == "cuda" else (0,):
                ms = attention_beside.measure(attend, merge, device, self.clock.repeats, priority)
                place = f"{h.q_heads}:{h.kv_heads}", self.problem.lq, self.problem.world, h.wire or h.partial
                found.append(Pair(*place, schedule.name, phase, self.label(block), rows, priority, **ms))
        return found

    def label(self, action: Compute) -> str:
        """`4096×8192 causal+full`: rows of queries, rows of keys, tiles."""
        p = dict(action.params)
        keys = sum(int(b) - int(a) for a, b in zip(str(p["k0"]).split(), str(p["k1"]).split()))
        tiles = self._tiles(action)
        kinds = "+".join(t.kind for t in tiles) if len(tiles) <= 3 else f"{len(tiles)} tiles"
        return f"{int(p['q1']) - int(p['q0'])}×{keys} {kinds if tiles else 'joined'}"

    def _tiles(self, action: Compute) -> tuple[Tile, ...]:
        """Of a block; none of joined ones, which are one call."""
        if action.op.endswith("_joined"):
            return ()
        p = {name: int(value) for name, value in action.params}
        return self.problem.tiles(p["q"], p["k"], 1, (p["q0"], p["q1"]), (p["k0"], p["k1"]))

    def key(self, schedule: Schedule, rank: int, action: Compute) -> tuple:
        """What tells operations apart that take different times."""
        values = [schedule.value(part.value, rank) for part in (*action.reads, *action.writes)]
        rows = tuple(part.rows for part in (*action.reads, *action.writes))
        tiles = self._tiles(action) if action.op in ATTEND else ()
        over = tuple(self._same(schedule, rank, r, w) for r in action.reads for w in action.writes)
        kept = tuple(v.name in self.adopted(schedule, rank).former for v in values)
        return action.op, rows, tuple((v.shape[1:], v.dtype) for v in values), tiles, over, kept

    def _same(self, schedule: Schedule, rank: int, read: Any, write: Any) -> bool:
        """The write goes over the read, as slots of a running sum do."""
        a, b = (schedule.value(part.value, rank).slot for part in (read, write))
        return bool(a) and a == b and (read.start, read.stop) == (write.start, write.stop)


def _always(name: str) -> Callable[..., Backend] | None:
    """A picker that takes one backend where it can, and the first that fits otherwise."""
    if name == "any":
        return None
    wanted = backend(name)

    def pick(q: Any, k: Any, v: Any, *, causal: bool, window: int | None) -> Backend:
        order = (wanted, *ORDER)
        return next(b for b in order if b.supports(q, k, v, causal=causal, window=window))

    return pick


def cells(problem: Problem, label: str, names: Sequence[str], whole: dict, operations: Operations) -> list[Cell]:
    """Both phases of each schedule, for each backend and for the best of each shape."""
    found = []
    for name in names:
        for backward in (False, True):
            plan = problem.schedule(name, backward=backward)
            arms = [kernel.NAME for kernel in operations.kernels]
            blocks = {arm: [0.0] * plan.world for arm in (*arms, "best")}
            sums, shapes = [0.0] * plan.world, {arm: {} for arm in (*arms, "best")}
            for rank, _, _, action in plan.actions():
                if not isinstance(action, Compute):
                    continue
                times = operations.ms(plan, rank, action)
                if action.op not in ATTEND:
                    sums[rank] += times["any"]
                    continue
                what = operations.label(action)
                for arm, ms in (*times.items(), ("best", min(times.values()))):
                    blocks[arm][rank] += ms
                    shapes[arm][what] = ms
            for arm in blocks:
                key = min(((n, b) for n, b in whole if b == backward), key=lambda k: whole[k])
                one = whole[key if arm == "best" else (arm, backward)]
                found.append(
                    Cell(
                        f"{problem.heads.q_heads}:{problem.heads.kv_heads}", problem.lq, label, problem.world,
                        problem.heads.wire or problem.heads.partial, name,
                        "backward" if backward else "forward", arm, one, one / problem.world,
                        max(blocks[arm]), max(sums), shapes[arm],
                    )
                )  # fmt: skip
    return found


def table(rows: Sequence[Cell]) -> Table:
    shown = Table(title="a rank's blocks against 1/P of the monolithic call (measured; nothing is sent)")
    words, numbers = (
        ("mask", "wire", "schedule", "phase", "backend"),
        ("whole/P ms", "blocks ms", "over", "sums/blocks"),
    )
    for name in ("heads", "tokens", "mask", "P", *words[1:], *numbers):
        shown.add_column(name, justify="left" if name in words else "right")
    for c in rows:
        numbers = f"{c.ideal_ms:.3f}", f"{c.blocks_ms:.3f}", f"{c.blocks_over:+.1%}", f"{c.sums_share:.1%}"
        shown.add_row(c.heads, str(c.length), c.mask, str(c.ranks), c.wire, c.schedule, c.phase, c.backend, *numbers)
    return shown


def masks(options: argparse.Namespace, length: int) -> list[tuple[str, Mask, str]]:
    """(label, mask, layout): `--masks`, for all but the first length the first of them only."""
    found = []
    for name in options.masks if length == options.lengths[0] else options.masks[:1]:
        kind, _, number = name.partition(":")
        if kind == "documents":  # of unequal lengths, 1 : 2 : 3 in turn
            shares = [i % 3 + 1 for i in range(int(number))]
            ends = [length * sum(shares[:i]) // sum(shares) for i in range(len(shares) + 1)]
            found.append((f"{number} documents", Mask(causal=True, cu_seqlens_q=tuple(ends)), "zigzag_documents"))
        elif kind == "window":
            found.append((f"window {number}", Mask(causal=True, window=int(number)), "contiguous"))
        else:
            found.append((CAUSAL, Mask(causal=True), "zigzag") if kind == "causal" else ("full", Mask(), "contiguous"))
    return found


def main(argv: Sequence[str]) -> int:
    options = _arguments(argv)
    device = torch.device(options.device)
    torch.manual_seed(0)
    clock, rows, deadline_s = Clock(device, options.repeats), list[Cell](), time.monotonic() + options.seconds
    pairs = list[Pair]()
    for length in options.lengths:
        for q_heads, kv_heads in options.heads:
            for label, mask, layout in masks(options, length):
                heads = Heads(1, q_heads, kv_heads, options.dim, options.dim, options.dtype, "float32")
                kernels, whole = backends(device, heads, ("efficient", *(["flex"] if options.flex else []))), {}
                for ranks in options.ranks:
                    if time.monotonic() > deadline_s:
                        print(f"out of time before {length} tokens, {q_heads}:{kv_heads} heads, {ranks} ranks")
                        continue
                    problem = Problem(ranks, length, length, heads, mask, layout)
                    whole = whole or whole_ms(problem, kernels, clock)
                    for wire in options.wires:
                        narrow = replace(problem, heads=replace(heads, wire=wire))
                        operations = Operations(narrow, kernels, clock)
                        names = [name for name in options.schedules if not narrow.possible(name)]
                        rows += cells(narrow, label, names, whole, operations)
                        if label == CAUSAL and length == min(options.lengths) and ranks == max(options.ranks):
                            for name, backward in product(names, (False, True)):
                                phase = "backward" if backward else "forward"
                                pairs += operations.beside(narrow.schedule(name, backward=backward), phase)
                    print(f"{length} {q_heads}:{kv_heads} {label} P={ranks} done", flush=True)
                    if options.output:  # what is known already, should a later cell fail
                        Path(options.output).write_text(_json(rows, pairs))
    Console(width=170).print(table([c for c in rows if c.backend == "best"]))
    over = [c.blocks_over for c in rows if c.backend == "best"]
    print(f"blocks over 1/P of the whole: median {statistics.median(over):+.1%}, worst {max(over):+.1%} (bar: +5 %)")
    share = [c.sums_share for c in rows if c.backend == "best"]
    print(f"sums over blocks: median {statistics.median(share):.1%}, worst {max(share):.1%} (bar: 3 %)")
    if pairs:
        Console(width=170).print(attention_beside.table(pairs))
        print(attention_beside.summary(pairs))
    return 0


def _json(rows: Sequence[Cell], pairs: Sequence[Pair]) -> str:
    found = {"cells": [asdict(c) for c in rows], "beside": [pair.row() for pair in pairs]}
    return json.dumps({"facts": facts(("torch", "triton")), **found}, indent=1) + "\n"


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    cuda = torch.cuda.is_available()

    def numbers(text: str) -> list[int]:
        return [int(x) for x in text.split(",")]

    def pairs(text: str) -> list[tuple[int, int]]:
        return [(int(a), int(b)) for a, b in (x.split(":") for x in text.split(","))]

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--lengths", type=numbers, default=[65536, 131072], help="tokens of the whole sequence")
    parser.add_argument("--ranks", type=numbers, default=[2, 4, 8])
    parser.add_argument("--heads", type=pairs, default=[(32, 8), (32, 32)], help="query:key heads")
    parser.add_argument(
        "--wires",
        type=lambda text: text.split(","),
        default=["float32", "bfloat16"] if cuda else ["float32"],
        help="dtypes of a block's results before they are summed",
    )
    parser.add_argument(
        "--masks",
        type=lambda text: text.split(","),
        default=["causal", "full"],
        help="of causal, full, window:KEYS, documents:COUNT",
    )
    parser.add_argument("--flex", action="store_true", help="also FlexAttention, compiled")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument(
        "--schedules",
        type=lambda text: text.split(","),
        default=["ring_kv", "ring_kv_joined", "all_gather_kv_joined"],
        help="those that a number of ranks does not have are left out",
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=300.0, help="no new cell is begun after this")
    parser.add_argument("--output", default="", help="JSON file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
