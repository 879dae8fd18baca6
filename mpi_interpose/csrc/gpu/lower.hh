// From a plan to pieces: one per copy operation, with the element count as one more loop. Pure, no device is touched.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "choose.hh"
#include "plan.hh"

namespace undertow::gpu {

// A table of blocks as the device sees it. `grain` is the largest power of two that divides every offset and length.
struct Table {
  uint64_t offs = 0, starts = 0, hints = 0;
  uint32_t runs = 0;
  int64_t bytes = 0;   // of one pass
  int64_t grain = 16;
};

// Every block of one element of a type, in packed order; for types that have too many parts for pieces of their own.
struct Blocks {
  std::vector<int64_t> offs, lens;
  int64_t grain = 16;
};
Blocks blocks_of(const Node& ir);
// First word of each block, and the block of each 64th word (one more entry at the end).
void number_words(const Blocks& blocks, int64_t word, std::vector<uint32_t>& starts, std::vector<uint32_t>& hints);

constexpr size_t kMaxPieces = 64;      // more copy operations than this become one table
constexpr int64_t kMaxBlocks = 1 << 24;

struct Tables {
  std::function<Table(size_t op)> of_op;                  // a constant-length table
  std::function<Table(const Blocks&, int64_t word)> whole;  // a table of all blocks, in words of `word` bytes
};

// The pieces of `count` elements between `user` and `packed` (addresses). Throws Unsupported beyond kMaxBlocks.
std::vector<Piece> lower(const Plan& plan, int64_t count, uint64_t user, uint64_t packed, const Tables& tables);

// For measurements: the kernel for a launch of one piece, where it serves; else what `choose` says.
extern std::optional<Choice> forced_kernel;

uint8_t words_per_thread(const Piece& piece);

// A plan without gaps: one plain copy of count * size bytes at `off`.
bool contiguous(const Plan& plan, int64_t count, int64_t* off);

}  // namespace undertow::gpu
