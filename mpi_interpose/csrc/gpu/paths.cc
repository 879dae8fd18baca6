// See paths.hh.
#include "paths.hh"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>

#include "driver.hh"

extern "C" const char undertow_gpu_paths[];  // csrc/policy/gpu.txt; see compile.py

namespace undertow::gpu {

int64_t Paths::direct_up_to(bool packing, int64_t block) const {
  const std::vector<Row>& own = rows[packing];
  int64_t bytes = own.empty() ? 0 : own.front().bytes;
  for (const Row& row : own)
    if (row.block <= block) bytes = row.bytes;
  return bytes;
}

Paths read_paths(const std::string& text) {
  Paths paths;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.empty() || line[0] == '#') continue;
    std::istringstream words(line);
    std::string way, rest;
    Paths::Row row{};
    const bool three = static_cast<bool>(words >> way >> row.block >> row.bytes) && !(words >> rest);
    if (!three || (way != "to_host" && way != "from_host") || row.block < 1 || row.bytes < 0)
      throw std::invalid_argument("'" + line + "'; expected `to_host BLOCK BYTES` or `from_host BLOCK BYTES`");
    paths.rows[way == "to_host"].push_back(row);
  }
  for (auto& own : paths.rows)
    std::sort(own.begin(), own.end(), [](const Paths::Row& a, const Paths::Row& b) { return a.block < b.block; });
  return paths;
}

const Paths& machine_paths() {
  static const Paths* const paths = [] {
    const char* named = std::getenv("UNDERTOW_MPI_GPU_PATHS");
    if (!named || !*named) return new Paths(read_paths(undertow_gpu_paths));
    std::ifstream file(named);
    std::ostringstream text;
    text << file.rdbuf();
    if (!file) throw Failure(std::string("UNDERTOW_MPI_GPU_PATHS: cannot read ") + named);
    try {
      return new Paths(read_paths(text.str()));
    } catch (const std::invalid_argument& error) {
      throw Failure(std::string(named) + ": " + error.what());
    }
  }();
  return *paths;
}

}  // namespace undertow::gpu
