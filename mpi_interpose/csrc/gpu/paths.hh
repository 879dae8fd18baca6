// Up to how many bytes a kernel writes or reads pinned host memory itself; above, it works in device scratch and the
// copy engine moves the bytes. The limits are rows of a text, measured by benchmarks/mpi_gpu_paths:
//
//     # a comment
//     to_host BLOCK BYTES      packing: blocks of at least BLOCK bytes go directly in messages of at most BYTES
//     from_host BLOCK BYTES    unpacking
//
// The text compiled in is csrc/policy/gpu.txt; UNDERTOW_MPI_GPU_PATHS names a file in its place.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace undertow::gpu {

struct Paths {
  struct Row {
    int64_t block, bytes;
  };
  std::vector<Row> rows[2];  // from host, to host; ascending blocks

  // The row of the largest block that is not larger; the first row for blocks smaller than all. 0 without rows.
  int64_t direct_up_to(bool packing, int64_t block) const;
};

// Throws std::invalid_argument with the line that is no row.
Paths read_paths(const std::string& text);

// The machine's. A named file that cannot be read or understood is a Failure.
const Paths& machine_paths();

}  // namespace undertow::gpu
