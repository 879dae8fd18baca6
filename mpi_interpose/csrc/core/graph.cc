// See graph.hh.
#include "graph.hh"

#include <algorithm>
#include <map>
#include <numeric>
#include <set>
#include <utility>

namespace undertow {

int64_t total_cost(const std::vector<Edge>& edges, const Places& places, const std::vector<int>& player) {
  int64_t sum = 0;
  for (const Edge& e : edges)
    if (e.from != e.to) sum += e.weight * places.between(player[e.from], player[e.to]);
  return sum;
}

namespace {

using Touching = std::vector<std::vector<std::pair<int, int64_t>>>;  // the neighbours of each vertex and the weights

constexpr int kMostExchanged = 256;  // processes; beyond that pairs are not tried, which takes their square
constexpr int kRounds = 8;

struct Grower {
  const Touching& touching;
  const Places& places;
  std::vector<int> player;  // -1: not placed yet
  std::vector<int> group;   // which set of vertices is being divided; others do not count

  Grower(const Touching& t, const Places& p)
      : touching(t), places(p), player(t.size(), -1), group(t.size(), 0) {}

  // Gives `vertices` to `processes` (as many, both ascending), which share the places of all levels before `level`.
  void divide(const std::vector<int>& vertices, const std::vector<int>& processes, size_t level) {
    if (level == places.level.size()) {
      for (size_t k = 0; k < vertices.size(); ++k) player[vertices[k]] = processes[k];
      return;
    }
    std::map<int, std::vector<int>> rooms;  // place -> its processes, ascending
    for (int p : processes) rooms[places.level[level][p]].push_back(p);
    if (rooms.size() == 1) return divide(vertices, processes, level + 1);
    const int mark = ++groups_;
    for (int v : vertices) group[v] = mark;
    std::vector<int64_t> pull(touching.size(), 0);  // weight between a free vertex and those already in this place
    size_t next_free = 0;
    for (const auto& [name, there] : rooms) {
      std::set<std::pair<int64_t, int>> candidates;  // (-pull, vertex): the strongest first, then the lowest vertex
      std::vector<int> members;
      for (int v : vertices) pull[v] = 0;
      while (members.size() < there.size()) {
        int v;
        if (candidates.empty()) {
          while (group[vertices[next_free]] != mark) ++next_free;
          v = vertices[next_free];
        } else {
          v = candidates.begin()->second;
          candidates.erase(candidates.begin());
        }
        group[v] = 0;  // taken
        members.push_back(v);
        for (const auto& [u, weight] : touching[v]) {
          if (group[u] != mark) continue;
          candidates.erase({-pull[u], u});
          pull[u] += weight;
          candidates.insert({-pull[u], u});
        }
      }
      std::sort(members.begin(), members.end());
      inner_.push_back({members, there});
    }
    // The inner levels mark groups of their own, so they follow when this level is done.
    std::vector<std::pair<std::vector<int>, std::vector<int>>> mine;
    mine.swap(inner_);
    for (const auto& [members, there] : mine) divide(members, there, level + 1);
  }

 private:
  int groups_ = 0;
  std::vector<std::pair<std::vector<int>, std::vector<int>>> inner_;
};

int64_t cost_of(const Touching& touching, const Places& places, const std::vector<int>& player, int v, int at, int other,
                int other_at) {
  int64_t sum = 0;
  for (const auto& [u, weight] : touching[v]) sum += weight * places.between(at, u == other ? other_at : player[u]);
  return sum;
}

// What the cost falls by when v and u change places.
int64_t gained(const Touching& touching, const Places& places, const std::vector<int>& player, int v, int u) {
  const int a = player[v], b = player[u];
  return cost_of(touching, places, player, v, a, u, b) + cost_of(touching, places, player, u, b, v, a) -
         cost_of(touching, places, player, v, b, u, a) - cost_of(touching, places, player, u, a, v, b);
}

void exchange(const Touching& touching, const Places& places, std::vector<int>& player) {
  const int n = static_cast<int>(player.size());
  if (n > kMostExchanged) return;
  bool better = true;
  for (int round = 0; round < kRounds && better; ++round) {
    better = false;
    for (int v = 0; v < n; ++v) {
      int best = -1;
      int64_t most = 0;
      for (int u = v + 1; u < n; ++u) {
        if (places.between(player[v], player[u]) == places.cost.back()) continue;
        const int64_t gain = gained(touching, places, player, v, u);
        if (gain > most) most = gain, best = u;
      }
      if (best >= 0) std::swap(player[v], player[best]), better = true;
    }
  }
}

}  // namespace

std::vector<int> assign(const std::vector<Edge>& edges, const Places& places) {
  const int n = places.processes();
  std::vector<int> identity(n);
  std::iota(identity.begin(), identity.end(), 0);
  if (n < 2 || places.cost.front() == places.cost.back()) return identity;
  Touching touching(n);
  for (const Edge& e : edges) {
    if (e.from == e.to) continue;
    touching[e.from].push_back({e.to, e.weight});
    touching[e.to].push_back({e.from, e.weight});
  }
  Grower grower(touching, places);
  grower.divide(identity, identity, 0);
  // The order that the program has is another beginning, often a good one.
  std::vector<int> grown = grower.player, kept = identity;
  exchange(touching, places, grown);
  exchange(touching, places, kept);
  const auto cost = [&](const std::vector<int>& player) { return total_cost(edges, places, player); };
  const std::vector<int>& best = cost(grown) < cost(kept) ? grown : kept;
  return cost(best) < cost(identity) ? best : identity;
}

}  // namespace undertow
