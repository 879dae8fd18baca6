"""The one table of MPI functions: what is exported, which handler serves it, and the kind of each argument.

`generate.py` turns it into three pieces of C and C++: the exported symbols, the typed entries that call the handlers,
and the pointers to the library's own functions. A function that the MPI at hand does not have is not exported: a
program that looks for an optional symbol (mpi4py looks for the large-count ones) must find what its MPI offers.

Kinds, one letter per argument: b buffer, n count (MPI_Count in the large-count twin), N array of counts, D array of
displacements (MPI_Aint in the twin), A array of MPI_Aint, t datatype, T array of datatypes, h pointer to a datatype,
i int, o operation, c communicator, r pointer to a request, q request, R array of requests, s status, S array of
statuses, p int pointer, P count pointer, m message pointer, f info, C communicator pointer, v any other pointer, F
file, O offset in a file, w window, W pointer to a window, a MPI_Aint, u int (MPI_Aint in the twin), k MPI_Count.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Signature:
    """`name` without MPI_; `handler` is the C++ template that serves it; `large` says that a `_c` twin may exist."""

    name: str
    handler: str
    kinds: str
    large: bool = True

    def variants(self) -> list[tuple[str, bool]]:
        """(symbol, is the large-count twin) for every symbol that an MPI may have."""
        return [(f"MPI_{self.name}", False)] + ([(f"MPI_{self.name}_c", True)] if self.large else [])


_COLLECTIVES = (
    ("bcast", "bntic"), ("gather", "bntbntic"), ("scatter", "bntbntic"), ("gatherv", "bntbNDtic"),
    ("scatterv", "bNDtbntic"), ("allgather", "bntbntc"), ("allgatherv", "bntbNDtc"), ("alltoall", "bntbntc"),
    ("alltoallv", "bNDtbNDtc"), ("alltoallw", "bNDTbNDTc"), ("neighbor_allgather", "bntbntc"),
    ("neighbor_allgatherv", "bntbNDtc"), ("neighbor_alltoall", "bntbntc"), ("neighbor_alltoallv", "bNDtbNDtc"),
    ("neighbor_alltoallw", "bNATbNATc"), ("allreduce", "bbntoc"), ("reduce", "bbntoic"), ("reduce_scatter", "bbNtoc"),
    ("reduce_scatter_block", "bbntoc"), ("scan", "bbntoc"), ("exscan", "bbntoc"),
)  # fmt: skip
_NOT_STAGED = (  # with device memory these are named once; (name, kinds, whether there is a twin)
    ("Win_create", "baufcW", True), ("Win_attach", "wba", False), ("Put", "bntiantw", True), ("Get", "bntiantw", True),
    ("Accumulate", "bntiantow", True), ("Get_accumulate", "bntbntiantow", True), ("Fetch_and_op", "bbtiaow", False),
    ("Compare_and_swap", "bbbtiaw", False), ("Rput", "bntiantwr", True), ("Rget", "bntiantwr", True),
    ("Raccumulate", "bntiantowr", True), ("Rget_accumulate", "bntbntiantowr", True),
    ("Psend_init", "biktiicfr", False), ("Precv_init", "biktiicfr", False),
)  # fmt: skip


def _file_rows() -> list[Signature]:
    """MPI-IO with a buffer: _at forms have an offset; split collectives (begin, end) are not staged."""
    rows = []
    for way in ("read", "write"):
        for form in ("", "_all", "_shared", "_ordered", "_at", "_at_all"):
            at = "_at" if form.startswith("_at") else ""
            kinds = ("FO" if at else "F") + "bnt"
            rows.append(Signature(f"File_{way}{form}", f"file_{way}{at}", f"{kinds}s"))
            if form != "_ordered":
                rows.append(Signature(f"File_i{way}{form}", f"file_i{way}{at}", f"{kinds}r"))
            if form in ("_all", "_at_all", "_ordered"):
                rows.append(Signature(f"File_{way}{form}_begin", "not_staged", kinds))
    return rows


def _table() -> tuple[Signature, ...]:
    rows = [
        Signature("Init", "init", "vv", False),
        Signature("Init_thread", "init_thread", "vvip", False),
        Signature("Finalize", "finalize", "", False),
        Signature("Type_commit", "type_commit", "h", False),
        Signature("Type_dup", "type_dup", "th", False),
        Signature("Pack", "pack", "bntbnPc"),
        Signature("Unpack", "unpack", "bnPbntc"),
        Signature("Recv", "recv", "bntiics"),
        Signature("Mrecv", "mrecv", "bntms"),
        Signature("Imrecv", "imrecv", "bntmr"),
        Signature("Irecv", "irecv", "bntiicr"),
        Signature("Recv_init", "recv_init", "bntiicr"),
        Signature("Sendrecv", "sendrecv", "bntiibntiics"),
        Signature("Sendrecv_replace", "sendrecv_replace", "bntiiiics"),
        Signature("Start", "start", "r", False),
        Signature("Startall", "startall", "iR", False),
        Signature("Wait", "wait", "rs", False),
        Signature("Test", "test", "rps", False),
        Signature("Waitall", "waitall", "iRS", False),
        Signature("Testall", "testall", "iRpS", False),
        Signature("Waitany", "waitany", "iRps", False),
        Signature("Testany", "testany", "iRpps", False),
        Signature("Waitsome", "waitsome", "iRppS", False),
        Signature("Testsome", "testsome", "iRppS", False),
        Signature("Request_free", "request_free", "r", False),
        Signature("Request_get_status", "request_get_status", "qps", False),
        Signature("Request_get_status_all", "request_get_status_all", "iRpS", False),
        Signature("Request_get_status_any", "request_get_status_any", "iRpps", False),
        Signature("Request_get_status_some", "request_get_status_some", "iRppS", False),
        Signature("Bcast", "bcast", "bntic"),
        Signature("Gather", "gather", "bntbntic"),
        Signature("Scatter", "scatter", "bntbntic"),
        Signature("Gatherv", "gatherv", "bntbNDtic"),
        Signature("Scatterv", "scatterv", "bNDtbntic"),
        Signature("Allgather", "allgather", "bntbntc"),
        Signature("Allgatherv", "allgatherv", "bntbNDtc"),
        Signature("Alltoall", "alltoall", "bntbntc"),
        Signature("Alltoallv", "alltoallv", "bNDtbNDtc"),
        Signature("Alltoallw", "alltoallw", "bNDTbNDTc"),
        Signature("Neighbor_allgather", "neighbor_allgather", "bntbntc"),
        Signature("Neighbor_allgatherv", "neighbor_allgatherv", "bntbNDtc"),
        Signature("Neighbor_alltoall", "neighbor_alltoall", "bntbntc"),
        Signature("Neighbor_alltoallv", "neighbor_alltoallv", "bNDtbNDtc"),
        Signature("Neighbor_alltoallw", "neighbor_alltoallw", "bNATbNATc"),
        Signature("Allreduce", "allreduce", "bbntoc"),
        Signature("Reduce", "reduce", "bbntoic"),
        Signature("Reduce_local", "reduce_local", "bbnto"),
        Signature("Reduce_scatter", "reduce_scatter", "bbNtoc"),
        Signature("Reduce_scatter_block", "reduce_scatter_block", "bbntoc"),
        Signature("Dist_graph_create_adjacent", "dist_graph_create_adjacent", "cippippfiC", False),
        Signature("Scan", "scan", "bbntoc"),
        Signature("Exscan", "exscan", "bbntoc"),
    ]
    # Nonblocking ones have a request at the end; on host memory they pass through. `Scan` is served as Allreduce is.
    # Persistent ones, with an info before the request, are not staged.
    for name, kinds in _COLLECTIVES:
        rows.append(Signature(f"I{name}", "iallreduce" if name == "scan" else f"i{name}", f"{kinds}r"))
        rows.append(Signature(f"{name.capitalize()}_init", "not_staged", f"{kinds}fr"))
    rows.append(Signature("Isendrecv", "isendrecv", "bntiibntiicr"))
    rows.append(Signature("Isendrecv_replace", "isendrecv_replace", "bntiiiicr"))
    rows += _file_rows()
    rows += [Signature(name, "not_staged", kinds, large) for name, kinds, large in _NOT_STAGED]
    for mode in ("", "S", "B", "R"):
        rows.append(Signature(f"{mode}send".capitalize() if mode else "Send", "send", "bntiic"))
        rows.append(Signature(f"I{mode.lower()}send", "isend", "bntiicr"))
        rows.append(Signature(f"{mode}send_init".capitalize() if mode else "Send_init", "send_init", "bntiicr"))
    return tuple(sorted(rows, key=lambda row: row.name))


TABLE = _table()

# Functions that only we call, by their profiling names so that no other tool counts them.
_OWN = (
    "Type_get_envelope Type_get_contents Type_free Type_contiguous Type_commit Type_size_x Type_get_extent_x "
    "Type_get_true_extent_x Type_create_keyval Type_free_keyval Type_set_attr Get_elements_x Comm_size Comm_rank "
    "Comm_test_inter Topo_test Dist_graph_neighbors_count Graph_neighbors_count Cartdim_get Cart_shift Pack Unpack "
    "Test Wait Test_cancelled Request_free Request_get_status Get_library_version Initialized Query_thread"
)
_PEERS = (  # where a peer is
    "Comm_create_keyval Comm_free_keyval Comm_set_attr Comm_get_attr Comm_group Comm_remote_group Group_size "
    "Group_translate_ranks Group_free Iallgather"
)
OWN = (*_OWN.split(), *_PEERS.split())
# What only the reordering of graph communicators needs, beside Comm_rank and Comm_size.
OWN += ("Allgather", "Allgatherv", "Allreduce", "Comm_split", "Comm_free", "Dist_graph_create_adjacent")
OWN_OPTIONAL = ("Type_get_envelope_c", "Type_get_contents_c")

# New in MPI 4.1. The libraries of the fixed ABIs have them for every MPI: where the one at hand has not, they ask for
# each request by itself.
NEWER = tuple(f"MPI_Request_get_status_{which}" for which in ("all", "any", "some"))

# Open MPI's Fortran bindings call PMPI directly, so their entry points are exported too (see fortran.py).
SYMBOLS = tuple(symbol for row in TABLE for symbol, _ in row.variants())
