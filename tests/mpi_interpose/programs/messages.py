"""Point-to-point rules with derived datatypes, on two or more ranks: each function is one rule, run by all ranks.

Every function compares with numpy, so the program says the same with and without the preload. Several are TEMPI's
defects turned into checks: order of packed bytes, padding of pair types, overtaking, short receives and their status,
datatypes freed in flight, PROC_NULL, ANY_SOURCE, negative strides, MPI_BOTTOM.

usage: messages.py [NAME …]
"""

from __future__ import annotations

import contextlib
import sys
import threading

import numpy as np
from mpi4py import MPI
from rule_loop import keep

comm = MPI.COMM_WORLD
rank, size = comm.rank, comm.size
peer = rank ^ 1
GAP = 77


def strided(n: int = 64, length: int = 3, step: int = 5, base: MPI.Datatype = MPI.INT) -> MPI.Datatype:
    return base.Create_vector(n, length, step).Commit()


def places(n: int = 64, length: int = 3, step: int = 5) -> np.ndarray:
    return (np.arange(n)[:, None] * step + np.arange(length)[None, :]).reshape(-1)


def data(r: int, n: int = 400) -> np.ndarray:
    return (np.arange(n) * 3 + 1000 * r).astype("i")


def expect(source: int, n: int = 400, where: np.ndarray | None = None) -> np.ndarray:
    where = places() if where is None else where
    out = np.full(n, GAP, "i")
    out[where] = data(source, n)[where]
    return out


def blank(n: int = 400) -> np.ndarray:
    return np.full(n, GAP, "i")


def sends_and_receives() -> None:
    """Every blocking and nonblocking send against blocking and nonblocking receives."""
    t, mine = strided(), data(rank)
    MPI.Attach_buffer(bytearray(1 << 20))
    senders = {
        "send": lambda: comm.Send([mine, 1, t], peer, 5),
        "ssend": lambda: comm.Ssend([mine, 1, t], peer, 5),
        "bsend": lambda: comm.Bsend([mine, 1, t], peer, 5),
        "isend": lambda: comm.Isend([mine, 1, t], peer, 5).Wait(),
        "issend": lambda: comm.Issend([mine, 1, t], peer, 5).Wait(),
        "ibsend": lambda: comm.Ibsend([mine, 1, t], peer, 5).Wait(),
    }
    for name, send in senders.items():
        for blocking in (True, False):
            if rank % 2 == 0:
                send()
                continue
            got, status = blank(), MPI.Status()
            if blocking:
                comm.Recv([got, 1, t], peer, 5, status)
            else:
                comm.Irecv([got, 1, t], peer, 5).Wait(status)
            assert np.array_equal(got, expect(peer)), name
            assert (status.Get_source(), status.Get_tag()) == (peer, 5)
            assert status.Get_count(t) == 1 and status.Get_elements(MPI.INT) == 192
    MPI.Detach_buffer()
    t.Free()


def ready_send() -> None:
    t, got = strided(), blank()
    if rank % 2:
        request = comm.Irecv([got, 1, t], peer, 6)
        comm.Send(np.zeros(1, "i"), peer, 7)
        request.Wait()
        assert np.array_equal(got, expect(peer))
    else:
        comm.Recv(np.zeros(1, "i"), peer, 7)
        comm.Rsend([data(rank), 1, t], peer, 6)
    t.Free()


def packed_order_is_kept() -> None:
    """A transpose type sent to a contiguous receiver: sorting the strides would make it the identity."""
    n, m = 12, 20
    column = MPI.FLOAT.Create_vector(m, 1, n)
    t = column.Create_hvector(n, 1, 4).Commit()
    matrix = np.arange(n * m, dtype="f").reshape(m, n)
    if rank % 2 == 0:
        comm.Send([matrix, 1, t], peer, 1)
    else:
        got = np.zeros(n * m, "f")
        comm.Recv([got, n * m, MPI.FLOAT], peer, 1)
        assert np.array_equal(got.reshape(n, m), matrix.T)
        back = np.zeros((m, n), "f")
        comm.Sendrecv([got, n * m, MPI.FLOAT], rank, 2, [back, 1, t], rank, 2)
        assert np.array_equal(back, matrix)
    t.Free()
    column.Free()


