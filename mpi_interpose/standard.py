"""The two ABIs that are fixed, as declarations of our own: one build then serves every MPI of that ABI.

`abi` is the MPI-5 standard ABI (the chapter of MPI 5.0 on it; libmpi_abi.so.1). `mpich` is the one that MPICH and
its relatives keep since 2013 (MPICH ABI Compatibility Initiative: soname 12). From the constants below and the table of
signatures `header` makes the mpi.h that the glue is compiled with: only what it uses. The tests compile the same list
against the MPIs' own headers. Open MPI's ABI changes with its major versions; it is built by the user's mpicc.

Parameters that only some MPIs declare const are const here: that takes any argument, and does not change the ABI.
"""

from __future__ import annotations

import re

from .generate import ctype
from .signatures import NEWER, OWN, OWN_OPTIONAL, SYMBOLS, TABLE

SYMBOLS_KNOWN = frozenset(SYMBOLS) | {f"MPI_{name}" for name in (*OWN, *OWN_OPTIONAL)}
SYMBOLS_NEEDED = SYMBOLS_KNOWN - set(NEWER)

_COMBINERS = (
    "NAMED", "DUP", "CONTIGUOUS", "VECTOR", "HVECTOR", "INDEXED", "HINDEXED", "INDEXED_BLOCK", "HINDEXED_BLOCK",
    "STRUCT", "SUBARRAY", "DARRAY", "F90_REAL", "F90_COMPLEX", "F90_INTEGER", "RESIZED", "VALUE_INDEX",
)  # fmt: skip
_MPICH_COMBINERS = dict(
    NAMED=1, DUP=2, CONTIGUOUS=3, VECTOR=4, HVECTOR_INTEGER=5, HVECTOR=6, INDEXED=7, HINDEXED_INTEGER=8, HINDEXED=9,
    INDEXED_BLOCK=10, STRUCT_INTEGER=11, STRUCT=12, SUBARRAY=13, DARRAY=14, F90_REAL=15, F90_COMPLEX=16,
    F90_INTEGER=17, RESIZED=18, HINDEXED_BLOCK=19, VALUE_INDEX=20,
)  # fmt: skip

