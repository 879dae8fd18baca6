// See place.hh.
#include "place.hh"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace undertow {
namespace {

constexpr int kMostNodes = 256;

uint64_t hash(const std::string& word) {
  uint64_t h = 1469598103934665603ull;
  for (const char c : word) h = (h ^ static_cast<unsigned char>(c)) * 1099511628211ull;
  return h;
}

long package_of(int cpu) {
  char path[96];
  long package = -1;
  std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/physical_package_id", cpu);
  if (FILE* f = std::fopen(path, "r")) {
    if (std::fscanf(f, "%ld", &package) != 1) package = -1;
    std::fclose(f);
  }
  return package;
}

long node_of(int cpu) {
  char path[96];
  for (int node = 0; node < kMostNodes; ++node) {
    std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/node%d", cpu, node);
    if (access(path, F_OK) == 0) return node;
  }
  return -1;
}

int processors() { return static_cast<int>(std::min<long>(sysconf(_SC_NPROCESSORS_CONF), CPU_SETSIZE)); }

// What `of` says of all processors that `allowed` picks, if it is one answer; -1: several, or not known.
template <class Allowed, class Of>
long one(Allowed allowed, Of of) {
  long found = -1;
  for (int cpu = 0; cpu < processors(); ++cpu) {
    if (!allowed(cpu)) continue;
    const long answer = of(cpu);
    if (answer < 0 || (found >= 0 && answer != found)) return -1;
    found = answer;
  }
  return found;
}

// The socket of a memory node's first processor; -1: it has none.
long package_of_node(int node) {
  for (int cpu = 0; cpu < processors(); ++cpu)
    if (node_of(cpu) == node) return package_of(cpu);
  return -1;
}

std::string host_name() {
  char name[256] = "";
  gethostname(name, sizeof name - 1);
  return name;
}

}  // namespace

Place here() {
  Place place;
  if (const char* words = std::getenv("UNDERTOW_MPI_PLACE"); words && *words) {
    const std::string all(words);
    const size_t first = all.find('/'), second = first == std::string::npos ? first : all.find('/', first + 1);
    place.host = hash(all.substr(0, first));
    if (first != std::string::npos) {
      place.package = static_cast<int64_t>(hash(all.substr(0, second)) >> 1);
      if (second != std::string::npos) place.node = static_cast<int64_t>(hash(all) >> 1);
      return place;
    }
  } else {
    place.host = hash(host_name());
  }
  cpu_set_t mine;
  CPU_ZERO(&mine);
  if (sched_getaffinity(0, sizeof mine, &mine) == 0) {
    const auto allowed = [&](int cpu) { return CPU_ISSET(cpu, &mine); };
    place.package = one(allowed, package_of);
    place.node = one(allowed, node_of);
  }
  return place;
}

uint64_t host_number() { return here().host; }

bool one_socket_here() {
  return one([](int) { return true; }, package_of) >= 0;
}

NodeDistances node_distances() {
  std::vector<int> nodes;
  std::vector<long> packages;
  std::vector<std::vector<int>> rows;
  for (int node = 0; node < kMostNodes; ++node) {
    char path[96];
    std::snprintf(path, sizeof path, "/sys/devices/system/node/node%d/distance", node);
    FILE* f = std::fopen(path, "r");
    if (!f) continue;
    std::vector<int> row;
    for (int d; std::fscanf(f, "%d", &d) == 1;) row.push_back(d);
    std::fclose(f);
    nodes.push_back(node);
    packages.push_back(package_of_node(node));
    rows.push_back(row);
  }
  int64_t sum[2] = {}, pairs[2] = {};
  for (size_t a = 0; a < nodes.size(); ++a)
    for (size_t b = 0; b < nodes.size() && b < rows[a].size(); ++b) {
      if (a == b || packages[a] < 0 || packages[b] < 0) continue;  // memory without processors is nobody's place
      const bool other = packages[a] != packages[b];
      sum[other] += rows[a][b], ++pairs[other];
    }
  return {pairs[0] ? sum[0] / pairs[0] : 0, pairs[1] ? sum[1] / pairs[1] : 0};
}

}  // namespace undertow
