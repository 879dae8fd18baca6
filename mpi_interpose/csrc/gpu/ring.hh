// A large message between a strided device buffer and pinned host memory goes through two halves of device scratch in
// turn: while the copy engine moves one, the kernel packs (or unpacks) the other. So a message takes the time of its
// copy rather than of both, and no more scratch than the two halves, whatever its size.
//
// The message itself stays one message of the library's: what is sent must have the size that the program's datatype
// says, for matching, Probe, Get_count and peers without the preload. So chunks end at the pinned slab.
//
// This file cuts a message's pieces into chunks; it is pure. Context::relay queues them.
#pragma once

#include <cstdint>
#include <vector>

#include "pieces.hh"

namespace undertow::gpu {

struct Chunk {
  int64_t from, bytes;        // which part of the packed side
  std::vector<Piece> pieces;  // as if that part began at `base`
};

// `pieces` together cover `bytes` packed bytes at the address `base`, each byte once; no chunk is larger than `most`, a
// multiple of 16. Empty when they cannot be cut so: a table of mixed lengths that is larger, or gaps in the packed side
// without a common outermost loop.
std::vector<Chunk> chunks_of(const std::vector<Piece>& pieces, uint64_t base, int64_t bytes, int64_t most);

}  // namespace undertow::gpu
