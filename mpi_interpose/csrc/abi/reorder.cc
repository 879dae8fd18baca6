// See handlers_graph.hh.
#include <cstdlib>
#include <cstring>

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

  uint64_t host = host_number();
  std::vector<uint64_t> hosts(n);
  if (own.Allgather(&host, sizeof host, MPI_BYTE, hosts.data(), sizeof host, MPI_BYTE, comm) != MPI_SUCCESS)
    return false;
  std::vector<int> place(n);  // the first rank on the same host names it
  for (int p = 0; p < n; ++p)
    for (place[p] = 0; hosts[place[p]] != hosts[p];) ++place[p];

  std::vector<int> lists[4], starts[4];
  const std::vector<int>* own_lists[4] = {&mine.sources, &mine.targets, &mine.source_weights, &mine.target_weights};
  for (int k = 0; k < (weighted ? 4 : 2); ++k)
    if (!gather(comm, *own_lists[k], lists[k], starts[k])) return false;
  std::vector<Edge> edges;
  for (int v = 0; v < n; ++v)
    for (int i = starts[1][v]; i < starts[1][v + 1]; ++i) edges.push_back({v, lists[1][i], weighted ? lists[3][i] : 1});
  const std::vector<int> player = assign(edges, place);
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
