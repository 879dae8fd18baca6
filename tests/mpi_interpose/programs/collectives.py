"""Every interposed collective with derived datatypes on both sides, compared with numpy; any number of ranks.

Sender and receiver types differ, ranks may run with or without the preload, and MPI_IN_PLACE and an intercommunicator
are among the cases.
"""

from __future__ import annotations

import numpy as np
from mpi4py import MPI
from rule_loop import keep

comm = MPI.COMM_WORLD
rank, size = comm.rank, comm.size
N = 12  # ints in a block


def types() -> tuple[MPI.Datatype, MPI.Datatype, np.ndarray, np.ndarray, int, int]:
    """A send type and a receive type of N ints, where their ints are, and their extents in ints."""
    vector = MPI.INT.Create_vector(N // 3, 3, 5)
    send = vector.Create_resized(0, 24 * 4).Commit()
    indexed = MPI.INT.Create_indexed_block(2, [0, 3, 7, 9, 14, 20])
    recv = indexed.Create_resized(0, 25 * 4).Commit()
    vector.Free()
    indexed.Free()
    a = (np.arange(N // 3)[:, None] * 5 + np.arange(3)).reshape(-1)
    b = (np.array([0, 3, 7, 9, 14, 20])[:, None] + np.arange(2)).reshape(-1)
    return send, recv, a, b, 24, 25


SEND, RECV, A, B, EA, EB = types()


def block(source: int, target: int = 0) -> np.ndarray:
    return np.arange(N) + 100 * source + 10000 * target


def outgoing(targets: list[int]) -> np.ndarray:
    buffer = np.full(EA * max(1, len(targets)), -1, "i")
    for k, target in enumerate(targets):
        buffer[k * EA + A] = block(rank, target)
    return buffer


def incoming(n: int) -> np.ndarray:
    return np.full(EB * max(1, n), -7, "i")


def wanted(sources: list[int], target: int, where: list[int] | None = None, n: int | None = None) -> np.ndarray:
    out = incoming(n or len(sources))
    for k, source in enumerate(sources):
        out[(where[k] if where else k) * EB + B] = block(source, target)
    return out


EVERY = list(range(size))


def rooted() -> None:
    for root in EVERY:
        buffer = outgoing([0]) if rank == root else np.full(EA, -1, "i")
        comm.Bcast([buffer, 1, SEND], root)
        want = np.full(EA, -1, "i")
        want[A] = block(root)
        assert np.array_equal(buffer, want)
        got = incoming(size)
        comm.Gather([outgoing([root]), 1, SEND], [got, 1, RECV] if rank == root else None, root)
        if rank == root:
            assert np.array_equal(got, wanted(EVERY, root))
        got = incoming(size + 1)
        displacements = [size - k for k in EVERY]
        comm.Gatherv(
            [outgoing([root]), 1, SEND], [got, ([1] * size, displacements), RECV] if rank == root else None, root
        )
        if rank == root:
            assert np.array_equal(got, wanted(EVERY, root, displacements, size + 1))
        got = incoming(1)
        comm.Scatter([outgoing(EVERY), 1, SEND] if rank == root else None, [got, 1, RECV], root)
        assert np.array_equal(got, wanted([root], rank))
        got = incoming(1)
        order = [size - 1 - k for k in EVERY]
        blocks = outgoing(order)
        comm.Scatterv([blocks, ([1] * size, order), SEND] if rank == root else None, [got, 1, RECV], root)
        assert np.array_equal(got, wanted([root], rank))


def all_to_all() -> None:
    got = incoming(size)
    comm.Allgather([outgoing([0]), 1, SEND], [got, 1, RECV])
    assert np.array_equal(got, wanted(EVERY, 0))
    got = incoming(size + 1)
    displacements = [(k + 1) % (size + 1) for k in EVERY]
    comm.Allgatherv([outgoing([0]), 1, SEND], [got, ([1] * size, displacements), RECV])
    assert np.array_equal(got, wanted(EVERY, 0, displacements, size + 1))
    got = incoming(size)
    comm.Alltoall([outgoing(EVERY), 1, SEND], [got, 1, RECV])
    assert np.array_equal(got, wanted(EVERY, rank))
    got = incoming(size)
    comm.Alltoallv([outgoing(EVERY), ([1] * size, EVERY), SEND], [got, ([1] * size, EVERY), RECV])
    assert np.array_equal(got, wanted(EVERY, rank))
    got = incoming(size)
    comm.Alltoallw(
        [outgoing(EVERY), ([1] * size, [4 * EA * k for k in EVERY]), [SEND] * size],
        [got, ([1] * size, [4 * EB * k for k in EVERY]), [RECV] * size],
    )
    assert np.array_equal(got, wanted(EVERY, rank))


def uneven() -> None:
    """Counts that differ per peer, zeros among them."""
    counts_out = [(rank + k) % 3 for k in EVERY]
    counts_in = [(k + rank) % 3 for k in EVERY]
    starts_out = np.concatenate([[0], np.cumsum(counts_out)])
    starts_in = np.concatenate([[0], np.cumsum(counts_in)])
    send = outgoing([t for t in EVERY for _ in range(counts_out[t])])
    got = incoming(int(starts_in[-1]))
    comm.Alltoallv(
        [send, (counts_out, starts_out[:-1].tolist()), SEND], [got, (counts_in, starts_in[:-1].tolist()), RECV]
    )
    want = wanted([s for s in EVERY for _ in range(counts_in[s])], rank) if starts_in[-1] else incoming(0)
    assert np.array_equal(got, want)


def in_place() -> None:
    got = np.full(EB * size, -7, "i")
    got[rank * EB + B] = block(rank)
    comm.Allgather(MPI.IN_PLACE, [got, 1, RECV])
    assert np.array_equal(got, wanted(EVERY, 0))
    both = incoming(size)
    for k in EVERY:
        both[k * EB + B] = block(rank, k)
    comm.Alltoall(MPI.IN_PLACE, [both, 1, RECV])
    assert np.array_equal(both, wanted(EVERY, rank))


def neighbours() -> None:
    ring = comm.Create_cart([size], periods=[True])
    left, right = (rank - 1) % size, (rank + 1) % size
    around = [left, right]
    got = incoming(2)
    ring.Neighbor_allgather([outgoing([0]), 1, SEND], [got, 1, RECV])
    assert np.array_equal(got, wanted(around, 0))
    graph = comm.Create_dist_graph_adjacent([left, right], [right, left])
    got = incoming(2)
    graph.Neighbor_allgatherv([outgoing([0]), 1, SEND], [got, ([1, 1], [1, 0]), RECV])
    assert np.array_equal(got, wanted(around, 0, [1, 0]))
    got = incoming(2)
    graph.Neighbor_alltoall([outgoing([right, left]), 1, SEND], [got, 1, RECV])
    assert np.array_equal(got, wanted(around, rank))
    got = incoming(2)
    graph.Neighbor_alltoallv([outgoing([right, left]), ([1, 1], [0, 1]), SEND], [got, ([1, 1], [0, 1]), RECV])
    assert np.array_equal(got, wanted(around, rank))
    got = incoming(2)
    graph.Neighbor_alltoallw(
        [outgoing([right, left]), ([1, 1], [0, 4 * EA]), [SEND, SEND]],
        [got, ([1, 1], [0, 4 * EB]), [RECV, RECV]],
    )
    assert np.array_equal(got, wanted(around, rank))
    ring.Free()
    graph.Free()


def edges_of_a_grid() -> None:
    """Beyond an edge there is nobody: that block of the result stays as it was."""
    line = comm.Create_cart([size], periods=[False])
    around = [rank - 1, rank + 1]
    inside = [k for k in (0, 1) if 0 <= around[k] < size]

    def check(got: np.ndarray, target: int) -> None:
        want = incoming(2)
        for k in inside:
            want[k * EB + B] = block(around[k], target)
        assert np.array_equal(got, want)

    two, send, got = ([1, 1], [0, 1]), outgoing([rank - 1, rank + 1]), incoming(2)
    line.Neighbor_allgather([outgoing([0]), 1, SEND], [got, 1, RECV])
    check(got, 0)
    got = incoming(2)
    line.Neighbor_allgatherv([outgoing([0]), 1, SEND], [got, two, RECV])
    check(got, 0)
    got = incoming(2)
    line.Neighbor_alltoall([send, 1, SEND], [got, 1, RECV])
    check(got, rank)
    got = incoming(2)
    line.Neighbor_alltoallv([send, two, SEND], [got, two, RECV])
    check(got, rank)
    got = incoming(2)
    line.Neighbor_alltoallw([send, ([1, 1], [0, 4 * EA]), [SEND] * 2], [got, ([1, 1], [0, 4 * EB]), [RECV] * 2])
    check(got, rank)
    line.Free()


def across_an_intercommunicator() -> None:
    if size < 2:
        return
    half = comm.Split(rank % 2, rank)
    inter = half.Create_intercomm(0, comm, 1 - rank % 2, 55)
    others = inter.Get_remote_size()
    got = incoming(others)
    inter.Allgather([outgoing([0]), 1, SEND], [got, 1, RECV])
    assert np.array_equal(got, wanted([r for r in EVERY if r % 2 != rank % 2], 0))
    if rank // 2 < min(others, half.size):
        got = incoming(1)
        inter.Sendrecv([outgoing([5]), 1, SEND], rank // 2, 1, [got, 1, RECV], rank // 2, 1)
        assert np.array_equal(got, wanted([rank ^ 1], 5))
    inter.Free()
    half.Free()


if __name__ == "__main__":
    keep((rooted, all_to_all, uneven, in_place, neighbours, edges_of_a_grid, across_an_intercommunicator))