def pair_types_leave_padding_alone() -> None:
    for pair, first, second, offset in ((MPI.SHORT_INT, 2, 4, 4), (MPI.DOUBLE_INT, 8, 4, 8)):
        extent = pair.Get_extent()[1]
        t = pair.Create_vector(5, 2, 3).Commit()
        assert t.Get_size() == 10 * (first + second)
        mine = np.random.default_rng(rank).integers(1, 255, 15 * extent, dtype=np.uint8)
        theirs = np.random.default_rng(peer).integers(1, 255, 15 * extent, dtype=np.uint8)
        got, want = np.zeros(15 * extent, np.uint8), np.zeros(15 * extent, np.uint8)
        comm.Sendrecv([mine, 1, t], peer, 3, [got, 1, t], peer, 3)
        for block in range(5):
            for k in range(2):
                at = (block * 3 + k) * extent
                for lo, n in ((0, first), (offset, second)):
                    want[at + lo : at + lo + n] = theirs[at + lo : at + lo + n]
        assert np.array_equal(got, want), pair.Get_name()
        t.Free()


def no_overtaking() -> None:
    """A later small send must not pass an earlier large typed one with the same tag."""
    t = strided(20000, 3, 5)
    big = np.arange(100000, dtype="i")
    if rank % 2 == 0:
        requests = [comm.Isend([big, 1, t], peer, 9)]
        small = [np.array([k], "i") for k in range(20)]
        requests += [comm.Isend([s, 1, MPI.INT], peer, 9) for s in small]
        MPI.Request.Waitall(requests)
    else:
        got = np.zeros(100000, "i")
        status = MPI.Status()
        comm.Recv([got, 1, t], peer, 9, status)
        assert status.Get_elements(MPI.INT) == 60000
        where = places(20000)
        assert np.array_equal(got[where], big[where])
        for k in range(20):
            one = np.zeros(1, "i")
            comm.Recv(one, peer, 9)
            assert one[0] == k
    t.Free()


def short_receives() -> None:
    """Fewer elements than asked for: only these are written, and the status counts them."""
    t = strided(4, 3, 5)
    mine = data(rank)
    for how in ("recv", "irecv", "test", "sendrecv", "mrecv", "persistent"):
        sent = 2 * 12 + 7  # two whole elements and a part of the third
        contiguous = data(rank)[:sent].copy()
        got, status = blank(), MPI.Status()
        out = comm.Isend([contiguous, sent, MPI.INT], peer, 4)
        if how == "recv":
            comm.Recv([got, 6, t], peer, 4, status)
        elif how == "irecv":
            comm.Irecv([got, 6, t], peer, 4).Wait(status)
        elif how == "test":
            request = comm.Irecv([got, 6, t], peer, 4)
            while not request.Test(status):
                pass
        elif how == "sendrecv":
            comm.Sendrecv([mine, 0, t], MPI.PROC_NULL, 0, [got, 6, t], peer, 4, status)
        elif how == "mrecv":
            comm.Mprobe(peer, 4).Recv([got, 6, t], status)
        else:
            request = comm.Recv_init([got, 6, t], peer, 4)
            request.Start()
            request.Wait(status)
            request.Free()
        out.Wait()
        want, extent = blank(), t.Get_extent()[1] // 4
        where = (np.arange(6)[:, None] * extent + places(4)[None, :]).reshape(-1)[:sent]
        want[where] = data(peer)[:sent]
        assert np.array_equal(got, want), how
        assert status.Get_elements(t) == sent, how
        assert status.Get_count(t) == MPI.UNDEFINED, how
        assert status.Get_count(MPI.INT) == sent, how
    t.Free()


def truncation_is_an_error() -> None:
    t = strided(4, 3, 5)
    other = comm.Dup()
    other.Set_errhandler(MPI.ERRORS_RETURN)
    out = other.Isend([data(rank), 100, MPI.INT], peer, 8)
    try:
        other.Recv([blank(), 1, t], peer, 8)
    except MPI.Exception as error:
        assert error.Get_error_class() == MPI.ERR_TRUNCATE
    else:
        raise AssertionError("a message that is too long was received without an error")
    out.Wait()
    other.Free()
    t.Free()


def types_freed_in_flight() -> None:
    """The type dies, and its handle is recycled, between the start and the completion of an operation."""
    for _ in range(30):
        t, mine, got = strided(), data(rank), blank()
        receive = comm.Irecv([got, 1, t], peer, 2)
        send = comm.Isend([mine, 1, t], peer, 2)
        t.Free()
        others = [MPI.DOUBLE.Create_vector(k + 2, 1, 7).Commit() for k in range(4)]
        MPI.Request.Waitall([receive, send])
        assert np.array_equal(got, expect(peer))
        for other in others:
            other.Free()


