// Who takes which place in a graph of processes: ranks that exchange much are put on one host.
//
// Pure arithmetic on lists that every rank holds alike, so that all come to the same answer without another message.
#pragma once

#include <cstdint>
#include <vector>

namespace undertow {

struct Edge {
  int from, to;
  int64_t weight;
};

// Weight of the edges whose ends are in different places; vertex v is played by process `player[v]`.
int64_t cut_weight(const std::vector<Edge>& edges, const std::vector<int>& place, const std::vector<int>& player);

// The process (rank in the old communicator) that plays each vertex. `place[p]` is where process p runs. The identity
// unless another assignment, grown greedily place by place, cuts strictly less weight.
std::vector<int> assign(const std::vector<Edge>& edges, const std::vector<int>& place);

}  // namespace undertow
