"""Collectives on device buffers: a 3-D halo as one neighbour collective, and Alltoallw with derived datatypes.

    undertow mpi run -- mpirun --oversubscribe -n 2 python -m undertow.benchmarks.mpi_gpu_collectives [--output FOLDER]

Every rank's memory is on its own card (rank r of the host on card r mod count). Per case, in one run and in turn:

    auto, direct, staged   the program's own call on device memory; the preload takes the path named, or chooses
    ipc                    the same with UNDERTOW_MPI_IPC: receivers read the senders' device memory
    by hand                torch packs into device scratch, a pinned buffer goes through the same collective as bytes
    kernels                the same with a kernel of one's own for each part, where nvcc is at hand
    per block              one cuMemcpyAsync per contiguous block to and from that buffer

The halo is Neighbor_alltoallw of six subarray faces (examples/halo3d's types); `pencil` turns an array that is split
along its second axis into one split along its third, the exchange of a parallel FFT; `transpose` is Alltoallw of single
elements by columns. Before timing, each way's result is compared with the one that the formula gives, and with the
same call of the library on host arrays. Microseconds of the slowest rank, medians with their 95 % intervals.
`--device cpu` runs the program on host memory (no path is forced there), `--device driver` without torch's kernels.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from undertow.benchmarks import facts, mpi_gpu_pages
from undertow.benchmarks.intervals import median_interval
from undertow.benchmarks.mpi_gpu_rivals import Layout
from undertow.benchmarks.mpi_gpu_rooms import IPC, PRELOAD, RIVALS, Batch, Buffer, Preload, Room, room, timed
from undertow.examples.halo3d import face_types

REPEATS = 15


@dataclass
class Exchange:
    """One collective: what every rank holds before and after, and the two forms of the call.

    `typed` and `bytes_` get the sending and the receiving side: buffers for the former, batches for the latter.
    """

    name: str
    before: np.ndarray  # bytes of the sending buffer; when `into` is None, of the only one
    after: np.ndarray
    into: np.ndarray | None  # the receiving buffer's bytes before the call
    sends: list[tuple[Layout, int]]
    receives: list[tuple[Layout, int]]
    typed: Callable[[Any, Any], None]
    bytes_: Callable[[Batch, Batch], None]
    free: Callable[[], None]


def flat(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint8).reshape(-1)


def w_arguments(buffer: Any, types: list) -> list:
    """A buffer with one element of each type, every type reaching to its own place."""
    return [buffer, ([1] * len(types), [0] * len(types)), types]


def v_arguments(mpi: Any, batch: Batch) -> list:
    return [batch.host, batch.counts, batch.places, mpi.BYTE]


def halo(mpi: Any, world: Any, n: int) -> Exchange:
    """Ghost layers of n³ cells per rank on a periodic grid, width 1."""
    edge, row, plane = n + 2, 8 * (n + 2), 8 * (n + 2) ** 2
    dims = mpi.Compute_dims(world.size, 3)
    grid = world.Create_cart(dims, periods=[True] * 3)
    coords = grid.coords
    shapes = [
        Layout("x", 8 * n, ((n, row),)),
        Layout("y", 8 * n, ((n, plane),)),
        Layout("z", 8, ((n, plane), (n, row))),
    ]
    faces = face_types(mpi, n, 1)
    sends, receives, targets, sources = [], [], [], []
    for axis, direction, *_ in faces:
        at = [1, 1, 1]
        at[axis] = 1 if direction < 0 else n
        sends.append((shapes[axis], at[0] * plane + at[1] * row + at[2] * 8))
        at[axis] = n + 1 if direction < 0 else 0  # what goes to one side arrives in the opposite layer
        receives.append((shapes[axis], at[0] * plane + at[1] * row + at[2] * 8))
        targets.append(grid.Shift(axis, direction)[1])
        sources.append(grid.Shift(axis, -direction)[1])
    # A graph rather than the grid: neighbours that are the same rank twice are matched in the order given here.
    graph = world.Create_dist_graph_adjacent(sources, targets)
    into = [faces[2 * axis + (direction < 0)][3] for axis, direction, *_ in faces]  # the ghost type of the other side
    out = [face[2] for face in faces]

    inner, lines = slice(1, n + 1), [np.arange(-1, n + 1)] * 3
    x, y, z = ((c * n + v) % (d * n) for c, d, v in zip(coords, dims, np.meshgrid(*lines, indexing="ij")))
    numbers = ((x * dims[1] * n + y) * dims[2] * n + z).astype("d")
    before, after = np.full([edge] * 3, -1.0), np.full([edge] * 3, -1.0)
    before[inner, inner, inner] = after[inner, inner, inner] = numbers[inner, inner, inner]
    for axis in range(3):
        for side in (0, n + 1):
            face: list = [inner] * 3
            face[axis] = side
            after[tuple(face)] = numbers[tuple(face)]

    def free() -> None:
        for _, _, *types in faces:
            for datatype in types:
                datatype.Free()
        graph.Free()
        grid.Free()

    return Exchange(
        f"halo {n}^3", flat(before), flat(after), None, sends, receives,
        lambda buffer, _: graph.Neighbor_alltoallw(w_arguments(buffer, out), w_arguments(buffer, into)),
        lambda send, receive: graph.Neighbor_alltoallv(v_arguments(mpi, send), v_arguments(mpi, receive)),
        free,
    )  # fmt: skip


def redistribution(mpi: Any, world: Any, name: str, before: np.ndarray, after: np.ndarray, sides: list) -> Exchange:
    """An Alltoallw with one datatype per peer; `sides` = per direction (datatypes, parts)."""
    (out, sends), (into, receives) = sides

    def free() -> None:
        for made in (*out, *into):
            made.Free()

    return Exchange(
        name, flat(before), flat(after), np.zeros(after.nbytes, np.uint8), sends, receives,
        lambda send, receive: world.Alltoallw(w_arguments(send, out), w_arguments(receive, into)),
        lambda send, receive: world.Alltoallv(v_arguments(mpi, send), v_arguments(mpi, receive)),
        free,
    )  # fmt: skip


def pencil(mpi: Any, world: Any, n: int) -> Exchange:
    """An n³ array of doubles, split along axis 1 before and along axis 2 after: blocks of n / ranks numbers."""
    p, r, m = world.size, world.rank, n // world.size
    whole = np.arange(n**3, dtype="d").reshape(n, n, n)
    mine = slice(r * m, r * m + m)

    def part(shape: list[int], axis: int, k: int) -> Any:
        start = [0, 0, 0]
        start[axis] = k * m
        return mpi.DOUBLE.Create_subarray(shape, [n, m, m], start).Commit()

    out, into = [part([n, m, n], 2, k) for k in range(p)], [part([n, n, m], 1, k) for k in range(p)]
    sends = [(Layout("out", 8 * m, ((n, 8 * m * n), (m, 8 * n))), 8 * k * m) for k in range(p)]
    receives = [(Layout("in", 8 * m * m, ((n, 8 * n * m),)), 8 * k * m * m) for k in range(p)]
    sides = [(out, sends), (into, receives)]
    return redistribution(mpi, world, f"pencil {n}^3", whole[:, mine, :], whole[:, :, mine], sides)


def transpose(mpi: Any, world: Any, n: int) -> Exchange:
    """An n × n matrix of doubles and its transpose, both split by rows: single elements on the sending side."""
    p, r, m = world.size, world.rank, n // world.size
    whole = np.arange(n * n, dtype="d").reshape(n, n)
    mine = slice(r * m, r * m + m)
    column = mpi.DOUBLE.Create_vector(m, 1, n)
    columns = column.Create_hvector(m, 1, 8)
    out = [columns.Create_hindexed([1], [8 * k * m]).Commit() for k in range(p)]
    into = [mpi.DOUBLE.Create_subarray([m, n], [m, m], [0, k * m]).Commit() for k in range(p)]
    for made in (columns, column):
        made.Free()
    sends = [(Layout("out", 8, ((m, 8), (m, 8 * n))), 8 * k * m) for k in range(p)]
    receives = [(Layout("in", 8 * m, ((m, 8 * n),)), 8 * k * m) for k in range(p)]
    sides = [(out, sends), (into, receives)]
    return redistribution(mpi, world, f"transpose {n}^2", whole[mine], whole[:, mine].T, sides)


def measure(mpi: Any, world: Any, where: Room, exchange: Exchange, preload: Preload, repeats: int) -> dict:
    """One row: microseconds by way, wrong bytes by way (summed over ranks)."""
    source = where.empty(exchange.before.size)
    target = source if exchange.into is None else where.empty(exchange.into.size)
    send, receive = Batch(where, source, exchange.sends), Batch(where, target, exchange.receives)
    forced = preload.present and where.on_card
    ways = [*((*PRELOAD, IPC) if forced else PRELOAD[:1]), *(way for way in send.ways() if way in receive.ways())]
    buffers = (source.mpi(mpi), target.mpi(mpi))

    def once(way: str) -> None:
        if way not in RIVALS:
            exchange.typed(*buffers)
        else:
            send.pack(way)
            exchange.bytes_(send, receive)
            receive.unpack(way)

    on_host = _on_host(mpi, exchange)
    row: dict = {
        "name": exchange.name, "size": sum(send.counts), "blocks": send.blocks + receive.blocks, "wrong": {},
        "different from the CPU": 0,
    }  # fmt: skip
    for way in list(ways):
        reset(exchange, source, target)
        preload.take(way)
        moved, slabs = preload.counted("bytes"), preload.counted("slabs")
        once(way)
        got = target.read()
        row["wrong"][way] = world.allreduce(int((got != exchange.after).sum()))
        row["different from the CPU"] += world.allreduce(int((got != on_host).sum()))
        if forced and way not in RIVALS and preload.counted("bytes") == moved:
            raise SystemExit(f"mpi_gpu_collectives: the preload moved nothing in {exchange.name} by {way}")
        if way == IPC and world.allreduce(preload.counted("slabs") - slabs):
            ways.remove(IPC)  # through host memory after all: some rank cannot open another's memory
    times = timed(world, mpi, where, ways, once, preload.take, repeats)
    row["samples"] = times
    spreads = {way: median_interval(values) for way, values in times.items()}
    row["us"] = {way: [spread.median, spread.low, spread.high] for way, spread in spreads.items()}
    preload.take("auto")
    exchange.free()
    return row


def reset(exchange: Exchange, source: Buffer, target: Buffer) -> None:
    source.write(exchange.before)
    if exchange.into is not None:
        target.write(exchange.into)


def _on_host(mpi: Any, exchange: Exchange) -> np.ndarray:
    """The same call on host arrays."""
    source = exchange.before.copy()
    target = source if exchange.into is None else exchange.into.copy()
    exchange.typed(source, target)
    return target


COLUMNS = (*PRELOAD, IPC, *RIVALS)


def line(row: dict) -> str:
    us = {way: values[0] for way, values in row["us"].items()}
    cells = " ".join(f"{us[way]:>10.1f}" if way in us else f"{'-':>10}" for way in COLUMNS)
    ratios = " ".join(f"{us[way] / us['auto']:>8.2f}" if way in us else f"{'-':>8}" for way in RIVALS)
    bad = [way for way, wrong in row["wrong"].items() if wrong]
    other = " DIFFERENT FROM THE CPU" if row["different from the CPU"] else ""
    return f"{row['name']:<16} {row['size'] / 1024:>9.0f} {row['blocks']:>8} {cells} {ratios}" + (
        f" WRONG {','.join(bad)}{other}" if bad or other else ""
    )


HEAD = f"{'case':<16} {'KiB/rank':>9} {'blocks':>8} " + " ".join(f"{way:>10}" for way in COLUMNS)


def main(argv: list[str] | None = None) -> int:
    from mpi4py import MPI

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--cells", type=int, nargs="*", default=[32, 64, 128, 256], help="of the halo, per side and rank"
    )
    parser.add_argument("--pencils", type=int, nargs="*", default=[32, 64, 128, 256], help="sides of the cubes")
    parser.add_argument("--transposes", type=int, nargs="*", default=[256, 1024, 4096], help="sides of the matrices")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop starting cases after this long")
    parser.add_argument("--device", choices=["cuda", "driver", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, help="folder for the JSON file")
    options = parser.parse_args(argv)
    world, preload = MPI.COMM_WORLD, Preload()
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    if options.device != "cpu" and not preload.present:
        sys.stderr.write("mpi_gpu_collectives: no preload here; start it by `undertow mpi run -- mpirun -n 2 …`\n")
        return 2
    where = room(node.rank, options.device)
    node.Free()
    cards = world.gather(where.card)
    library = MPI.Get_library_version().splitlines()[0].rstrip("\0")
    about = [library, *(f"rank {rank}: {card}" for rank, card in enumerate(cards or ()))]
    data = mpi_gpu_pages.begun(
        "mpi_gpu_collectives", "undertow mpi run -- mpirun --oversubscribe -n 2 ", options.repeats, about
    )
    if cards is not None:
        sys.stdout.write(f"{facts.hardware()}; {library[:60]}\n")
        sys.stdout.write("".join(f"rank {rank}: {card}\n" for rank, card in enumerate(cards)))
        sys.stdout.write(f"{HEAD}   (us)  hand/auto kern/auto block/auto\n")
        sys.stdout.flush()
    cases = [(halo, n) for n in options.cells]
    cases += [(make, n) for make, sizes in ((pencil, options.pencils), (transpose, options.transposes)) for n in sizes]
    began, rows = time.monotonic(), data["rows"]
    for make, n in cases:
        if (make is not halo and n % world.size) or world.bcast(time.monotonic() - began > options.seconds):
            continue
        rows.append(measure(MPI, world, where, make(MPI, world, n), preload, options.repeats))
        if world.rank == 0:
            sys.stdout.write(line(rows[-1]) + "\n")
            sys.stdout.flush()
            if options.output:
                mpi_gpu_pages.save(data, options.output / "mpi_gpu_collectives.json")
    if cards is not None and options.output and rows:
        mpi_gpu_pages.write(data, options.output / "mpi_gpu_collectives.json")
    return 1 if any(any(row["wrong"].values()) or row["different from the CPU"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
