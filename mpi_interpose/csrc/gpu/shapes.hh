// Arguments of the kernels that are compiled for a number of loops: no more than they read, in numbers of 32 bits.
//
// A small launch is bound by the way from its arguments to its first load. A Piece serves every type, so its kernel asks
// for each loop in turn; here the loops are unrolled, and a step is a multiplication of 32-bit numbers. What does not fit
// (more loops, steps of 2 GiB, tables) stays with the general kernel. `choose.hh` says which kernel a piece gets. Like
// pieces.hh, this is compiled for the device and for the host, where tests run it without a GPU.
#pragma once

#include "pieces.hh"

namespace undertow::gpu {

constexpr int kNestDims = 3;

struct Level {
  uint32_t n, magic, shift;
  int32_t user;  // byte step
};

// A nest: blocks of `block` words, repeated by D loops, the innermost first; dense on the packed side.
template <int D>
struct Loops {
  uint64_t user, packed;
  uint32_t words, packing;
  uint32_t block, magic, shift, spare;
  Level level[D];
};

UNDERTOW_HD int64_t product(uint32_t k, int32_t step) {
  return static_cast<int64_t>(static_cast<int32_t>(k)) * step;  // k < 2^30
}

// The byte offset of word `t` on the user's side; on the packed side it is t words.
template <int D>
UNDERTOW_HD int64_t spot(const Loops<D>& s, uint32_t t, int log) {
  uint32_t q = s.block > 1 ? divide(t, s.magic, s.shift) : t;
  int64_t user = static_cast<int64_t>(t - q * s.block) << log;
  UNDERTOW_UNROLL
  for (int d = 0; d < D; ++d) {
    const Level& level = s.level[d];
    const uint32_t up = d + 1 < D ? divide(q, level.magic, level.shift) : 0;
    user += product(q - up * level.n, level.user);
    q = up;
  }
  return user;
}

// Words per thread of a kernel whose packed side is a stream: 16 bytes.
UNDERTOW_HD constexpr uint32_t stream_words(int log) { return 16u >> log; }

// Two loops that cross memory order, and perhaps one around them: `o` has the small step on the user's side, `i` on the
// packed side, whose step is a word.
struct Crossing {
  uint64_t user, packed;
  uint32_t packing, outer_n;
  uint32_t o_n, i_n;
  int32_t o_user, i_user, o_packed, i_packed;
  uint32_t across, across_magic, across_shift;  // tiles along i
  uint32_t down, down_magic, down_shift;        // tiles along o
  int64_t outer_user, outer_packed;
};

struct Corner {
  int64_t user, packed;   // of the tile's first word
  uint32_t o_left, i_left;  // words from there to the end of either loop
};

UNDERTOW_HD Corner corner(const Crossing& c, uint32_t tile, uint32_t side) {
  uint32_t q = c.across > 1 ? divide(tile, c.across_magic, c.across_shift) : tile;
  const uint32_t i0 = (tile - q * c.across) * side;
  const uint32_t rest = c.down > 1 ? divide(q, c.down_magic, c.down_shift) : q;
  const uint32_t o0 = (q - rest * c.down) * side;
  return {rest * c.outer_user + product(o0, c.o_user) + product(i0, c.i_user),
          rest * c.outer_packed + product(o0, c.o_packed) + product(i0, c.i_packed), c.o_n - o0, c.i_n - i0};
}

}  // namespace undertow::gpu
