// Where a peer is: on the same socket, on the same host, or on another one; the model has rows for each.
//
// A launcher's variables tell that all ranks are on one host, and the system that it has one socket: then nothing is
// asked. Otherwise the ranks tell each other, once after MPI_Init, and only where all of them are known to have the
// preload (UNDERTOW_MPI_REORDER=1, which `undertow mpi run` sets): a rank that stays away is waited for 30 s and no
// more. What is not known counts as every kind at once, and a message then needs a gain for all of them.
#pragma once

#include "glue.hh"
#include "place.hh"

namespace undertow {

enum Link : int { kSocket, kHost, kRemote, kLinks };
using LinkSet = unsigned;  // one bit for each Link
constexpr LinkSet kNobody = 1u << kLinks;  // a process outside MPI_COMM_WORLD: nothing is known of it
const char* link_name(int link);           // socket, host, remote

// Whom a message goes to or comes from. Without a communicator: any rank of the world.
struct Peer {
  MPI_Comm comm;
  int rank;
  bool known = false, one = false;  // a communicator was named; one rank of it was
  Peer() = default;
  Peer(MPI_Comm c, int r) : comm(c), rank(r), known(true), one(r != MPI_ANY_SOURCE) {}
};

bool reorder_wanted();   // UNDERTOW_MPI_REORDER: all ranks have the preload, and may talk to each other

void peers_init();
void peers_finalize();
LinkSet links_of(const Peer& peer);

}  // namespace undertow
