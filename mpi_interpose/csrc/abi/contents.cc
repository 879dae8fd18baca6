// See contents.hh.
#include "contents.hh"

#include <string>

#include "decode.hh"

namespace undertow {

const char* const combiner_names[kCombiners] = {
    "named",    "dup",           "contiguous", "vector",  "hvector", "indexed",  "hindexed",    "indexed_block",
    "hindexed_block", "struct",  "subarray",   "darray",  "resized", "f90_real", "f90_complex", "f90_integer",
    "value_index",    "pair",    "other"};

namespace {

constexpr int64_t kMaxTable = 1 << 21;

Name name_of(int combiner) {
  switch (combiner) {
    case MPI_COMBINER_NAMED: return kNamed;
    case MPI_COMBINER_DUP: return kDup;
    case MPI_COMBINER_CONTIGUOUS: return kContiguous;
    case MPI_COMBINER_VECTOR: return kVector;
    case MPI_COMBINER_HVECTOR: return kHvector;
    case MPI_COMBINER_INDEXED: return kIndexed;
    case MPI_COMBINER_HINDEXED: return kHindexed;
    case MPI_COMBINER_INDEXED_BLOCK: return kIndexedBlock;
    case MPI_COMBINER_HINDEXED_BLOCK: return kHindexedBlock;
    case MPI_COMBINER_STRUCT: return kStruct;
    case MPI_COMBINER_SUBARRAY: return kSubarray;
    case MPI_COMBINER_DARRAY: return kDarray;
    case MPI_COMBINER_RESIZED: return kResized;
    case MPI_COMBINER_F90_REAL: return kF90Real;
    case MPI_COMBINER_F90_COMPLEX: return kF90Complex;
    case MPI_COMBINER_F90_INTEGER: return kF90Integer;
    default: break;
  }
#if defined(UNDERTOW_COMBINER_VALUE_INDEX)
  if (combiner == MPI_COMBINER_VALUE_INDEX) return kValueIndex;
#endif
  // The _INTEGER forms of MPI-1's Fortran constructors: their contents look like the plain ones.
#if defined(OPEN_MPI)
  if (combiner == MPI_COMBINER_HVECTOR - 1) return kHvector;
  if (combiner == MPI_COMBINER_HINDEXED - 1) return kHindexed;
  if (combiner == MPI_COMBINER_STRUCT - 1) return kStruct;
#elif defined(MPICH_NUMVERSION) && !defined(UNDERTOW_ABI)
  if (combiner == MPI_COMBINER_HVECTOR_INTEGER) return kHvector;
  if (combiner == MPI_COMBINER_HINDEXED_INTEGER) return kHindexed;
  if (combiner == MPI_COMBINER_STRUCT_INTEGER) return kStruct;
#endif
  throw Unsupported("unknown combiner " + std::to_string(combiner));
}

// The large-count questions, where the MPI that this was built for has them and the one at hand too.
bool asks_large() {
#if defined(UNDERTOW_HAS_TYPE_GET_ENVELOPE_C) && defined(UNDERTOW_HAS_TYPE_GET_CONTENTS_C)
  return own.Type_get_envelope_c && own.Type_get_contents_c;
#else
  return false;
#endif
}

}  // namespace

Envelope::Envelope(MPI_Datatype type) {
  int combiner = 0;
  if (asks_large()) {
#if defined(UNDERTOW_HAS_TYPE_GET_ENVELOPE_C) && defined(UNDERTOW_HAS_TYPE_GET_CONTENTS_C)
    must(own.Type_get_envelope_c(type, &ints, &addrs, &counts, &types, &combiner), "Type_get_envelope_c");
#endif
  } else {
    int i = 0, a = 0, t = 0;
    must(own.Type_get_envelope(type, &i, &a, &t, &combiner), "Type_get_envelope");
    ints = i, addrs = a, types = t;
  }
  name = name_of(combiner);
}

Contents::Contents(MPI_Datatype type) {
  const Envelope e(type);
  name = e.name;
  if (name == kNamed) return;
  if (e.ints > kMaxTable || e.addrs > kMaxTable || e.counts > kMaxTable || e.types > kMaxTable)
    throw Unsupported("table too long");
  ints.resize(e.ints), addrs.resize(e.addrs), counts.resize(e.counts), types.resize(e.types);
  if (e.predefined()) return;
  int rc = MPI_SUCCESS;
  if (asks_large()) {
#if defined(UNDERTOW_HAS_TYPE_GET_ENVELOPE_C) && defined(UNDERTOW_HAS_TYPE_GET_CONTENTS_C)
    rc = own.Type_get_contents_c(type, e.ints, e.addrs, e.counts, e.types, ints.data(), addrs.data(), counts.data(),
                                 types.data());
#endif
  } else {
    rc = own.Type_get_contents(type, static_cast<int>(e.ints), static_cast<int>(e.addrs), static_cast<int>(e.types),
                               ints.data(), addrs.data(), types.data());
  }
  if (rc != MPI_SUCCESS) types.clear();
  must(rc, "Type_get_contents");
}

void drop(MPI_Datatype type) {
  try {
    if (Envelope(type).predefined()) return;
  } catch (const Unsupported&) {
    // Not understood, hence derived: predefined types are all understood.
  }
  own.Type_free(&type);
}

}  // namespace undertow
