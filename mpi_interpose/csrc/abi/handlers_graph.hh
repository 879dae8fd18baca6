// MPI_Dist_graph_create_adjacent with reorder: the library may give processes other ranks so that neighbours are near.
//
// The graph is gathered, every rank computes the same assignment (graph.hh), a communicator with the new ranks is split
// off, and the library builds the graph on it without reordering. This needs messages among all ranks, so all of them
// must run under the preload: only `undertow mpi run` knows that and sets UNDERTOW_MPI_REORDER=1 (0 switches it off; to set
// it by hand promises the same). A place is a host, or what UNDERTOW_MPI_PLACE says on each rank (a number: a switch, a
// socket). If no assignment cuts less, the call goes to the library as it is.
#pragma once

#include "handlers_coll.hh"

namespace undertow {

// A constant in most MPIs, a variable of the library in MPICH.
inline int* unweighted() {
#if defined(MPI_UNWEIGHTED)
  return MPI_UNWEIGHTED;
#else
  static int** const variable = static_cast<int**>(find_data("MPI_UNWEIGHTED"));
  return variable ? *variable : nullptr;
#endif
}

// What a rank says of its own vertex, moved to the rank that plays the vertex.
struct Adjacency {
  std::vector<int> sources, source_weights, targets, target_weights;
};

// The rank order found for all ranks of `comm`: a communicator with the new ranks and the adjacency of the caller's new
// vertex. False: keep the old order. Collective; the same answer on every rank.
bool reorder_graph(MPI_Comm comm, Adjacency& mine, bool weighted, MPI_Comm* ordered);

template <class F>
int on_dist_graph_create_adjacent(F next, Site site, MPI_Comm comm, int in, int* sources, int* in_weights, int out,
                                  int* targets, int* out_weights, MPI_Info info, int reorder, MPI_Comm* graph) {
  sites[site].calls.fetch_add(1, std::memory_order_relaxed);
  const auto library = [&] {
    return next(comm, in, sources, in_weights, out, targets, out_weights, info, reorder, graph);
  };
  // Bad arguments are the library's to report. They are looked at on one rank only, so they must not decide whether
  // messages are sent: a rank with bad arguments takes part with an empty vertex.
  if (!reorder || !graph || !reorder_wanted() || !intra(comm)) return library();
  const bool weighted = in_weights != unweighted() && out_weights != unweighted();
  const auto list = [](int n, const int* values) {
    return n > 0 && values ? std::vector<int>(values, values + n) : std::vector<int>();
  };
  Adjacency mine{list(in, sources), weighted ? list(in, in_weights) : std::vector<int>(), list(out, targets),
                 weighted ? list(out, out_weights) : std::vector<int>()};
  MPI_Comm ordered;
  if (!reorder_graph(comm, mine, weighted, &ordered)) return library();
  const auto size = [](const std::vector<int>& v) { return static_cast<int>(v.size()); };
  const int rc = next(ordered, size(mine.sources), mine.sources.data(),
                      weighted ? mine.source_weights.data() : unweighted(), size(mine.targets), mine.targets.data(),
                      weighted ? mine.target_weights.data() : unweighted(), info, 0, graph);
  own.Comm_free(&ordered);
  if (rc == MPI_SUCCESS) sites[site].taken.fetch_add(1, std::memory_order_relaxed);
  return rc;
}

}  // namespace undertow
