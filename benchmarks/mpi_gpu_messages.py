"""Messages of device buffers between two ranks: under the preload, staged by hand, and one copy per block.

    undertow mpi run -- mpirun -n 2 python -m undertow.benchmarks.mpi_gpu_messages [--output FOLDER]

The ways of benchmarks/mpi_gpu_collectives to the same bytes, in one run, in turn, each checked first: MPI_Send and
MPI_Recv of the device buffer with its datatype by each path of the preload (auto, direct, staged), what a user writes
without it (by hand with torch, and with kernels of one's own), and a copy per contiguous block. Ping-pong halves and
exchanges of six faces, medians of the slower rank. Rank r of a host works on card r mod count, so that both share the
only card of a machine with one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from undertow.benchmarks import facts, mpi_gpu_pages
from undertow.benchmarks.intervals import median_interval
from undertow.benchmarks.mpi_gpu_rivals import Layout
from undertow.benchmarks.mpi_gpu_rooms import PRELOAD, RIVALS, Batch, Preload, Room, room, timed
from undertow.examples.halo3d import face_types

KIB, MIB = 1 << 10, 1 << 20
REPEATS = 11
WAYS = (*PRELOAD, *RIVALS)


class Setting:
    """What every case needs: the ranks, this rank's memory, the preload."""

    def __init__(self, mpi: Any, device: str, repeats: int) -> None:
        self.mpi, self.world, self.preload, self.repeats = mpi, mpi.COMM_WORLD, Preload(), repeats
        self.where: Room = room(mpi.COMM_WORLD.rank, device)

    def row(
        self, name: str, batch: Batch, once: Callable[[str], None], wrong: Callable[[str], int], share: float
    ) -> dict:
        """Each way's answer looked at by `wrong`, then its time: microseconds (median, low, high) times `share`."""
        forced = self.preload.present and self.where.on_card
        ways = [*(PRELOAD if forced else PRELOAD[:1]), *batch.ways()]
        row: dict = {"name": name, "size": sum(batch.counts), "blocks": batch.blocks, "wrong": {}, "us": {}}
        for way in ways:
            self.preload.take(way)
            row["wrong"][way] = self.world.allreduce(wrong(way))
        times = timed(self.world, self.mpi, self.where, ways, once, self.preload.take, self.repeats)
        row["samples"] = {way: [share * us for us in values] for way, values in times.items()}
        for way, values in row["samples"].items():
            spread = median_interval(values)
            row["us"][way] = [spread.median, spread.low, spread.high]
        self.preload.take("auto")
        return row


def datatype_of(mpi: Any, layout: Layout) -> Any:
    """The layout as an MPI datatype made of hvectors."""
    made = mpi.BYTE.Create_contiguous(layout.block)
    for count, stride in reversed(layout.dims):
        made = made.Create_hvector(count, 1, stride)
    return made.Commit()


def ping_pong(setting: Setting, layout: Layout) -> dict:
    """Half a round trip of one layout by every way."""
    world, mpi, where = setting.world, setting.mpi, setting.where
    peer, datatype = 1 - world.rank, datatype_of(setting.mpi, layout)
    buffer = where.empty(layout.span)
    message, batch = [buffer.mpi(mpi), 1, datatype], Batch(where, buffer, [(layout, 0)])
    dense = [batch.host, layout.size, mpi.BYTE]

    def send(way: str) -> None:
        if way in RIVALS:
            batch.pack(way)
        world.Send(dense if way in RIVALS else message, peer)

    def receive(way: str) -> None:
        world.Recv(dense if way in RIVALS else message, peer)
        if way in RIVALS:
            batch.unpack(way)

    def once(way: str) -> None:
        for act in (send, receive) if world.rank == 0 else (receive, send):
            act(way)

    inside = np.zeros(layout.span, bool)
    inside[places(layout)] = True

    def wrong(way: str) -> int:
        """Rank 0's bytes to rank 1 and back: both end with them inside the layout, and with their own elsewhere."""
        rng = np.random.default_rng(5)
        first, second = (rng.integers(0, 256, layout.span, dtype=np.uint8) for _ in range(2))
        mine = first if world.rank == 0 else second
        buffer.write(mine)
        once(way)
        return int((buffer.read() != np.where(inside, first, mine)).sum())

    row = setting.row(layout.name, batch, once, wrong, 0.5)
    datatype.Free()
    return row


def places(layout: Layout) -> np.ndarray:
    """The byte offsets that belong to the layout."""
    at = np.arange(layout.block)
    for count, stride in reversed(layout.dims):
        at = (np.arange(count) * stride)[:, None] + at[None, :]
        at = at.reshape(-1)
    return at