# Integers, then handles by type, then addresses by type.
CONSTANTS: dict[str, dict[str, int]] = {
    "abi": dict(
        SUCCESS=0, ERR_IN_STATUS=19, ERR_PENDING=18, ERR_UNSUPPORTED_OPERATION=55, ANY_SOURCE=-1, PROC_NULL=-3,
        UNDEFINED=-32766, KEYVAL_INVALID=0, ORDER_C=12, DISTRIBUTE_DFLT_DARG=19, DISTRIBUTE_NONE=16,
        DISTRIBUTE_BLOCK=17, CART=211, GRAPH=212, DIST_GRAPH=213, THREAD_MULTIPLE=4096,
        **{f"COMBINER_{name}": 101 + k for k, name in enumerate(_COMBINERS)},
    ),
    "mpich": dict(
        SUCCESS=0, ERR_IN_STATUS=17, ERR_PENDING=18, ERR_UNSUPPORTED_OPERATION=44, ANY_SOURCE=-2, PROC_NULL=-1,
        UNDEFINED=-32766, KEYVAL_INVALID=0x24000000, ORDER_C=56, DISTRIBUTE_DFLT_DARG=-49767, DISTRIBUTE_NONE=123,
        DISTRIBUTE_BLOCK=121, GRAPH=1, CART=2, DIST_GRAPH=3, THREAD_MULTIPLE=3,
        **{f"COMBINER_{name}": value for name, value in _MPICH_COMBINERS.items()},
    ),
}  # fmt: skip
HANDLES: dict[str, dict[str, tuple[str, int]]] = {
    "abi": {
        "COMM_NULL": ("Comm", 0x100), "COMM_WORLD": ("Comm", 0x101), "COMM_SELF": ("Comm", 0x102),
        "REQUEST_NULL": ("Request", 0x180), "DATATYPE_NULL": ("Datatype", 0x200), "PACKED": ("Datatype", 0x207),
        "INT": ("Datatype", 0x209), "BYTE": ("Datatype", 0x247), "MAX": ("Op", 0x23),
    },
    "mpich": {
        "COMM_NULL": ("Comm", 0x04000000), "COMM_WORLD": ("Comm", 0x44000000), "COMM_SELF": ("Comm", 0x44000001),
        "REQUEST_NULL": ("Request", 0x2C000000), "DATATYPE_NULL": ("Datatype", 0x0C000000),
        "PACKED": ("Datatype", 0x4C00010F), "INT": ("Datatype", 0x4C000405), "BYTE": ("Datatype", 0x4C00010D),
        "MAX": ("Op", 0x58000001),
    },
}  # fmt: skip
ADDRESSES: dict[str, dict[str, tuple[str, int]]] = {
    "abi": {
        "BOTTOM": ("void*", 0), "IN_PLACE": ("void*", 1), "STATUS_IGNORE": ("MPI_Status*", 0),
        "STATUSES_IGNORE": ("MPI_Status*", 0), "UNWEIGHTED": ("int*", 10),
    },
    "mpich": {  # MPICH's MPI_UNWEIGHTED is a variable of the library
        "BOTTOM": ("void*", 0), "IN_PLACE": ("void*", -1), "STATUS_IGNORE": ("MPI_Status*", 1),
        "STATUSES_IGNORE": ("MPI_Status*", 1),
    },
}  # fmt: skip
STATUS = {
    "abi": ("MPI_SOURCE", "MPI_TAG", "MPI_ERROR", "MPI_internal[5]"),
    "mpich": ("count_lo", "count_hi_and_cancelled", "MPI_SOURCE", "MPI_TAG", "MPI_ERROR"),
}
HANDLE_TYPES = ("Comm", "Datatype", "Group", "Info", "Message", "Op", "Request", "Win", "File")
ALWAYS_STRUCT = ("File",)  # MPICH's other handles are integers
HANDLE_BYTES = {"abi": 8, "mpich": 4, "openmpi": 8}
STATUS_BYTES = {"abi": 32, "mpich": 20, "openmpi": 24}

# What only we call, and is not in the table of signatures.
_CALLED = """
Type_get_envelope(MPI_Datatype, int*, int*, int*, int*)
Type_get_contents(MPI_Datatype, int, int, int, int*, MPI_Aint*, MPI_Datatype*)
Type_get_envelope_c(MPI_Datatype, MPI_Count*, MPI_Count*, MPI_Count*, MPI_Count*, int*)
Type_get_contents_c(MPI_Datatype, CONTENTS_C, int*, MPI_Aint*, MPI_Count*, MPI_Datatype*)
Type_free(MPI_Datatype*)
Type_contiguous(int, MPI_Datatype, MPI_Datatype*)
Type_size_x(MPI_Datatype, MPI_Count*)
Type_get_extent_x(MPI_Datatype, MPI_Count*, MPI_Count*)
Type_get_true_extent_x(MPI_Datatype, MPI_Count*, MPI_Count*)
Type_create_keyval(MPI_Type_copy_attr_function*, MPI_Type_delete_attr_function*, int*, void*)
Type_free_keyval(int*)
Type_set_attr(MPI_Datatype, int, void*)
Get_elements_x(const MPI_Status*, MPI_Datatype, MPI_Count*)
Get_library_version(char*, int*)
Comm_size(MPI_Comm, int*)
Comm_rank(MPI_Comm, int*)
Comm_test_inter(MPI_Comm, int*)
Comm_create_keyval(MPI_Comm_copy_attr_function*, MPI_Comm_delete_attr_function*, int*, void*)
Comm_free_keyval(int*)
Comm_set_attr(MPI_Comm, int, void*)
Comm_get_attr(MPI_Comm, int, void*, int*)
Comm_group(MPI_Comm, MPI_Group*)
Comm_remote_group(MPI_Comm, MPI_Group*)
Group_size(MPI_Group, int*)
Group_translate_ranks(MPI_Group, int, const int*, MPI_Group, int*)
Group_free(MPI_Group*)
Comm_split(MPI_Comm, int, int, MPI_Comm*)
Comm_free(MPI_Comm*)
Topo_test(MPI_Comm, int*)
Dist_graph_neighbors_count(MPI_Comm, int*, int*, int*)
Graph_neighbors_count(MPI_Comm, int, int*)
Cartdim_get(MPI_Comm, int*)
Cart_shift(MPI_Comm, int, int, int*, int*)
Test_cancelled(const MPI_Status*, int*)
Initialized(int*)
Query_thread(int*)
"""


