"""What an overlapped product costs the host: microseconds of each kind of call that queues a piece, and of whole calls.

    python -m undertow.benchmarks.overlap_host

A piece is sent by a dozen such calls. Where they take the host longer than the GPU takes for the piece, the GPU waits,
and finer pieces are slower whatever they hide. The link is pinned host memory, and the shape is small, so that the host
is what is measured: it queues no more than the device's queue holds, and the clock stops before it waits for that. What
is lost on the device itself shows where a whole call is queued while the device sleeps, beside the same call from idle;
`of ideal` compares with the longer of product and copies alone. Products of few rows or columns come last.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from undertow.benchmarks.overlap_cuda import SLEEP_CYCLES, WORLD, copies, rank_of
from undertow.comms import cuda_driver
from undertow.comms.chunk_plan import ChunkPlan
from undertow.comms.overlap_engine import add_pieces
from undertow.comms.placement import Placement
from undertow.comms.spans import Memory, Span
from undertow.dist.errors import UserError
from undertow.parallel.kernels.ordered_sum import ordered_sum
from undertow.parallel.kernels.tracked_matmul import unusable
from undertow.parallel.overlap_arms import CUDA_ARMS

REPEATS = 20  # of a single kind of call between two waits for the device
ROUNDS = 15
SHAPES = ((2048, 8192, 16384), (4096, 8192, 16384))


def microseconds(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """The host's time for one `call`, which queues work: the median of rounds."""
    times = []
    for _ in range(ROUNDS + 1):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter() - began_s) / repeats * 1e6)
    return statistics.median(times[1:])


def device_microseconds(call: Callable[[], Any], *, ahead: bool = True) -> float:
    """The device's time for one `call`: `ahead`, while it sleeps until the host has queued all of it, as a model's own
    work keeps it busy; else from idle, when the host's time counts where it is longer."""
    times = []
    for _ in range(ROUNDS + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return statistics.median(times[1:])


def parts(device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(what, a call of it), of the kinds that a piece needs."""
    a = torch.zeros(64, 64, dtype=torch.bfloat16, device=device)
    y, there = torch.empty_like(a), torch.empty(64, 64, dtype=torch.bfloat16, pin_memory=True)
    stream, current, event = torch.cuda.Stream(device), torch.cuda.current_stream(device), torch.cuda.Event()
    event.record(current)

    def inside() -> None:
        with torch.cuda.stream(stream):
            pass

    def switched() -> None:
        torch.cuda.set_stream(stream)
        torch.cuda.set_stream(current)

    yield "a stream's context", inside
    yield "the stream set and set back", switched
    yield "an event made and recorded", stream.record_event
    yield "an event recorded again", lambda: event.record(stream)
    yield "a wait for an event", lambda: stream.wait_event(event)
    yield "a question to an event", event.query
    yield "the current stream", lambda: torch.cuda.current_stream(device)
    yield "a slice of rows", lambda: a[8:16]
    yield "a narrow of rows", lambda: a.narrow(0, 8, 8)
    yield "a product into rows", lambda: torch.mm(a, a, out=y)
    yield "a copy to pinned memory by torch", lambda: there.copy_(y, non_blocking=True)
    yield "a copy from pinned memory by torch", lambda: y.copy_(there, non_blocking=True)
    source, target, nbytes = y.data_ptr(), there.data_ptr(), y.numel() * y.element_size()
    yield "a copy to pinned memory by address", lambda: cuda_driver.copy(stream, target, source, nbytes)
    seven = [(target + at * 1024, source + at * 1024, 1024) for at in range(7)]
    yield "seven such copies", lambda: cuda_driver.copies(stream, seven)
    yield "seven such copies in one call", lambda: cuda_driver.copy_all(stream, seven)
    plan, out, landings = ChunkPlan(0, (8,) * 8, 4), y[:8].clone(), list(torch.zeros(7, 8, 64).to(y).unbind(0))
    where, pieces = Placement(plan, y), plan.chunk(0)
    yield "a sum of eight ranks' rows by torch", lambda: add_pieces(where, landings, pieces[:1], out)
    yield "four such sums by one kernel", lambda: ordered_sum(where, landings, pieces, out)
    memory = Memory(y)
    yield "the address of a tensor", lambda: Memory(y)
    yield "a place in it", lambda: Span(memory, 8, 16).address
    yield "a view of a piece of columns", lambda: y.as_strided((32, 8), (8, 1), 64)


def on_the_device(m: int, n: int, k: int, queue: Any = None) -> None:
    """Print every way's time for one shape, queued ahead and from idle; by `queue`, which queues the copies of a piece,
    those of columns only, where a piece has several."""
    rank = rank_of(m, n, k, 0, queue or cuda_driver.copies)
    alone = [device_microseconds(call) for call in (partial(torch.mm, rank.a, rank.b), partial(copies, rank))]
    print(f"\nM×N×K = {m}×{n}×{k}: product {alone[0]:.0f} us, copies {alone[1]:.0f} us\n")
    print(
        "| way | device, us, queued ahead | of ideal | from an idle device, us | of ideal |\n|---|---:|---:|---:|---:|"
    )
    for arm in CUDA_ARMS:
        if arm.columns or not (queue or (arm.tracked and unusable(rank.a, rank.b))):
            took = [device_microseconds(partial(rank.scatter, arm), ahead=ahead) for ahead in (True, False)]
            print(
                f"| {arm.name} | " + " | ".join(f"{us:.0f} | {max(alone) / us:.2f}" for us in took) + " |", flush=True
            )


def rates(k: int = 16384) -> None:
    """Print what share of the whole product's rate one reaches of some rows, or of some columns: what pieces cost."""
    a, b = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in ((2048, k), (k, 8192)))

    def flops(rows: int, columns: int) -> float:
        x, w, y = a[:rows], b[:, :columns], a.new_empty(rows, columns)

        def five() -> None:
            for _ in range(5):
                torch.mm(x, w, out=y)

        return 5 * 2e6 * rows * columns * k / device_microseconds(five)

    whole = flops(2048, 8192)
    print(f"\nA product of 2048×8192×{k} at {whole / 1e12:.0f} TFLOP/s; parts of it reach of that\n")
    print("| rows | columns | of the rate |\n|---:|---:|---:|")
    for rows, columns in (
        *((rows, 8192) for rows in (64, 128, 256, 512, 1024)),
        *((1792, columns) for columns in (64, 128, 256, 512, 1024, 2048)),
        *((256, columns) for columns in (256, 512, 1024, 2048, 4096)),
    ):
        print(f"| {rows} | {columns} | {flops(rows, columns) / whole:.2f} |", flush=True)


def main(argv: Sequence[str]) -> int:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("no CUDA device", remedy="run it on a machine with a GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}\n")
    print("| what | host, us |\n|---|---:|")
    for what, call in parts(device):
        print(f"| {what} | {microseconds(call):.1f} |")
    rank = rank_of(256, 512, 512, 0)
    print("\n| way | pieces | host, us | for each piece |\n|---|---:|---:|---:|")
    for arm in CUDA_ARMS:
        pieces = arm.subchunks + (not arm.whole) if arm.columns else WORLD * arm.subchunks
        took = microseconds(lambda arm=arm: rank.scatter(arm), repeats=1)
        print(f"| {arm.name} | {pieces} | {took:.0f} | {took / pieces:.1f} |", flush=True)
    for shape in SHAPES:
        on_the_device(*shape)
    rates()
    print("\nThe copies of a piece of columns in one call of the driver", flush=True)
    for shape in SHAPES:
        on_the_device(*shape, queue=cuda_driver.copy_all)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"overlap_host: {error}")