def halo(setting: Setting, n: int) -> dict:
    """The exchange of examples/halo3d on a device field: two ranks along one axis, each itself along the others."""
    world, mpi, where = setting.world, setting.mpi, setting.where
    edge = n + 2
    row_bytes, plane = 8 * edge, 8 * edge * edge
    grid = world.Create_cart(mpi.Compute_dims(world.size, 3), periods=[True] * 3)
    shapes = [
        Layout("x", 8 * n, ((n, row_bytes),)),
        Layout("y", 8 * n, ((n, plane),)),
        Layout("z", 8, ((n, plane), (n, row_bytes))),
    ]
    faces, inner_parts, ghost_parts = face_types(mpi, n, 1), [], []
    for axis, direction, *_ in faces:
        for parts, at_axis in ((inner_parts, 1 if direction < 0 else n), (ghost_parts, 0 if direction < 0 else n + 1)):
            at = [1, 1, 1]
            at[axis] = at_axis
            parts.append((shapes[axis], at[0] * plane + at[1] * row_bytes + at[2] * 8))
    field = where.empty(8 * edge**3)
    view, out, into = field.mpi(mpi), Batch(where, field, inner_parts), Batch(where, field, ghost_parts)
    peers = [grid.Shift(axis, direction)[1] for axis, direction, *_ in faces]

    def exchange(way: str, whole: Any = view) -> None:
        rival, requests = way in RIVALS, []
        for k, (axis, direction, _, ghost) in enumerate(faces):
            place = [into.part(k), into.counts[k], mpi.BYTE] if rival else [whole, 1, ghost]
            requests.append(grid.Irecv(place, peers[k], 2 * axis + (direction < 0)))
        if rival:
            out.pack(way)
        for k, (axis, direction, inner, _) in enumerate(faces):
            message = [out.part(k), out.counts[k], mpi.BYTE] if rival else [whole, 1, inner]
            requests.append(grid.Isend(message, peers[k], 2 * axis + (direction > 0)))
        mpi.Request.Waitall(requests)
        if rival:
            into.unpack(way)

    start = np.arange(edge**3, dtype="d") + world.rank * 0.5
    want = start.copy()
    exchange("auto", want)  # the same calls on a host array

    def wrong(way: str) -> int:
        field.write(start)
        exchange(way)
        return int((field.read("d") != want).sum())

    row = setting.row(f"halo {n}^3", out, exchange, wrong, 1.0)
    for _, _, *types in faces:
        for datatype in types:
            datatype.Free()
    grid.Free()
    return row


def layouts() -> list[Layout]:
    out = [Layout(f"contiguous {s >> 10} KiB", s, ((1, s),)) for s in (KIB, 64 * KIB, 1 * MIB, 16 * MIB)]
    for block in (8, 64, 512, 4096):
        sizes = [s for s in (4 * KIB, 64 * KIB, 1 * MIB, 16 * MIB) if s > block]
        out += [Layout(f"{block} B blocks, {s >> 10} KiB", block, ((s // block, 2 * block),)) for s in sizes]
    return out


def line(row: dict) -> str:
    us = {way: values[0] for way, values in row["us"].items()}
    cells = " ".join(f"{us[way]:>10.1f}" if way in us else f"{'-':>10}" for way in WAYS)
    ratios = " ".join(f"{us[way] / us['auto']:>8.2f}" if way in us else f"{'-':>8}" for way in RIVALS)
    bad = [way for way, wrong in row["wrong"].items() if wrong]
    return f"{row['name']:<26} {row['blocks']:>8} {cells} {ratios}{' WRONG ' + ','.join(bad) if bad else ''}"


def main(argv: list[str] | None = None) -> int:
    from mpi4py import MPI

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cells", type=int, nargs="*", default=[32, 64, 128, 256])
    parser.add_argument("--most", type=int, default=16 * MIB, help="no messages of more bytes than this")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop starting cases after this long")
    parser.add_argument("--device", choices=["cuda", "driver", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, help="folder for the JSON file")
    options = parser.parse_args(argv)
    world = MPI.COMM_WORLD
    if world.size != 2 or (options.device != "cpu" and not Preload().present):
        sys.stderr.write("mpi_gpu_messages needs two ranks under the preload: undertow mpi run -- mpirun -n 2 …\n")
        return 2
    setting, began = Setting(MPI, options.device, options.repeats), time.monotonic()
    cards, library = world.gather(setting.where.card), MPI.Get_library_version().splitlines()[0].rstrip("\0")
    about = [library, *(f"rank {rank}: {card}" for rank, card in enumerate(cards or ()))]
    data = mpi_gpu_pages.begun(
        "mpi_gpu_messages", "undertow mpi run -- mpirun --oversubscribe -n 2 ", options.repeats, about
    )
    rows = data["rows"]
    if cards is not None:
        sys.stdout.write(f"{facts.hardware()}; {library[:60]}\n")
        sys.stdout.write("".join(f"rank {rank}: {card}\n" for rank, card in enumerate(cards)))
        titles = " ".join(f"{way:>10}" for way in WAYS)
        sys.stdout.write(f"{'case':<26} {'blocks':>8} {titles}   (us)  hand/auto kern/auto block/auto\n")
    cases: list[Callable[[], dict]] = [lambda n=n: halo(setting, n) for n in options.cells]
    cases += [lambda x=x: ping_pong(setting, x) for x in layouts() if x.size <= options.most]
    for case in cases:
        if world.bcast(time.monotonic() - began > options.seconds):
            break
        rows.append(case())
        if world.rank == 0:
            sys.stdout.write(line(rows[-1]) + "\n")
            sys.stdout.flush()
            if options.output:
                mpi_gpu_pages.save(data, options.output / "mpi_gpu_messages.json")
    if cards is not None and options.output and rows:
        mpi_gpu_pages.write(data, options.output / "mpi_gpu_messages.json")
    return 1 if any(any(row["wrong"].values()) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
