"""Which way device buffers take between each two ranks: `mpirun -n 4 undertow mpi doctor`.

Every rank says where it is and which card it would use (rank r of a host takes card r mod count), and tries what CUDA
IPC takes: it exports a few bytes of device memory, opens those of the other ranks of its host and reads a mark from
each, as the preload does before it serves a communicator. Rank 0 prints the ranks and a matrix, senders down and
receivers across. Gathered through mpi4py, without need of the preload; the table is a pure function of the facts.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

from .errors import InterposeError
from .gpu_doctor import answer_of

SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
LEGEND = {
    "lib": "the library reads device memory itself; datatypes with gaps are packed by our kernel first",
    "pin": "through pinned host memory",
    "ipc": "as pin; the w collectives could go through the sender's device memory, but for UNDERTOW_MPI_IPC=0",
    "IPC": "as pin, w collectives with blocks of 256 KiB or more through the sender's device memory where that is fast",
    "host": "neither rank has a card: host memory, as without a GPU",
    "off": "given to the library as they are (UNDERTOW_MPI_GPU=off)",
}


def started() -> bool:
    """Whether a launcher started this process as one of several ranks."""
    return any(os.environ.get(name, "1").isdigit() and int(os.environ.get(name, "1")) > 1 for name in SIZES)


@dataclass(frozen=True)
class Rank:
    """What one rank knows. `card` is empty without a device; `opened`: the ranks whose device memory it could read."""

    host: str
    card: str = ""
    off: bool = False
    ipc_on: bool = False
    aware: bool = False
    opened: frozenset[int] = field(default_factory=frozenset)


def way(ranks: list[Rank], source: int, target: int) -> str:
    """The key of LEGEND for device buffers sent from `source` to `target`."""
    a, b = ranks[source], ranks[target]
    if not a.card and not b.card:
        return "host"
    if a.off or b.off:
        return "off"
    if a.aware and b.aware:
        return "lib"
    if source not in b.opened:
        return "pin"
    return "IPC" if all(rank.ipc_on for rank in ranks) and served(ranks) else "ipc"


def served(ranks: list[Rank]) -> bool:
    """Whether a communicator of all ranks gets device memory for its w collectives: every rank reads all others'."""
    return all(set(range(len(ranks))) - {k} <= rank.opened for k, rank in enumerate(ranks))


def text(ranks: list[Rank]) -> str:
    """The ranks, the matrix and what its words mean."""
    n = len(ranks)
    lines = [f"rank {k}: {rank.host}, {rank.card or 'no card'}" for k, rank in enumerate(ranks)]
    ways = [["." if k == r else way(ranks, k, r) for r in range(n)] for k in range(n)]
    width = max(len("from\\to"), *(len(word) for row in ways for word in row))
    lines += ["", " ".join([f"{'from' + chr(92) + 'to':<{width}}", *(f"{r:>5}" for r in range(n))])]
    lines += [" ".join([f"{k:<{width}}", *(f"{word:>5}" for word in row)]) for k, row in enumerate(ways)]
    seen = {word for row in ways for word in row}
    lines += ["", *(f"{word:<5} {meaning}" for word, meaning in LEGEND.items() if word in seen)]
    if len({rank.ipc_on for rank in ranks}) > 1:
        lines.append("warning: UNDERTOW_MPI_IPC is not the same on all ranks; it must be")
    if any(rank.card for rank in ranks) and not served(ranks):
        closed = [(k, r) for r, rank in enumerate(ranks) for k in range(n) if k not in rank.opened | {r}]
        k, r = closed[0]
        why = "on another host" if ranks[k].host != ranks[r].host else "of the same host"
        lines.append(
            f"MPI_COMM_WORLD gets no device memory for w collectives: rank {r} cannot read that of rank {k}, {why}"
        )
    return "\n".join(lines) + "\n"


class _Card:
    """A card of this process through the driver alone, and the few calls that the trial takes."""

    class Handle(ctypes.Structure):
        _fields_ = (("opaque", ctypes.c_char * 64),)

    def __init__(self, place: int) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")
        count, context, device = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_int()
        if self.cuda.cuInit(0) or self.cuda.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
            raise OSError("no CUDA device")
        name = ctypes.create_string_buffer(256)
        self.place = place % count.value
        failed = (
            self.cuda.cuDeviceGet(ctypes.byref(device), self.place)
            or self.cuda.cuDeviceGetName(name, 256, device)
            or self.cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
            or self.cuda.cuCtxSetCurrent(context)
        )
        if failed:
            raise OSError(f"card {self.place} cannot be used (CUDA error {failed})")
        self.name = f"card {self.place}, {name.value.decode()}"
        self.at = ctypes.c_uint64()

    def export(self, mark: int) -> bytes:
        """The handle of device memory that begins with `mark`; empty when it cannot be exported."""
        handle, value = self.Handle(), ctypes.c_uint64(mark)
        failed = (
            self.cuda.cuMemAlloc_v2(ctypes.byref(self.at), ctypes.c_size_t(4096))
            or self.cuda.cuMemcpy(self.at, ctypes.c_uint64(ctypes.addressof(value)), ctypes.c_size_t(8))
            or self.cuda.cuIpcGetMemHandle(ctypes.byref(handle), self.at)
        )
        return b"" if failed else bytes(handle)

    def reads(self, handle: bytes, mark: int) -> bool:
        """Whether another process's exported memory can be opened, and begins with `mark`."""
        at, found = ctypes.c_uint64(), ctypes.c_uint64(~mark & (2**64 - 1))
        lazy = ctypes.c_uint(1)
        if self.cuda.cuIpcOpenMemHandle_v2(ctypes.byref(at), self.Handle.from_buffer_copy(handle), lazy):
            return False
        failed = self.cuda.cuMemcpy(ctypes.c_uint64(ctypes.addressof(found)), at, ctypes.c_size_t(8))
        self.cuda.cuIpcCloseMemHandle(at)
        return not failed and found.value == mark


def _library() -> str:
    """The MPI library that this process has loaded."""
    names = ("libmpi.so", "libmpich.so", "libmpi_abi.so")
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(names):
            return path
    return ""


def gather() -> list[Rank]:
    """Every rank's facts, on all ranks. Collective over MPI_COMM_WORLD; needs mpi4py."""
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise InterposeError(
            f"paths between ranks are gathered through mpi4py: pip install mpi4py ({error})"
        ) from error
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    host, place = socket.gethostname(), node.rank
    node.Free()
    try:
        card = _Card(place)
    except OSError:
        card = None
    mark = 0x5AB5 ^ os.getpid() << 20 ^ world.rank << 4
    handles = world.allgather((host, mark, card.export(mark) if card else b""))
    opened = {
        k
        for k, (there, other, handle) in enumerate(handles)
        if card and handle and k != world.rank and there == host and card.reads(handle, other)
    }
    world.Barrier()  # nobody has it open any more
    wish = os.environ.get("UNDERTOW_MPI_CUDA_AWARE", "")
    aware = wish != "0" if wish else answer_of(_library()) is True
    mine = Rank(
        host, card.name if card else "", os.environ.get("UNDERTOW_MPI_GPU", "auto") in ("off", "0"),
        os.environ.get("UNDERTOW_MPI_IPC", "auto") not in ("", "0"), aware, frozenset(opened),
    )  # fmt: skip
    return world.allgather(mine)


def main() -> None:
    """On every rank; rank 0 prints."""
    from mpi4py import MPI

    ranks = gather()
    if MPI.COMM_WORLD.rank == 0:
        sys.stdout.write("device buffers between ranks, as `undertow mpi run` would carry them\n" + text(ranks))
