"""Alltoallw and Neighbor_alltoallw whose blocks go through memory of other ranks (UNDERTOW_MPI_IPC=1): the rules.

With `unserved` in the environment (IPC_REFUSED=1) the same calls must give the same, through the library. `pinned`
counts the slabs that messages through the library take: none is taken by a call whose blocks all go the other way.

With UNDERTOW_MPI_IPC=auto the rules of AUTO hold: small blocks keep to the library.

usage: device_ipc.py [NAME …]
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parent))

from device_messages import Mine, blank, comm, data, device, rank, size
from rule_loop import keep

REFUSED = os.environ.get("IPC_REFUSED") == "1"
N = 12
preload = ctypes.CDLL(None)


def pinned() -> int:
    values = (ctypes.c_int64 * 5)()
    preload.undertow_measure_gpu_counters(values)
    return values[4]


def device_bytes() -> int:
    """Device memory of this process; not known on a GPU, where 0 stands for it."""
    if not device.is_fake:
        return 0
    device.cuda.fake_cuda_device_bytes.restype = ctypes.c_ulong
    return device.cuda.fake_cuda_device_bytes()


def squares() -> tuple[list, list]:
    """Datatypes of an Alltoallw that transposes: columns go out, rows come in."""
    column = MPI.INT.Create_vector(N, 1, size).Commit()
    return [column] * size, [MPI.INT.Create_contiguous(N).Commit() for _ in range(size)]


def transposed(on: MPI.Comm, out: list, into: list, turn: int, send_on: bool = True, receive_on: bool = True) -> int:
    """One call, its result compared; gives back how many pinned slabs it took."""
    mine, got = Mine(data(rank, N * size) + turn, send_on), Mine(blank(N * size), receive_on)
    before = pinned()
    on.Alltoallw(
        [mine.mpi(), [1] * size, [4 * r for r in range(size)], out],
        [got.mpi(), [1] * size, [4 * N * r for r in range(size)], into],
    )
    took = pinned() - before
    want = np.concatenate([data(r, N * size)[rank::size] + turn for r in range(size)])
    assert np.array_equal(got.read(), want), turn
    return took


def blocks_go_without_the_library() -> None:
    """Many turns, so that both halves are used again, with ranks that arrive at different times."""
    out, into = squares()
    for turn in range(40):
        if turn % 3 == rank % 3:
            sum(range(20000))
        took = transposed(comm, out, into, turn)
        assert (took == 0) is not REFUSED, (turn, took)


def either_side_may_be_on_the_host() -> None:
    """The sender alone decides: nothing of a host buffer is offered, and a host buffer takes what is."""
    out, into = squares()
    new = comm.Dup()
    assert transposed(new, out, into, 0, rank % 2 == 0, True) >= 0
    for turn in range(1, 6):
        transposed(new, out, into, turn, rank % 2 == turn % 2, rank % 2 == 0)
        transposed(new, out, into, turn, True, False)
        transposed(new, out, into, turn, False, False)
    new.Free()


def it_begins_when_every_rank_has_device_memory() -> None:
    """Calls 1 and 2 ask in vain; the 4th does not, and the 5th is served."""
    out, into = squares()
    new = comm.Dup()
    for turn in range(3):
        transposed(new, out, into, turn, rank > 0, rank > 0)
    took = [transposed(new, out, into, turn) for turn in range(3, 6)]
    assert (took == [0, 0, 0]) is not REFUSED, took
    new.Free()


def large_blocks_go_through_the_library() -> None:
    """What does not fit in the slab (UNDERTOW_MPI_IPC_MB=1 here), beside small blocks that do."""
    counts = [(1 << 18) + 5 if (r + rank) % 2 else 7 for r in range(size)]
    places = [4 * (1 << 19) * r for r in range(size)]
    total = (1 << 19) * size
    for turn in range(3):
        mine, got = Mine(data(rank, total) + turn), Mine(blank(total))
        types = [MPI.INT] * size
        comm.Alltoallw([mine.mpi(), counts, places, types], [got.mpi(), counts, places, types])
        want = blank(total)
        for r in range(size):
            first = (1 << 19) * r
            place = slice(first, first + counts[r])
            want[place] = (data(r, total) + turn)[(1 << 19) * rank : (1 << 19) * rank + counts[r]]
        assert np.array_equal(got.read(), want), turn


def slabs_grow() -> None:
    """They begin with a quarter of the most, and hold larger blocks from the call on that follows the first of these;
    with neighbours from the next eighth call on."""
    everyone, ring, before = comm.Dup(), comm.Create_cart([size], [True]), device_bytes()
    out, into = squares()
    transposed(everyone, out, into, 0)
    assert REFUSED or device_bytes() - before <= 256 + (512 << 10), device_bytes() - before
    count = (300 << 10) // 4
    for on, n, call in ((everyone, size, "Alltoallw"), (ring, 2, "Neighbor_alltoallw")):
        total, took = count * n, []
        for turn in range(10):
            mine, got = Mine(data(rank, total) + turn), Mine(blank(total))
            few = 10 if turn < 2 else count
            ends = [[few] * n, [4 * count * r for r in range(n)], [MPI.INT] * n]
            begun = pinned()
            getattr(on, call)([mine.mpi(), *ends], [got.mpi(), *ends])
            took.append(pinned() > begun)
            if on is everyone:
                for r in range(size):
                    want = (data(r, total) + turn)[count * rank :][:few]
                    assert np.array_equal(got.read()[count * r :][:few], want), (turn, r)
        first, last = (3, 10) if on is everyone else (9, 10)
        assert REFUSED or (took[2] and not any(took[first:last])), took
    grown = device_bytes() - before
    assert REFUSED or not device.is_fake or 2 * (600 << 10) <= grown <= 2 * (256 + (2 << 20)) + 8 * total, grown
    everyone.Free()
    ring.Free()


def grids_and_graphs() -> None:
    """A ring with itself twice as neighbour when two ranks, an open line, and a one-way graph; kinds in turn."""
    column = MPI.DOUBLE.Create_vector(N, 1, N + 2).Commit()
    pair = [column] * 2
    left, right = (rank - 1) % size, (rank + 1) % size
    graph = comm.Create_dist_graph_adjacent([right, left], [left, right])
    line = comm.Create_cart([size], [False])
    one_way = comm.Create_dist_graph_adjacent([left], [right])
    out, into = squares()
    for turn in range(5):
        field = np.full((N, N + 2), -1.0)
        field[:, 1:-1] = 10 * rank + turn
        for who in (graph, line):
            mine = Mine(field)
            ghosts = [8 * (N + 1), 0] if who is graph else [0, 8 * (N + 1)]  # the graph's sources: right, left
            ends = [mine.mpi(), [1, 1], [8, 8 * N], pair], [mine.mpi(), [1, 1], ghosts, pair]
            who.Neighbor_alltoallw(*ends)
            got = mine.read().reshape(N, N + 2)
            ring = who is graph
            assert (got[:, 0] == (10 * left + turn if ring or rank > 0 else -1)).all(), turn
            assert (got[:, -1] == (10 * right + turn if ring or rank < size - 1 else -1)).all(), turn
            assert (got[:, 1:-1] == 10 * rank + turn).all()
        mine, got = Mine(data(rank) + turn), Mine(blank())
        one_way.Neighbor_alltoallw([mine.mpi(), [50], [40], [MPI.INT]], [got.mpi(), [50], [80], [MPI.INT]])
        want = blank()
        want[20:70] = (data(left) + turn)[10:60]
        assert np.array_equal(got.read(), want)
        transposed(line, out, into, turn)
        transposed(line, out, into, turn + 1)
    for made in (graph, line, one_way):
        made.Free()
    column.Free()


def more_communicators_than_slabs() -> None:
    out, into = squares()
    for turn in range(12):
        new = comm.Dup()
        transposed(new, out, into, turn)
        transposed(new, out, into, turn + 1)
        new.Free()


def a_rank_without_neighbours_takes_part() -> None:
    """It has no arrays to pass."""
    lone = comm.Create_dist_graph_adjacent([rank] * (rank > 0), [rank] * (rank > 0))
    for turn in range(4):
        mine, got = Mine(data(rank) + turn), Mine(blank())
        words = ([50], [40], [MPI.INT]), ([50], [80], [MPI.INT])
        send, receive = words if rank else (([], [], []), ([], [], []))
        lone.Neighbor_alltoallw([mine.mpi(), *send], [got.mpi(), *receive])
        if rank:
            assert np.array_equal(got.read()[20:70], (data(rank) + turn)[10:60]), turn
    lone.Free()


def automatic_leaves_small_blocks_to_the_library() -> None:
    out, into = squares()
    assert all(transposed(comm, out, into, turn) > 0 for turn in range(6))


def automatic_agrees_on_large_blocks() -> None:
    """Served or not, as the trial of this machine found: on all ranks alike, and small blocks on the same communicator
    stay with the library."""
    count = (300 << 10) // 4
    total, places = count * size, [4 * count * r for r in range(size)]
    new, took = comm.Dup(), []
    for turn in range(6):
        mine, got = Mine(data(rank, total) + turn), Mine(blank(total))
        before = pinned()
        ends = [count] * size, places, [MPI.INT] * size
        new.Alltoallw([mine.mpi(), *ends], [got.mpi(), *ends])
        took.append(pinned() - before > 0)
        want = np.concatenate([data(r, total)[count * rank : count * (rank + 1)] + turn for r in range(size)])
        assert np.array_equal(got.read(), want), turn
    assert len(set(took[1:])) == 1 and len(set(comm.allgather(took[1]))) == 1, took
    out, into = squares()
    assert transposed(new, out, into, 0) > 0
    new.Free()


AUTO = [automatic_leaves_small_blocks_to_the_library, automatic_agrees_on_large_blocks]
RULES = [
    blocks_go_without_the_library, either_side_may_be_on_the_host, it_begins_when_every_rank_has_device_memory,
    large_blocks_go_through_the_library, slabs_grow, grids_and_graphs, a_rank_without_neighbours_takes_part,
    more_communicators_than_slabs,
]  # fmt: skip

if __name__ == "__main__":
    keep(
        AUTO if os.environ.get("UNDERTOW_MPI_IPC") == "auto" else RULES,
        sys.argv[1:],
        "on the stand-in" if device.is_fake else "on a GPU",
    )
