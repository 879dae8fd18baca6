// See graph.hh.
#include "graph.hh"

#include <algorithm>
#include <map>
#include <numeric>
#include <set>
#include <utility>

namespace undertow {

int64_t cut_weight(const std::vector<Edge>& edges, const std::vector<int>& place, const std::vector<int>& player) {
  int64_t cut = 0;
  for (const Edge& e : edges)
    if (place[player[e.from]] != place[player[e.to]]) cut += e.weight;
  return cut;
}

std::vector<int> assign(const std::vector<Edge>& edges, const std::vector<int>& place) {
  const int n = static_cast<int>(place.size());
  std::vector<int> identity(n);
  std::iota(identity.begin(), identity.end(), 0);
  std::map<int, std::vector<int>> rooms;  // place -> its processes, ascending
  for (int p = 0; p < n; ++p) rooms[place[p]].push_back(p);
  if (rooms.size() < 2 || static_cast<int>(rooms.size()) == n) return identity;

  std::vector<std::vector<std::pair<int, int64_t>>> touching(n);
  for (const Edge& e : edges) {
    if (e.from == e.to) continue;
    touching[e.from].push_back({e.to, e.weight});
    touching[e.to].push_back({e.from, e.weight});
  }
  std::vector<int> player(n, -1);
  for (const auto& [name, processes] : rooms) {
    std::vector<int64_t> pull(n, 0);                // weight between a free vertex and those already in this place
    std::set<std::pair<int64_t, int>> candidates;   // (-pull, vertex): the strongest first, then the lowest vertex
    std::vector<int> members;
    int next_free = 0;
    while (members.size() < processes.size()) {
      int v;
      if (candidates.empty()) {
        while (player[next_free] >= 0) ++next_free;
        v = next_free;
      } else {
        v = candidates.begin()->second;
        candidates.erase(candidates.begin());
      }
      player[v] = n;  // taken; by whom follows below
      members.push_back(v);
      for (const auto& [u, weight] : touching[v]) {
        if (player[u] >= 0) continue;
        candidates.erase({-pull[u], u});
        pull[u] += weight;
        candidates.insert({-pull[u], u});
      }
    }
    std::sort(members.begin(), members.end());
    for (size_t k = 0; k < members.size(); ++k) player[members[k]] = processes[k];
  }
  return cut_weight(edges, place, player) < cut_weight(edges, place, identity) ? player : identity;
}

}  // namespace undertow