def spin(request: MPI.Request) -> None:
    while not request.Test():
        pass


def seen_complete(how: str, requests: list[MPI.Request]) -> bool:
    """Whether all are complete, without completing them; before MPI 4.1 each is asked by itself."""
    if MPI.Get_version() < (4, 1):
        how = "get_status"
    if how == "get_status_all":
        return MPI.Request.Get_status_all(requests)
    if how == "get_status_any":
        return all([MPI.Request.Get_status_any([request])[1] for request in requests])
    if how == "get_status_some":
        return len(MPI.Request.Get_status_some(requests) or ()) == len(requests)
    return all([request.Get_status() for request in requests])


def every_completion_call() -> None:
    t = strided()
    for how in (
        "waitall",
        "testall",
        "waitany",
        "testany",
        "waitsome",
        "testsome",
        "get_status",
        "get_status_all",
        "get_status_any",
        "get_status_some",
        "ignored",
        "wait",
        "test",
    ):
        n = 6
        got = [blank() for _ in range(n)]
        mine = [data(rank) + k for k in range(n)]
        requests = [comm.Irecv([got[k], 1, t], peer, 20 + k) for k in range(n)]
        comm.Barrier()  # so that no receive can complete at once
        requests += [comm.Isend([mine[k], 1, t], peer, 20 + k) for k in range(n)]
        requests.insert(3, comm.Irecv(np.zeros(1, "i"), MPI.PROC_NULL, 0))
        statuses = [MPI.Status() for _ in requests]
        if how == "waitall":
            MPI.Request.Waitall(requests, statuses)
        elif how == "ignored":
            MPI.Request.Waitall(requests)
        elif how in ("wait", "test"):
            for request in requests:
                request.Wait() if how == "wait" else spin(request)
        elif how == "testall":
            while not MPI.Request.Testall(requests, statuses):
                pass
        elif how in ("waitany", "testany"):
            left = len(requests)
            while left:
                if how == "waitany":
                    index = MPI.Request.Waitany(requests)
                    left -= index != MPI.UNDEFINED
                else:
                    index, flag = MPI.Request.Testany(requests)
                    left -= flag and index != MPI.UNDEFINED
        elif how in ("waitsome", "testsome"):
            left = len(requests)
            while left:
                done = MPI.Request.Waitsome(requests) if how == "waitsome" else MPI.Request.Testsome(requests)
                left -= len(done or ())
        else:
            while not seen_complete(how, requests):
                comm.Iprobe()  # MPICH's Get_status_some makes no progress
            for k in range(n):
                want = expect(peer) + np.where(expect(peer) == GAP, 0, k)
                assert np.array_equal(got[k], want), how
                got[k][0] = -5  # the data is the program's now: completing must not write it again
            MPI.Request.Waitall(requests)
            assert all(g[0] == -5 for g in got), how
            continue
        for k in range(n):
            want = blank()
            want[places()] = (data(peer) + k)[places()]
            assert np.array_equal(got[k], want), (how, k)
        assert all(request == MPI.REQUEST_NULL for request in requests), how
    t.Free()


def persistent_requests() -> None:
    t, mine, got = strided(), data(rank), blank()
    requests = [comm.Recv_init([got, 1, t], peer, 11), comm.Send_init([mine, 1, t], peer, 11)]
    for turn in range(5):
        mine[:] = data(rank) + turn
        got[:] = GAP
        MPI.Prequest.Startall(requests)
        MPI.Request.Waitall(requests)
        want = blank()
        want[places()] = (data(peer) + turn)[places()]
        assert np.array_equal(got, want), turn
    got[:] = GAP
    MPI.Request.Waitall(requests)  # inactive: completes at once and writes nothing
    assert (got == GAP).all()
    for request in requests:
        request.Free()
    t.Free()


def freed_requests_still_deliver() -> None:
    t, mine, got = strided(), data(rank), blank()
    receive = comm.Irecv([got, 1, t], peer, 12)
    send = comm.Isend([mine, 1, t], peer, 12)
    send.Free()
    receive.Wait()
    assert np.array_equal(got, expect(peer))
    t.Free()


def cancelled_receive_writes_nothing() -> None:
    t, got, status = strided(), blank(), MPI.Status()
    request = comm.Irecv([got, 1, t], peer, 999)
    request.Cancel()
    request.Wait(status)
    assert status.Is_cancelled() and (got == GAP).all()
    t.Free()


