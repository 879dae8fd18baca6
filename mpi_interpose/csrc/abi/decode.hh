// What decoding a datatype (decode.cc) and proving it (prove.cc) both ask of the library.
#pragma once

#include <vector>

#include "types.hh"

namespace undertow {

constexpr int64_t kMaxPattern = 1 << 18;  // bytes of the buffer in the pattern comparison
constexpr size_t kStray = 4096;  // mapped bytes before and after what the library packs: Open MPI 5 reads 8 below some types

void must(int rc, const char* what);  // throws Unsupported unless `rc` is MPI_SUCCESS

struct Bounds {
  int64_t size, lb, extent, true_lb, true_extent;
};

Bounds bounds_of(MPI_Datatype type);

// One element of at most kMaxPattern bytes, packed by the library: its bytes' places in the buffer, in packed order.
std::vector<int64_t> library_order(MPI_Datatype type, const Bounds& b);

}  // namespace undertow
