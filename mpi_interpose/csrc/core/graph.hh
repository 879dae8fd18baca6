// Who takes which place in a graph of processes: ranks that exchange much are put near each other.
//
// Places are nested: hosts, the sockets of a host, the memory nodes of a socket. What a unit of weight costs depends on the
// innermost place that its two ends share. Pure arithmetic on integers that every rank holds alike, so that all come to
// the same answer without another message.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace undertow {

struct Edge {
  int from, to;
  int64_t weight;
};

// Where processes are. `level[k][p]` names the place of process p on level k, the outermost first; processes in one place
// of a level are in one place of all levels before it. `cost[k]` is what a unit of weight costs between two that share
// the places of k levels and no more: one entry more than levels, not growing.
struct Places {
  std::vector<std::vector<int>> level;
  std::vector<int64_t> cost;

  int processes() const { return level.empty() ? 0 : static_cast<int>(level[0].size()); }
  int64_t between(int p, int q) const {
    size_t k = 0;
    while (k < level.size() && level[k][p] == level[k][q]) ++k;
    return cost[k];
  }
};

// The cost of all edges where vertex v is played by process `player[v]`.
int64_t total_cost(const std::vector<Edge>& edges, const Places& places, const std::vector<int>& player);

// The process (rank in the old communicator) that plays each vertex: grown greedily place by place from the outermost level
// inwards, then improved by exchanging pairs while that helps. The identity unless another one costs strictly less.
std::vector<int> assign(const std::vector<Edge>& edges, const Places& places);

}  // namespace undertow
