"""A 3-D stencil whose halo is exchanged with subarray datatypes, with and without the MPI interposer.

    mpirun -n 4 python -m undertow.examples.halo3d                the exchange, checked and timed
    python -m undertow.examples.halo3d --compare --ranks 4        both ways, a table and (with --plot FILE) a plot

Each rank owns n³ cells of a periodic grid and a ghost layer; the six faces are MPI_Type_create_subarray types, so the
x faces are n² blocks of one cell. The program never packs anything itself and knows nothing of the interposer: the
comparison starts it twice, plain and through `undertow mpi run`. Times are the median exchange of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np


def face_types(mpi, n: int, width: int) -> list[tuple]:
    """(axis, direction, send type, receive type) of the six faces of an (n + 2 width)³ array of doubles."""
    whole = [n + 2 * width] * 3
    faces = []
    for axis in range(3):
        for direction in (-1, 1):
            part, inner, ghost = [n] * 3, [width] * 3, [width] * 3
            part[axis] = width
            inner[axis] = width if direction < 0 else n
            ghost[axis] = 0 if direction < 0 else n + width
            made = [mpi.DOUBLE.Create_subarray(whole, part, start).Commit() for start in (inner, ghost)]
            faces.append((axis, direction, *made))
    return faces


def exchange(mpi, grid, field: np.ndarray, faces: list[tuple]) -> None:
    """All six faces at once: what goes to one side arrives in the neighbour's opposite ghost layer."""
    requests = []
    for axis, direction, _, ghost in faces:
        source = grid.Shift(axis, direction)[1]
        requests.append(grid.Irecv([field, 1, ghost], source, tag=2 * axis + (direction < 0)))
    for axis, direction, inner, _ in faces:
        target = grid.Shift(axis, direction)[1]
        requests.append(grid.Isend([field, 1, inner], target, tag=2 * axis + (direction > 0)))
    mpi.Request.Waitall(requests)


def value(coords: list[int], n: int, dims: list[int]) -> Callable:
    """The cell's global number, periodic: every ghost cell has one right value."""

    def at(i, j, k):
        x, y, z = ((c * n + v) % (d * n) for c, v, d in zip(coords, (i, j, k), dims))
        return (x * dims[1] * n + y) * dims[2] * n + z

    return at


def check(field: np.ndarray, coords: list[int], n: int, width: int, dims: list[int]) -> int:
    """Number of wrong face ghosts."""
    axes = [np.arange(-width, n + width)] * 3
    want = value(coords, n, dims)(*np.meshgrid(*axes, indexing="ij")).astype("d")
    wrong = 0
    for axis in range(3):
        for side in (slice(0, width), slice(n + width, None)):
            place = [slice(width, n + width)] * 3
            place[axis] = side
            wrong += int((field[tuple(place)] != want[tuple(place)]).sum())
    return wrong


def step(field: np.ndarray, width: int) -> np.ndarray:
    """One Jacobi sweep of the seven-point stencil over the inner cells (width 1)."""
    c = slice(width, -width)
    total = field[c, c, c].copy()
    for axis in range(3):
        for shift in (-1, 1):
            place: list[slice] = [c] * 3
            stop = shift - width
            place[axis] = slice(width + shift, stop) if stop else slice(width + shift, None)
            total += field[tuple(place)]
    return total / 7


def run(n: int, width: int, steps: int) -> None:
    """The program of one rank."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    dims = MPI.Compute_dims(world.size, 3)
    grid = world.Create_cart(dims, periods=[True] * 3)
    coords = grid.coords
    field = np.full([n + 2 * width] * 3, -1.0)
    inner = slice(width, n + width)
    field[inner, inner, inner] = value(coords, n, dims)(*np.meshgrid(*[np.arange(n)] * 3, indexing="ij"))
    faces = face_types(MPI, n, width)
    exchange(MPI, grid, field, faces)
    wrong = world.allreduce(check(field, coords, n, width, dims))
    times = []
    for _ in range(steps):
        field[inner, inner, inner] = step(field, width)
        world.Barrier()
        start = time.perf_counter()
        exchange(MPI, grid, field, faces)
        times.append(world.allreduce(time.perf_counter() - start, MPI.MAX))
    for _, _, *types in faces:
        for datatype in types:
            datatype.Free()
    if world.rank == 0:
        bytes_out = 6 * n * n * width * 8
        result = {"n": n, "ranks": world.size, "wrong": wrong, "median_s": statistics.median(times), "bytes": bytes_out}
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()
    if wrong:
        world.Abort(1)


def measured(mode: str, ranks: int, n: int, steps: int, mpirun: list[str]) -> dict:
    """One run of this program under `undertow mpi run --mode MODE`; mode 'off' is the plain program."""
    program = [sys.executable, "-m", "undertow.examples.halo3d", "--cells", str(n), "--steps", str(steps)]
    command = [
        sys.executable,
        "-m",
        "undertow",
        "mpi",
        "run",
        "--mode",
        mode,
        "--",
        *mpirun,
        "-n",
        str(ranks),
        *program,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    if done.returncode:
        raise SystemExit(f"halo3d: mode {mode} failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def compare(ranks: int, cells: list[int], steps: int, mpirun: list[str], plot: str | None) -> None:
    """Plain, automatic and forced for each size, each run twice in turn; A/A is the ratio of the two plain runs."""
    rows = []
    sys.stdout.write(
        f"{'cells':>6} {'plain us':>10} {'A/A':>6} {'auto us':>10} {'gain':>6} {'force us':>10} {'gain':>6}\n"
    )
    for n in cells:
        order = ("off", "auto", "force", "force", "auto", "off")
        runs = [(mode, measured(mode, ranks, n, steps, mpirun)["median_s"] * 1e6) for mode in order]
        best = {mode: min(us for m, us in runs if m == mode) for mode in ("off", "auto", "force")}
        plain = [us for m, us in runs if m == "off"]
        rows.append((n, best))
        sys.stdout.write(
            f"{n:>6} {best['off']:>10.1f} {max(plain) / min(plain):>6.2f} {best['auto']:>10.1f} "
            f"{best['off'] / best['auto']:>6.2f} {best['force']:>10.1f} {best['off'] / best['force']:>6.2f}\n"
        )
        sys.stdout.flush()
    if plot:
        draw(rows, ranks, plot)


def draw(rows: list[tuple], ranks: int, target: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for mode, label in (("off", "library"), ("auto", "interposed, auto"), ("force", "interposed, force")):
        axes.plot([n for n, _ in rows], [best[mode] for _, best in rows], marker="o", label=label)
    axes.set(xlabel="cells per side and rank", ylabel="exchange (us)", xscale="log", yscale="log")
    axes.set_title(f"3-D halo exchange, {ranks} ranks")
    axes.legend()
    figure.savefig(target, dpi=150, bbox_inches="tight")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cells", type=int, nargs="+", default=[32], help="cells per side and rank")
    parser.add_argument("--width", type=int, default=1, help="ghost layers")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--compare", action="store_true", help="start mpirun with and without the interposer")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--mpirun", default="mpirun", help="launcher with its options")
    parser.add_argument("--plot", help="write a PNG (needs matplotlib)")
    options = parser.parse_args(argv)
    if options.compare:
        compare(options.ranks, options.cells, options.steps, options.mpirun.split(), options.plot)
    else:
        run(options.cells[0], options.width, options.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
