// Where this rank runs: its host, its socket and its memory node, as far as it is bound to one.
//
// A rank that may run on several sockets has none of its own; all such ranks of a host count as one place.
#pragma once

#include <cstdint>

namespace undertow {

struct Place {
  uint64_t host = 0;
  int64_t package = -1, node = -1;  // -1: this rank may run on several
};

Place here();             // by UNDERTOW_MPI_PLACE ("host", "host/socket" or "host/socket/node", any words), else by the system
bool one_socket_here();   // this host has one
uint64_t host_number();   // of here()

// Mean distances between memory nodes of this host, as the system gives them (10: within one): of one socket and of
// different ones. 0 where there is no such pair.
struct NodeDistances {
  int64_t same_socket = 0, other_socket = 0;
};
NodeDistances node_distances();

}  // namespace undertow
