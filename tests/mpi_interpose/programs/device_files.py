"""MPI-IO from and to device memory, by every call that has a buffer; and calls that are not staged, which are named.

usage: device_files.py; it writes to a file of its own, which it removes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parent))

from device_buffers import GAP, PLACES, Mine, blank, comm, data, device, rank, size, strided
from rule_loop import keep

BYTES = 4 * len(PLACES)


def opened() -> MPI.File:
    """A file of all ranks that goes when it is closed."""
    path = str(Path(tempfile.mkdtemp(prefix="device_files_")) / "file") if rank == 0 else ""
    return MPI.File.Open(comm, comm.bcast(path), MPI.MODE_CREATE | MPI.MODE_RDWR | MPI.MODE_DELETE_ON_CLOSE)


def called(file: MPI.File, name: str, arguments: list) -> None:
    """Both kinds of call; blocking ones return when done."""
    request = getattr(file, name)(*arguments)
    if request is not None:
        request.Wait()


def writes() -> None:
    """What a call writes from the device is what MPI reads back into host memory."""
    t = strided()
    for form in ("", "_all", "_at", "_at_all", "_shared", "_ordered"):
        for name in (f"Write{form}", f"Iwrite{form}"):
            if name == "Iwrite_ordered":
                continue
            file, mine, at = opened(), Mine(data(rank)), "_at" in form
            shared = form in ("_shared", "_ordered")
            if not shared and not at:
                file.Seek(BYTES * rank)
            called(file, name, [*([BYTES * rank] if at else []), [mine.mpi(), 1, t]])
            file.Sync()
            comm.Barrier()
            file.Sync()
            whole = np.zeros(size * len(PLACES), "i")
            file.Read_at(0, whole)
            parts = [tuple(part) for part in whole.reshape(size, -1)]
            want = [tuple(data(r)[PLACES]) for r in range(size)]
            assert (sorted(parts) == sorted(want)) if form == "_shared" else parts == want, name
            file.Close()
    t.Free()


def reads() -> None:
    """Into the device, gaps untouched; the last rank's part of the file is cut short."""
    t = strided()
    for form in ("", "_all", "_at", "_at_all", "_shared", "_ordered"):
        for name in (f"Read{form}", f"Iread{form}"):
            if name == "Iread_ordered":
                continue
            file, got, at = opened(), Mine(blank()), "_at" in form
            # Open MPI 5.0.11 does not come back from some reads beyond the end of a file, of host memory too
            shared, short = form in ("_shared", "_ordered"), 30 if "MPICH" in MPI.Get_library_version() else 0
            if rank == 0:
                whole = np.concatenate([data(0)[PLACES] for _ in range(size)])
                file.Write_at(0, whole[: len(whole) - (0 if shared else short)])
            file.Sync()
            comm.Barrier()
            file.Sync()
            if not shared and not at:
                file.Seek(BYTES * rank)
            called(file, name, [*([BYTES * rank] if at else []), [got.mpi(), 1, t]])
            want = blank()
            n = len(PLACES) - (short if rank == size - 1 and not shared else 0)
            want[PLACES[:n]] = data(0)[PLACES[:n]]
            assert np.array_equal(got.read(), want), name
            file.Close()
    t.Free()


def contiguous_and_views() -> None:
    """A view that lays the ranks' numbers in turn, predefined types, and a status that counts them."""
    file, n = opened(), 1000
    column = MPI.INT.Create_vector(n, 1, size).Commit()
    file.Set_view(4 * rank, MPI.INT, column)
    mine, got, status = Mine(data(rank, n)), Mine(blank(n)), MPI.Status()
    file.Write_all([mine.mpi(), n, MPI.INT], status)
    assert status.Get_count(MPI.INT) == n
    file.Seek(0)
    file.Read_all([got.mpi(), n, MPI.INT], status)
    assert status.Get_count(MPI.INT) == n and np.array_equal(got.read(), data(rank, n))
    column.Free()
    file.Close()


def host_windows_pass() -> None:
    """As they do without the preload: a library that makes no windows says so itself."""
    host = np.zeros(100, "i")
    try:
        window = MPI.Win.Create(host, comm=comm)
    except MPI.Exception as error:
        if device.is_fake:
            raise
        print(f"no windows in this MPI: {error!r}")
        return
    window.Fence()
    window.Put([host.copy(), 100, MPI.INT], rank)
    window.Fence()
    window.Free()


def what_is_not_staged_is_named() -> None:
    """Before the library gets it: here only calls that do not touch the buffer yet."""
    mine = Mine(np.full(100, GAP, "i"))
    calls = [
        lambda: MPI.Win.Create(mine.mpi(), comm=comm).Free(),
        lambda: comm.Bcast_init([mine.mpi(), 100, MPI.INT], 0).Free(),
    ]
    for call in 2 * calls:
        try:
            call()
        except (MPI.Exception, NotImplementedError) as error:  # the library's own word after ours, or MPI 3
            if device.is_fake:
                raise
            print(f"not staged: {error!r}")


RULES = [writes, reads, contiguous_and_views, host_windows_pass, what_is_not_staged_is_named]

if __name__ == "__main__":
    keep(RULES, sys.argv[1:], "on the stand-in" if device.is_fake else "on a GPU")