def fits(flavour: str, library: str, symbols: tuple[str, ...]) -> str | None:
    """Which fixed ABI serves an MPI: its flavour, when the soname promises it and no function of ours is missing."""
    promised = {"abi": r"libmpi_abi\.so\.1(\.|$)", "mpich": r"libmpi(ch)?\.so\.12(\.|$)"}.get(flavour)
    name = library.rsplit("/", 1)[-1]
    return flavour if promised and re.match(promised, name) and set(symbols) >= SYMBOLS_NEEDED else None


def _prototypes() -> list[str]:
    lines = []
    for row in TABLE:
        for symbol, large in row.variants():
            kinds = ["const " + ctype(k, large) if k in "bNDAT" else ctype(k, large) for k in row.kinds]
            if row.handler == "init_thread" or row.handler == "init":
                kinds = ["int*", "char***", *kinds[2:]]
            if row.handler == "dist_graph_create_adjacent":
                kinds = ["const int*" if kind == "int*" else kind for kind in kinds]
            lines.append(f"int {symbol}({', '.join(kinds)});")
    called = _CALLED.replace("CONTENTS_C", ", ".join(["MPI_Count"] * 4))
    return lines + [f"int MPI_{line};" for line in called.split("\n") if line]


def values(flavour: str) -> dict[str, tuple[str, int]]:
    """Every constant of an ABI as (type, value); 'int' for the integers."""
    named = {f"MPI_{name}": ("int", value) for name, value in CONSTANTS[flavour].items()}
    named |= {f"MPI_{name}": (f"MPI_{kind}", value) for name, (kind, value) in HANDLES[flavour].items()}
    return named | {f"MPI_{name}": entry for name, entry in ADDRESSES[flavour].items()}


def header(flavour: str) -> str:
    """The text of an mpi.h for 'abi' or 'mpich', with what the glue uses."""
    struct = HANDLE_BYTES[flavour] == 8
    out = ["// Generated by standard.py; see there.", "#pragma once", "#include <stdint.h>", 'extern "C" {']
    out += ["typedef intptr_t MPI_Aint;", "typedef int64_t MPI_Offset;", "typedef int64_t MPI_Count;"]
    for kind in HANDLE_TYPES:
        out.append(f"typedef {f'struct MPI_ABI_{kind}*' if struct or kind in ALWAYS_STRUCT else 'int'} MPI_{kind};")
    out.append("typedef struct { " + " ".join(f"int {field};" for field in STATUS[flavour]) + " } MPI_Status;")
    for kind, handle in (("Type", "Datatype"), ("Comm", "Comm")):
        out.append(f"typedef int(MPI_{kind}_copy_attr_function)(MPI_{handle}, int, void*, void*, void*, int*);")
        out.append(f"typedef int(MPI_{kind}_delete_attr_function)(MPI_{handle}, int, void*, void*);")
    for name, (kind, value) in values(flavour).items():
        out.append(f"#define {name} " + (f"({value})" if kind == "int" else f"(({kind})({value}L))"))
    out.append("#define MPI_MAX_LIBRARY_VERSION_STRING 8192")
    if flavour == "mpich":
        out.append("#define MPICH_NUMVERSION 1  // a relative of MPICH, no version in particular")
    return "\n".join([*out, *_prototypes(), "}", ""])