def null_any_and_self() -> None:
    t, mine = strided(), data(rank)
    got, status = blank(), MPI.Status()
    comm.Send([mine, 1, t], MPI.PROC_NULL, 0)
    comm.Recv([got, 1, t], MPI.PROC_NULL, 0, status)
    assert status.Get_source() == MPI.PROC_NULL and status.Get_count(t) == 0 and (got == GAP).all()
    out = comm.Isend([mine, 1, t], peer, 13)
    comm.Recv([got, 1, t], MPI.ANY_SOURCE, MPI.ANY_TAG, status)
    out.Wait()
    assert status.Get_source() == peer and status.Get_tag() == 13
    assert np.array_equal(got, expect(peer))
    got[:] = GAP
    MPI.COMM_SELF.Sendrecv([mine, 1, t], 0, 0, [got, 1, t], 0, 0)
    assert np.array_equal(got, expect(rank))
    t.Free()


def negative_strides_and_bottom() -> None:
    t = MPI.INT.Create_vector(20, 2, -4).Commit()
    mine, got = data(rank), blank()
    comm.Sendrecv([mine[76:], 1, t], peer, 14, [got[76:], 1, t], peer, 14)
    where = 76 + (-4 * np.arange(20)[:, None] + np.arange(2)[None, :]).reshape(-1)
    assert np.array_equal(got, expect(peer, where=where))
    t.Free()
    got[:] = GAP
    absolute = [MPI.INT.Create_hindexed([5, 7], [MPI.Get_address(b), MPI.Get_address(b[50:])]) for b in (mine, got)]
    for t in absolute:
        t.Commit()
    comm.Sendrecv([MPI.BOTTOM, 1, absolute[0]], peer, 15, [MPI.BOTTOM, 1, absolute[1]], peer, 15)
    where = np.concatenate([np.arange(5), 50 + np.arange(7)])
    assert np.array_equal(got, expect(peer, where=where))
    for t in absolute:
        t.Free()


def one_buffer_both_ways() -> None:
    t, both = strided(), data(rank)
    want = data(rank)
    want[places()] = data(peer)[places()]
    comm.Sendrecv_replace([both, 1, t], peer, 16, peer, 16)
    assert np.array_equal(both, want)
    t.Free()


def matched_probe() -> None:
    t, mine, got = strided(), data(rank), blank()
    out = comm.Isend([mine, 1, t], peer, 17)
    comm.Mprobe(peer, 17).Irecv([got, 1, t]).Wait()
    out.Wait()
    assert np.array_equal(got, expect(peer))
    t.Free()


def packed_at_one_end() -> None:
    """MPI_Pack by one rank, a typed receive by the other, and the reverse."""
    t, mine, got = strided(), data(rank), blank()
    buffer, position = bytearray(t.Pack_size(1, comm)), 0
    position = t.Pack(mine, buffer, position, comm)
    comm.Sendrecv([buffer, position, MPI.PACKED], peer, 18, [got, 1, t], peer, 18)
    assert np.array_equal(got, expect(peer))
    got[:] = GAP
    comm.Sendrecv([mine, 1, t], peer, 19, [buffer, len(buffer), MPI.PACKED], peer, 19)
    t.Unpack(buffer, 0, got, comm)
    assert np.array_equal(got, expect(peer))
    t.Free()


def types_without_a_simple_form() -> None:
    """Four dimensions and structs, packed and sent; TEMPI has a packer for up to three and dereferences none."""
    shape, part, start = [3, 4, 5, 6], [2, 2, 3, 4], [1, 1, 2, 1]
    cube = MPI.INT.Create_subarray(shape, part, start).Commit()
    record = MPI.Datatype.Create_struct([1, 2], [0, 8], [MPI.INT, MPI.DOUBLE])
    records = record.Create_resized(0, 32).Commit()
    window = tuple(slice(b, b + n) for b, n in zip(start, part))
    mine, got = data(rank, 360), blank(360)
    comm.Sendrecv([mine, 1, cube], peer, 21, [got, 1, cube], peer, 21)
    want = blank(360).reshape(shape)
    want[window] = data(peer, 360).reshape(shape)[window]
    assert np.array_equal(got.reshape(shape), want)
    packed = bytearray(cube.Get_size())
    assert cube.Pack(mine, packed, 0, comm) == len(packed)
    assert np.array_equal(np.frombuffer(packed, "i"), mine.reshape(shape)[window].reshape(-1))
    mine, got = data(rank, 400), blank(400)
    comm.Sendrecv([mine, 50, records], peer, 22, [got, 50, records], peer, 22)
    comm.Sendrecv([mine, 400, MPI.INT], peer, 23, [mine.copy(), 400, MPI.INT], peer, 23)  # predefined types as well
    where = (np.arange(50)[:, None] * 8 + np.array([0, 2, 3, 4, 5])[None, :]).reshape(-1)
    assert np.array_equal(got, expect(peer, where=where))
    for t in (cube, record, records):
        t.Free()


