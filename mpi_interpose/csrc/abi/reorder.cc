// See handlers_graph.hh.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>

#include "graph.hh"
#include "handlers_graph.hh"

namespace undertow {
namespace {

// Every rank's list, one after the other; `starts` has one more entry than ranks.
bool gather(MPI_Comm comm, const std::vector<int>& mine, std::vector<int>& all, std::vector<int>& starts) {
  const int n = size_of(comm), count = static_cast<int>(mine.size());
  std::vector<int> counts(n);
  if (own.Allgather(&count, 1, MPI_INT, counts.data(), 1, MPI_INT, comm) != MPI_SUCCESS) return false;
  starts.assign(n + 1, 0);
  for (int k = 0; k < n; ++k) starts[k + 1] = starts[k] + counts[k];
  all.resize(starts[n] + 1);
  return own.Allgatherv(mine.data(), count, MPI_INT, all.data(), counts.data(), starts.data(), MPI_INT, comm) ==
         MPI_SUCCESS;
}

constexpr int kLevels = 3;  // host, socket, memory node

struct Costs {
  int64_t of[kLevels + 1];  // of a unit of weight between hosts, sockets, memory nodes of a socket, and within one
};
struct Presence {
  Place place;
  Costs costs;
};

// In tenths of what it is within a memory node. Between hosts and between sockets what the table has measured, where it
// has; else the system's distances of memory nodes, and ten times as much between hosts.
Costs costs() {
  constexpr int64_t kOne = 10;
  const NodeDistances distances = node_distances();
  const double socket = link_slower(kHost, kSocket), remote = link_slower(kRemote, kHost);
  Costs c;
  c.of[3] = kOne;
  c.of[2] = std::max(kOne, distances.same_socket);
  c.of[1] = socket > 0 ? static_cast<int64_t>(socket * kOne) : distances.other_socket ? distances.other_socket : 2 * kOne;
  c.of[1] = std::max(c.of[1], c.of[2]);
  c.of[0] = std::max(c.of[1] + 1, remote > 0 ? static_cast<int64_t>(remote * static_cast<double>(c.of[1])) : 10 * c.of[1]);
  return c;
}

// The first rank in a place names it; what a place costs is what rank 0 says.
Places places_of(const std::vector<Presence>& all) {
  Places places;
  places.cost.assign(all[0].costs.of, all[0].costs.of + kLevels + 1);
  places.level.assign(kLevels, std::vector<int>(all.size()));
  std::map<std::array<int64_t, kLevels>, int> named[kLevels];
  for (size_t p = 0; p < all.size(); ++p) {
    const Place& place = all[p].place;
    const int64_t parts[kLevels] = {static_cast<int64_t>(place.host), place.package, place.node};
    std::array<int64_t, kLevels> path{};
    for (int k = 0; k < kLevels; ++k) {
      path[k] = parts[k];
      places.level[k][p] = named[k].emplace(path, static_cast<int>(p)).first->second;
    }
  }
  return places;
}

}  // namespace

bool reorder_wanted() {
  static const bool wanted = [] {
    const char* v = std::getenv("UNDERTOW_MPI_REORDER");
    return v && *v && std::strcmp(v, "0") != 0;
  }();
  return wanted;
}

bool reorder_graph(MPI_Comm comm, Adjacency& mine, bool weighted, MPI_Comm* ordered) {
  const int n = size_of(comm), rank = rank_in(comm);
  // Whether weights are given, and whether the arguments make sense, must be known to all before anything is decided.
  bool sound = !weighted || (mine.source_weights.size() == mine.sources.size() &&
                             mine.target_weights.size() == mine.targets.size());
  for (const auto* side : {&mine.sources, &mine.targets})
    for (int v : *side) sound = sound && v >= 0 && v < n;
  int facts[3] = {weighted, !weighted, !sound}, all[3];
  if (own.Allreduce(facts, all, 3, MPI_INT, MPI_MAX, comm) != MPI_SUCCESS || all[2] || (all[0] && all[1])) return false;

  Presence mine_here{here(), costs()};
  std::vector<Presence> all_here(n);
  if (own.Allgather(&mine_here, sizeof mine_here, MPI_BYTE, all_here.data(), sizeof mine_here, MPI_BYTE, comm) !=
      MPI_SUCCESS)
    return false;
  const Places places = places_of(all_here);

  std::vector<int> lists[4], starts[4];
  const std::vector<int>* own_lists[4] = {&mine.sources, &mine.targets, &mine.source_weights, &mine.target_weights};
  for (int k = 0; k < (weighted ? 4 : 2); ++k)
    if (!gather(comm, *own_lists[k], lists[k], starts[k])) return false;
  std::vector<Edge> edges;
  for (int v = 0; v < n; ++v)
    for (int i = starts[1][v]; i < starts[1][v + 1]; ++i) edges.push_back({v, lists[1][i], weighted ? lists[3][i] : 1});
  const std::vector<int> player = assign(edges, places);
  int vertex = rank;
  bool same = true;
  for (int v = 0; v < n; ++v) {
    same = same && player[v] == v;
    if (player[v] == rank) vertex = v;
  }
  if (same || own.Comm_split(comm, 0, vertex, ordered) != MPI_SUCCESS) return false;
  const auto part = [&](int k) {
    std::vector<int> values(lists[k].begin() + starts[k][vertex], lists[k].begin() + starts[k][vertex + 1]);
    values.reserve(1);  // an address also for a vertex without neighbours
    return values;
  };
  mine.sources = part(0);
  mine.targets = part(1);
  if (weighted) mine.source_weights = part(2), mine.target_weights = part(3);
  return true;
}

}  // namespace undertow
