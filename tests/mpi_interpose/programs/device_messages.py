"""Messages whose buffers are device memory, on a library that cannot read it: each function is one rule.

Run under the preload by two or more ranks that share a device (or the stand-in for one). A buffer is `Mine`: bytes on
the device or, for peers of mixed kind, on the host; the rules compare what arrives with numpy.

usage: device_messages.py [NAME …]
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parent))

import device_calls
import device_later
from device_buffers import GAP, PLACES, Mine, blank, comm, data, device, expect, peer, rank, size, strided
from rule_loop import keep


def both_kinds() -> list[tuple[bool, bool]]:
    """(sender on the device, receiver on the device), the same on all ranks."""
    return [(True, True), (True, False), (False, True)]


def blocking_and_nonblocking() -> None:
    t = strided()
    for send_on, receive_on in both_kinds():
        for how in ("send", "ssend", "isend", "sendrecv"):
            mine, got, status = Mine(data(rank), send_on), Mine(blank(), receive_on), MPI.Status()
            if how == "sendrecv":
                comm.Sendrecv([mine.mpi(), 1, t], peer, 5, [got.mpi(), 1, t], peer, 5, status)
            elif rank % 2 == 0:
                {"send": comm.Send, "ssend": comm.Ssend}.get(how, lambda *a: comm.Isend(*a).Wait())(
                    [mine.mpi(), 1, t], peer, 5
                )
                comm.Irecv([got.mpi(), 1, t], peer, 5).Wait(status)
            else:
                comm.Recv([got.mpi(), 1, t], peer, 5, status)
                comm.Send([mine.mpi(), 1, t], peer, 5)
            assert np.array_equal(got.read(), expect(peer)), (how, send_on, receive_on)
            assert status.Get_count(t) == 1 and status.Get_source() == peer
    t.Free()


def contiguous_buffers() -> None:
    """Predefined types too: no datatype of ours is involved, and the library could not read them."""
    for n in (1, 7, 1000, 300000):
        mine, got = Mine(data(rank, n)), Mine(blank(n))
        comm.Sendrecv([mine.mpi(), n, MPI.INT], peer, 1, [got.mpi(), n, MPI.INT], peer, 1)
        assert np.array_equal(got.read(), data(peer, n)), n
    pair = MPI.DOUBLE_INT
    mine, got = Mine(np.arange(1, 161, dtype="u1") + rank), Mine(np.zeros(160, "u1"))
    comm.Sendrecv([mine.mpi(), 10, pair], peer, 2, [got.mpi(), 10, pair], peer, 2)
    want, sent = np.zeros(160, "u1"), np.arange(1, 161, dtype="u1") + peer
    for k in range(10):
        want[16 * k : 16 * k + 12] = sent[16 * k : 16 * k + 12]
    assert np.array_equal(got.read(), want)


def order_is_kept() -> None:
    """Large typed messages from the device and small ones from the host on one tag arrive in the order sent."""
    n = 20000
    t = strided(n)
    where = (np.arange(n)[:, None] * 5 + np.arange(3)[None, :]).reshape(-1)
    big = data(rank, 100000)
    if rank % 2 == 0:
        mine = Mine(big)
        requests = []
        for k in range(6):
            requests.append(comm.Isend([mine.mpi(), 1, t], peer, 9))
            requests.append(comm.Isend([np.array([k], "i"), 1, MPI.INT], peer, 9))
        MPI.Request.Waitall(requests)
    else:
        for k in range(6):
            got, one = Mine(blank(100000)), np.zeros(1, "i")
            comm.Recv([got.mpi(), 1, t], peer, 9)
            comm.Recv(one, peer, 9)
            want = blank(100000)
            want[where] = data(peer, 100000)[where]
            assert np.array_equal(got.read(), want) and one[0] == k, k
    t.Free()


def completion_calls() -> None:
    t, n = strided(), 6
    for how in ("waitall", "testall", "waitany", "waitsome", "get_status", "wait"):
        got = [Mine(blank()) for _ in range(n)]
        mine = [Mine(data(rank) + k) for k in range(n)]
        requests = [comm.Irecv([got[k].mpi(), 1, t], peer, 20 + k) for k in range(n)]
        comm.Barrier()
        requests += [comm.Isend([mine[k].mpi(), 1, t], peer, 20 + k) for k in range(n)]
        if how == "waitall":
            MPI.Request.Waitall(requests)
        elif how == "testall":
            while not MPI.Request.Testall(requests):
                pass
        elif how == "waitany":
            for _ in requests:
                MPI.Request.Waitany(requests)
        elif how == "waitsome":
            done = 0
            while done < len(requests):
                done += len(MPI.Request.Waitsome(requests) or [])
        elif how == "get_status":
            while not all(request.Get_status() for request in requests):
                pass
            if MPI.Get_version() >= (4, 1):
                assert MPI.Request.Get_status_all(requests) and MPI.Request.Get_status_any(requests)[1]
                assert len(MPI.Request.Get_status_some(requests) or []) == len(requests)
            MPI.Request.Waitall(requests)
        else:
            for request in requests:
                request.Wait()
        for k in range(n):
            want = blank()
            want[PLACES] = (data(peer) + k)[PLACES]
            assert np.array_equal(got[k].read(), want), (how, k)
    t.Free()


def short_receives() -> None:
    """Fewer elements than asked for: only these bytes of the device buffer are written."""
    t = strided(4)
    extent = t.Get_extent()[1] // 4
    one = (np.arange(4)[:, None] * 5 + np.arange(3)[None, :]).reshape(-1)
    where = (np.arange(6)[:, None] * extent + one[None, :]).reshape(-1)
    for sent in (2 * 12 + 7, 1, 12):
        contiguous, got, status = Mine(data(rank)[:sent]), Mine(blank()), MPI.Status()
        out = comm.Isend([contiguous.mpi(), sent, MPI.INT], peer, 4)
        comm.Recv([got.mpi(), 6, t], peer, 4, status)
        out.Wait()
        want = blank()
        want[where[:sent]] = data(peer)[:sent]
        assert np.array_equal(got.read(), want), sent
        assert status.Get_count(MPI.INT) == sent
    t.Free()


def persistent_requests() -> None:
    t, got = strided(), Mine(blank())
    mine = Mine(data(rank))
    requests = [comm.Recv_init([got.mpi(), 1, t], peer, 11), comm.Send_init([mine.mpi(), 1, t], peer, 11)]
    for turn in range(4):
        mine.write(data(rank) + turn)
        MPI.Prequest.Startall(requests)
        MPI.Request.Waitall(requests)
        want = blank()
        want[PLACES] = (data(peer) + turn)[PLACES]
        assert np.array_equal(got.read(), want), turn
    for request in requests:
        request.Free()
    t.Free()


def one_buffer_both_ways() -> None:
    t, both = strided(), Mine(data(rank))
    want = data(rank)
    want[PLACES] = data(peer)[PLACES]
    comm.Sendrecv_replace([both.mpi(), 1, t], peer, 16, peer, 16)
    assert np.array_equal(both.read(), want)
    t.Free()


def null_bottom_and_negative() -> None:
    t, mine, got = strided(), Mine(data(rank)), Mine(blank())
    comm.Send([mine.mpi(), 1, t], MPI.PROC_NULL, 0)
    comm.Recv([got.mpi(), 1, t], MPI.PROC_NULL, 0)
    assert (got.read() == GAP).all()
    back = MPI.INT.Create_vector(20, 2, -4).Commit()
    comm.Sendrecv([mine.mpi(4 * 76), 1, back], peer, 14, [got.mpi(4 * 76), 1, back], peer, 14)
    where = 76 + (-4 * np.arange(20)[:, None] + np.arange(2)[None, :]).reshape(-1)
    want = blank()
    want[where] = data(peer)[where]
    assert np.array_equal(got.read(), want)
    absolute = [MPI.INT.Create_hindexed([5, 7], [b.address(), b.address(200)]).Commit() for b in (mine, got)]
    comm.Sendrecv([MPI.BOTTOM, 1, absolute[0]], peer, 15, [MPI.BOTTOM, 1, absolute[1]], peer, 15)
    for k in (*range(5), *range(50, 57)):
        want[k] = data(peer)[k]
    assert np.array_equal(got.read(), want)
    for made in (t, back, *absolute):
        made.Free()


def pack_and_unpack() -> None:
    """MPI_Pack and MPI_Unpack with either side, or both, on the device."""
    t, want = strided(), data(rank)[PLACES].tobytes()
    for user_on, packed_on in both_kinds():
        mine, packed = Mine(data(rank), user_on), Mine(np.zeros(800, "u1"), packed_on)
        position = t.Pack([mine.mpi(), 1, t][0], packed.mpi(), 16, comm)
        assert position == 16 + len(want), position
        assert packed.read()[16:position].tobytes() == want and not packed.read()[:16].any()
        got = Mine(blank(), user_on)
        assert t.Unpack(packed.mpi(), 16, got.mpi(), comm) == position
        assert np.array_equal(got.read(), expect(rank))
    t.Free()


def broadcast_and_gathers() -> None:
    row = MPI.INT.Create_vector(8, 1, 2)
    t = row.Create_resized(0, 64).Commit()
    for root in range(size):
        both = Mine(data(root, 64) if rank == root else blank(64))
        comm.Bcast([both.mpi(), 4, t], root)
        want = data(root, 64) if rank == root else blank(64)
        want[::2] = data(root, 64)[::2]
        assert np.array_equal(both.read(), want), root
        mine, all_of = Mine(data(rank, 16)), Mine(blank(16 * size))
        comm.Gather([mine.mpi(), 1, t], [all_of.mpi(), 1, t], root)
        want = blank(16 * size)
        if rank == root:
            for r in range(size):
                want[16 * r : 16 * r + 16 : 2] = data(r, 16)[::2]
        assert np.array_equal(all_of.read(), want), root
        source, part = Mine(data(root, 8 * size)), Mine(blank(8))
        comm.Scatter([source.mpi(), 8, MPI.INT], [part.mpi(), 8, MPI.INT], root)
        assert np.array_equal(part.read(), data(root, 8 * size)[8 * rank : 8 * rank + 8])
    mine, all_of = Mine(data(rank, 16)), Mine(blank(16 * size))
    comm.Allgather([mine.mpi(), 16, MPI.INT], [all_of.mpi(), 16, MPI.INT])
    want = np.concatenate([data(r, 16) for r in range(size)])
    assert np.array_equal(all_of.read(), want)
    start = blank(16 * size)
    start[16 * rank : 16 * rank + 16] = data(rank, 16)
    both = Mine(start)
    comm.Allgather(MPI.IN_PLACE, [both.mpi(), 16, MPI.INT])
    assert np.array_equal(both.read(), want)
    counts, places = [3 + r for r in range(size)], [r * 40 for r in range(size)]
    ragged = Mine(blank(40 * size))
    comm.Allgatherv([mine.mpi(), 3 + rank, MPI.INT], [ragged.mpi(), counts, places, MPI.INT])
    want = blank(40 * size)
    for r in range(size):
        want[40 * r : 40 * r + 3 + r] = data(r, 16)[: 3 + r]
    assert np.array_equal(ragged.read(), want)
    start = blank(40 * size)
    start[40 * rank : 40 * rank + 3 + rank] = data(rank, 16)[: 3 + rank]
    both = Mine(start)
    comm.Allgatherv(MPI.IN_PLACE, [both.mpi(), counts, places, MPI.INT])
    assert np.array_equal(both.read(), want)
    both, sends = Mine(start), [mine.mpi(), 3 + rank, MPI.INT]
    comm.Gatherv(MPI.IN_PLACE if rank == 0 else sends, [both.mpi(), counts, places, MPI.INT], 0)
    assert np.array_equal(both.read(), want if rank == 0 else start)
    spread, part = Mine(want), Mine(blank(3 + rank))
    comm.Scatterv(
        [spread.mpi(), counts, places, MPI.INT], MPI.IN_PLACE if rank == 0 else [part.mpi(), 3 + rank, MPI.INT], 0
    )
    assert rank == 0 or np.array_equal(part.read(), data(rank, 16)[: 3 + rank])
    for made in (t, row):
        made.Free()


def all_to_all() -> None:
    n = 5
    mine, got = Mine(data(rank, n * size)), Mine(blank(n * size))
    comm.Alltoall([mine.mpi(), n, MPI.INT], [got.mpi(), n, MPI.INT])
    want = np.concatenate([data(r, n * size)[n * rank : n * rank + n] for r in range(size)])
    assert np.array_equal(got.read(), want)
    counts, places = [n] * size, [n * r for r in range(size)]
    got = Mine(blank(n * size))
    comm.Alltoallv([mine.mpi(), counts, places, MPI.INT], [got.mpi(), counts, places, MPI.INT])
    assert np.array_equal(got.read(), want)
    both = Mine(data(rank, n * size))
    comm.Alltoallv(MPI.IN_PLACE, [both.mpi(), counts, places, MPI.INT])
    assert np.array_equal(both.read(), want)
    both = Mine(data(rank, n * size))
    comm.Alltoallw(MPI.IN_PLACE, [both.mpi(), counts, [4 * place for place in places], [MPI.INT] * size])
    assert np.array_equal(both.read(), want)
    column = MPI.INT.Create_vector(n, 1, size).Commit()
    got = Mine(blank(n * size))
    comm.Alltoallw(
        [mine.mpi(), [1] * size, [4 * r for r in range(size)], [column] * size],
        [got.mpi(), counts, [4 * n * r for r in range(size)], [MPI.INT] * size],
    )
    want = np.concatenate([data(r, n * size)[rank::size] for r in range(size)])
    assert np.array_equal(got.read(), want)
    column.Free()


def halo_by_neighbours() -> None:
    """Neighbor_alltoallw on a ring with faces of a device matrix, the whole exchange in one call."""
    ring = comm.Create_cart([size], [True])
    n = 6
    field = np.full((n, n + 2), -1.0)
    field[:, 1:-1] = rank
    mine = Mine(field)
    column = MPI.DOUBLE.Create_vector(n, 1, n + 2).Commit()
    ring.Neighbor_alltoallw(
        [mine.mpi(), [1, 1], [8, 8 * n], [column] * 2], [mine.mpi(), [1, 1], [0, 8 * (n + 1)], [column] * 2]
    )
    got = mine.read().reshape(n, n + 2)
    left, right = (rank - 1) % size, (rank + 1) % size
    if size > 2:
        assert (got[:, 0] == left).all() and (got[:, -1] == right).all()
    assert {*got[:, 0], *got[:, -1]} <= {float(left), float(right)} and (got[:, 1:-1] == rank).all()
    column.Free()
    ring.Free()


def reductions() -> None:
    """The library reduces; buffers on the device are copied whole, what lies between stays."""
    n, total = 10, sum(range(1, size + 1))
    mine = np.arange(n * size, dtype="d") * (rank + 1)
    whole = np.arange(n * size, dtype="d") * total
    part = whole[n * rank : n * rank + n]
    got, given = Mine(np.full(n * size, -1.0)), Mine(mine)
    comm.Allreduce([given.mpi(), n * size, MPI.DOUBLE], [got.mpi(), n * size, MPI.DOUBLE])
    assert np.array_equal(got.read(), whole)
    both = Mine(mine)
    comm.Allreduce(MPI.IN_PLACE, [both.mpi(), n * size, MPI.DOUBLE])
    assert np.array_equal(both.read(), whole)
    for root in range(size):
        for on in (True, False):
            got = Mine(np.full(n * size, -1.0), on)
            comm.Reduce([given.mpi(), n * size, MPI.DOUBLE], [got.mpi(), n * size, MPI.DOUBLE], root=root)
            assert np.array_equal(got.read(), whole if rank == root else np.full(n * size, -1.0))
    got = Mine(np.full(n, -1.0))
    comm.Reduce_scatter_block([given.mpi(), n, MPI.DOUBLE], [got.mpi(), n, MPI.DOUBLE])
    assert np.array_equal(got.read(), part)
    comm.Reduce_scatter([given.mpi(), n * size, MPI.DOUBLE], [got.mpi(), n, MPI.DOUBLE], [n] * size)
    assert np.array_equal(got.read(), part)
    first = np.arange(n, dtype="d")
    send = Mine(first * (rank + 1))
    comm.Scan([send.mpi(), n, MPI.DOUBLE], [got.mpi(), n, MPI.DOUBLE])
    assert np.array_equal(got.read(), first * sum(range(1, rank + 2)))
    got = Mine(np.full(n, -1.0))
    comm.Exscan([send.mpi(), n, MPI.DOUBLE], [got.mpi(), n, MPI.DOUBLE])
    assert np.array_equal(got.read(), first * sum(range(1, rank + 1)) if rank else np.full(n, -1.0))


def managed_memory() -> None:
    """The library reads and writes it itself, or the host's own kernels do: the device side takes none of it."""
    t, n = strided(), 400
    arrays = []
    for _ in range(2):
        pointer = ctypes.c_uint64()
        device.must(device.cuda.cuMemAllocManaged(ctypes.byref(pointer), ctypes.c_size_t(4 * n), 1))
        arrays.append(np.ctypeslib.as_array((ctypes.c_int32 * n).from_address(pointer.value)))
    mine, got = arrays
    mine[:], got[:] = data(rank), blank()
    comm.Sendrecv([mine, 1, t], peer, 3, [got, 1, t], peer, 3)
    assert np.array_equal(got, expect(peer))
    on_device = Mine(data(rank) + 1)
    comm.Sendrecv([on_device.mpi(), 1, t], peer, 4, [got, 1, t], peer, 4)
    assert np.array_equal(got[PLACES], (data(peer) + 1)[PLACES])
    for array in arrays:
        device.must(device.cuda.cuMemFree_v2(ctypes.c_uint64(array.ctypes.data)))
    t.Free()


RULES = [
    blocking_and_nonblocking, contiguous_buffers, order_is_kept, completion_calls, short_receives, persistent_requests,
    one_buffer_both_ways, null_bottom_and_negative, pack_and_unpack, broadcast_and_gathers, all_to_all,
    halo_by_neighbours, reductions, managed_memory, *device_calls.RULES,
    *device_later.RULES,
]  # fmt: skip


if __name__ == "__main__":
    keep(RULES, sys.argv[1:], "on the stand-in" if device.is_fake else "on a GPU")
