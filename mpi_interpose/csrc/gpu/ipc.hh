// MPI_Alltoallw and MPI_Neighbor_alltoallw between the device buffers of one host: the sender packs into a slab of its
// own in device memory, the receiver unpacks from there. UNDERTOW_MPI_IPC, which must stand alike on all ranks: 1, every
// block that fits; auto, which `undertow mpi run` sets because it starts all ranks alike, calls with a block of 256 KiB or
// more between cards that read each other fast; else off.
//
// Only for these calls, because all ranks of the communicator make them: a point-to-point receiver may ask with Probe and
// Get_count, wait for any source, cancel, or run without the preload, and must find the library's own message.
// Everything below is decided alike on all ranks, from what all of them know:
//  1. The first call on a communicator, and then the 2nd, 4th, 8th …, ask whether every rank has a device buffer in
//     this call, and (auto) whether any has a large one. As soon as so, each exports a slab, opens those of all others and reads a mark from each; only
//     if everyone succeeded is the communicator served, otherwise never again. With auto, each also reads a few MiB from
//     every other, which must not take longer than the two copies that pinned memory would.
//  2. Then every call begins with an exchange of offers by the library's own MPI_Alltoall (or MPI_Neighbor_alltoall,
//     which pairs repeated neighbours as the call does): the sender alone decides which blocks it has packed into its
//     slab. A receiver takes every offer, into device or host memory, so nothing has to be answered.
//  3. Blocks that are not offered (host memory, too large for the slab) go through the library as before, in a call
//     with the offered ones' counts set to zero on both sides.
//     A slab is as large as the call that it began with needs, a quarter of UNDERTOW_MPI_IPC_MB at least and that at
//     most. The offers of MPI_Alltoallw say what each rank needs, and all make larger slabs in the next call; with
//     neighbours, where a rank does not hear of all others, every eighth call asks.
//  4. A slab has two halves, used in turn. A half is packed again two calls later; by then each reader has sent its offers
//     of the call between, which it does after reading. That holds where everyone hears from all its readers
//     (MPI_Alltoallw, grids); other graphs, and a change between the two calls, take a barrier.
// All ranks must come through here: a rank whose calls we do not see (mpi_f08 on MPICH, w collectives of Open MPI's
// Fortran) would be waited for. So a preload by hand leaves it off, and auto does so where a Fortran library of MPI is in
// the process. Slabs live until the process ends.
#pragma once

#include <atomic>
#include <vector>

#include "glue.hh"

namespace undertow {

struct PeerBlock {
  char* at;
  int64_t count;
  MPI_Datatype type;
  bool moved = false;  // out: the block has been, or will be, carried without the library
};

enum class Ipc : int { kOff, kAll, kAuto };
extern std::atomic<Ipc> g_ipc;  // the switch
inline bool ipc_wanted() { return __builtin_expect(g_ipc.load(std::memory_order_relaxed) != Ipc::kOff, 0); }

// Whether this call, counted here, is to go through `ipc_exchange`; the same on all ranks. Cheap where nobody has a device.
bool ipc_due(MPI_Comm comm);
// Collective. Carries what it can; MPI_SUCCESS, or the error of a call of the library.
int ipc_exchange(MPI_Comm comm, bool neighbours, std::vector<PeerBlock>& sends, std::vector<PeerBlock>& receives);

}  // namespace undertow
