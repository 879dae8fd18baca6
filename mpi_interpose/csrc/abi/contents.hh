// How a datatype was constructed: the library's answers to MPI_Type_get_envelope and MPI_Type_get_contents, by their
// large-count forms where it has these, and the names of the combiners of MPI 3.1 to 5.0.
#pragma once

#include <cstdint>
#include <vector>

#include "types.hh"

namespace undertow {

enum Name { kNamed, kDup, kContiguous, kVector, kHvector, kIndexed, kHindexed, kIndexedBlock, kHindexedBlock, kStruct,
            kSubarray, kDarray, kResized, kF90Real, kF90Complex, kF90Integer, kValueIndex, kPair };

// How many arguments of each kind the constructor had. Throws Unsupported for a combiner that we do not know.
struct Envelope {
  Name name = kNamed;
  MPI_Count ints = 0, addrs = 0, counts = 0, types = 0;
  explicit Envelope(MPI_Datatype type);
  // Value-index and F90 types belong to the library: they are never freed.
  bool predefined() const {
    return name == kNamed || name == kF90Real || name == kF90Complex || name == kF90Integer || name == kValueIndex;
  }
};

// The constructor's arguments; handles inside are freed on every way out. Throws Unsupported for more than 2^21 of a kind.
struct Contents {
  Name name = kNamed;
  std::vector<int> ints;
  std::vector<MPI_Aint> addrs;
  std::vector<MPI_Count> counts;  // only types made by large-count constructors have these
  std::vector<MPI_Datatype> types;

  explicit Contents(MPI_Datatype type);
  ~Contents() {
    for (MPI_Datatype t : types) drop(t);
  }
  Contents(const Contents&) = delete;
  Contents& operator=(const Contents&) = delete;

  bool large() const { return !counts.empty(); }
  int64_t i(size_t k) const { return ints.at(k); }
  int64_t a(size_t k) const { return addrs.at(k); }
  int64_t c(size_t k) const { return counts.at(k); }
};

}  // namespace undertow
