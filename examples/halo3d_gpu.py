"""The 3-D halo exchange with the field on a GPU, through an MPI that knows nothing of GPUs.

    undertow mpi run -- mpirun -n 2 python -m undertow.examples.halo3d_gpu                with torch
    undertow mpi run -- mpirun -n 2 python -m undertow.examples.halo3d_gpu --library cupy

The datatypes and the exchange are halo3d's; the field lives on the device, and mpi4py gets it as it is. Without the
preload a library that is not CUDA-aware would crash on it. Every rank also computes the same steps on the CPU with
the same exchange, and the two fields must be equal, bit by bit (both add in the same order and multiply once). Ranks
may share a device: rank r works on device r mod count, and the result names them all. `--device cpu` runs the same
program without a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from undertow.examples.halo3d import check, exchange, face_types, value


def on_torch(device: str, rank: int) -> tuple[Callable, Callable, Callable, str]:
    """(host array to field, field to host array, wait until the field is written, the device's name)."""
    import torch

    if device == "cpu":
        return (lambda host: torch.from_numpy(host.copy()), lambda field: field.numpy().copy(), lambda: None, "cpu")
    place = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(place)
    return (
        lambda host: torch.from_numpy(host).to(place),
        lambda field: field.cpu().numpy(),
        lambda: torch.cuda.synchronize(place),
        f"{place} {torch.cuda.get_device_name(place)}",
    )


def on_cupy(device: str, rank: int) -> tuple[Callable, Callable, Callable, str]:
    """The same with cupy arrays."""
    if device == "cpu":
        raise SystemExit("halo3d_gpu: cupy has no arrays on the CPU; use --library torch with --device cpu")
    import cupy

    place = rank % cupy.cuda.runtime.getDeviceCount()
    cupy.cuda.Device(place).use()
    name = f"cuda:{place} {cupy.cuda.runtime.getDeviceProperties(place)['name'].decode()}"
    return cupy.asarray, cupy.asnumpy, lambda: cupy.cuda.get_current_stream().synchronize(), name


def sweep(field: Any, width: int) -> None:
    """One Jacobi sweep of the seven-point stencil over the inner cells, in place; for numpy, torch and cupy alike."""
    c = slice(width, -width)
    total = field[c, c, c] + 0
    for axis in range(3):
        for shift in (-1, 1):
            place: list[slice] = [c] * 3
            stop = shift - width
            place[axis] = slice(width + shift, stop) if stop else slice(width + shift, None)
            total += field[tuple(place)]
    field[c, c, c] = total * (1 / 7)


def run(n: int, width: int, steps: int, library: str, device: str) -> dict:
    """The program of one rank; the result is the same on all ranks."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    to_field, to_host, wait, card = (on_torch if library == "torch" else on_cupy)(device, world.rank)
    dims = MPI.Compute_dims(world.size, 3)
    grid = world.Create_cart(dims, periods=[True] * 3)
    host = np.full([n + 2 * width] * 3, -1.0)
    inner = slice(width, n + width)
    host[inner, inner, inner] = value(grid.coords, n, dims)(*np.meshgrid(*[np.arange(n)] * 3, indexing="ij"))
    field, faces = to_field(host), face_types(MPI, n, width)
    wait()
    exchange(MPI, grid, field, faces)
    exchange(MPI, grid, host, faces)
    wrong = world.allreduce(check(to_host(field), grid.coords, n, width, dims))
    times = []
    for _ in range(steps):
        sweep(field, width)
        sweep(host, width)
        wait()
        world.Barrier()
        start = time.perf_counter()
        exchange(MPI, grid, field, faces)
        times.append(world.allreduce(time.perf_counter() - start, MPI.MAX))
        exchange(MPI, grid, host, faces)
    different = world.allreduce(int((to_host(field) != host).sum()))
    for _, _, *types in faces:
        for datatype in types:
            datatype.Free()
    return {
        "n": n, "ranks": world.size, "library": library, "device": device, "wrong": wrong,
        "different from the CPU": different, "median_s": statistics.median(times), "rank": world.rank,
        "cards": world.allgather(card),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cells", type=int, default=64, help="cells per side and rank")
    parser.add_argument("--width", type=int, default=1, help="ghost layers")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--library", choices=["torch", "cupy"], default="torch")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args(argv)
    result = run(options.cells, options.width, options.steps, options.library, options.device)
    if result.pop("rank") == 0:
        sys.stdout.write(json.dumps(result) + "\n")
    return 1 if result["wrong"] or result["different from the CPU"] else 0


if __name__ == "__main__":
    sys.exit(main())