def true_lower_bounds() -> None:
    """The first byte is neither at the buffer's address nor at the lower bound."""
    inner = MPI.INT.Create_hindexed([2, 3], [-8, 16])
    t = inner.Create_resized(-16, 48).Commit()
    assert t.Get_true_extent() == (-8, 36) and t.Get_extent() == (-16, 48)
    mine, got = data(rank), blank()
    comm.Sendrecv([mine[4:], 5, t], peer, 24, [got[4:], 5, t], peer, 24)
    where = 4 + (np.arange(5)[:, None] * 12 + np.array([-2, -1, 4, 5, 6])[None, :]).reshape(-1)
    assert np.array_equal(got, expect(peer, where=where))
    t.Free()
    inner.Free()


def small_pack_buffer_is_not_overrun() -> None:
    """TEMPI never looks at the output's size. Whether it is an error is the library's affair; overrunning is ours."""
    t = strided()
    other = MPI.COMM_SELF.Dup()
    other.Set_errhandler(MPI.ERRORS_RETURN)
    guard = bytearray(b"\x11" * 1000)
    with contextlib.suppress(MPI.Exception):
        t.Pack(data(rank), memoryview(guard)[:100], 0, other)
    assert bytes(guard[100:]) == b"\x11" * 900
    other.Free()
    t.Free()


def uncommitted_types_stay_errors() -> None:
    t = MPI.INT.Create_vector(8, 1, 2)
    other = comm.Dup()
    other.Set_errhandler(MPI.ERRORS_RETURN)
    try:
        other.Send([data(rank), 1, t], peer, 0)
    except MPI.Exception as error:
        assert error.Get_error_class() == MPI.ERR_TYPE
    else:
        raise AssertionError("an uncommitted type was sent without an error")
    other.Free()
    t.Free()


def threads() -> None:
    """Several threads exchange their own typed messages at once, where the library allows it."""
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        return
    failures: list[str] = []

    def plain(k: int) -> None:
        """Requests that are not ours: their handles may have been ours a moment ago, in another thread."""
        for turn in range(40):
            got = np.zeros(3, "i")
            request = comm.Irecv([got, 3, MPI.INT], peer, 100 + k)
            comm.Send([data(rank, 3) + turn, 3, MPI.INT], peer, 100 + k)
            request.Wait()
            if not np.array_equal(got, data(peer, 3) + turn):
                failures.append(f"thread {k} turn {turn}")

    def work(k: int) -> None:
        for turn in range(20):
            t, got = strided(), blank()
            request = comm.Irecv([got, 1, t], peer, 100 + k)
            out = comm.Isend([data(rank) + turn, 1, t], peer, 100 + k)
            MPI.Request.Waitall([request, out]) if turn % 2 else (request.Wait(), spin(out))
            want = blank()
            want[places()] = (data(peer) + turn)[places()]
            if not np.array_equal(got, want):
                failures.append(f"thread {k} turn {turn}")
            t.Free()

    workers = [threading.Thread(target=plain if k % 2 else work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures


RULES = [
    sends_and_receives, ready_send, packed_order_is_kept, pair_types_leave_padding_alone, no_overtaking, short_receives,
    truncation_is_an_error, types_freed_in_flight, every_completion_call, persistent_requests,
    freed_requests_still_deliver, cancelled_receive_writes_nothing, null_any_and_self, negative_strides_and_bottom,
    one_buffer_both_ways, matched_probe, packed_at_one_end, small_pack_buffer_is_not_overrun,
    types_without_a_simple_form, true_lower_bounds, uncommitted_types_stay_errors, threads,
]  # fmt: skip


if __name__ == "__main__":
    keep(RULES if size % 2 == 0 else [], sys.argv[1:])
