// What the device copies: descriptors, and the arithmetic from a word's number to its place on both sides.
//
// A Piece is one copy between the user's (strided) side and the packed side, cut into equal words of 1 to 16 bytes.
// Words are numbered in packed order, so consecutive threads touch consecutive packed bytes whatever the block length
// is; a word's place follows from its number by one division per loop. This header is compiled for the device and for
// the host: the tests run the same arithmetic without a GPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define UNDERTOW_HD __host__ __device__ __forceinline__
#define UNDERTOW_UNROLL _Pragma("unroll")
#define UNDERTOW_ROLLED _Pragma("unroll 1")
#else
#define UNDERTOW_HD inline
#define UNDERTOW_UNROLL
#define UNDERTOW_ROLLED
#endif

namespace undertow::gpu {

constexpr int kPieceDims = 5;
constexpr int kBatch = 16;         // pieces in one launch: their descriptors are kernel arguments
constexpr uint32_t kThreads = 256;
constexpr uint32_t kHintShift = 6;  // a hint for every 64 words of a table of mixed lengths
constexpr int kTile = 32;           // side of a transposed tile
constexpr uint32_t kMaxWords = 1u << 30;  // of one piece; division is exact below 2^31

constexpr int kUnroll = 4;          // words per thread and tile

enum PieceKind : uint8_t { kNest, kTable, kMixed, kCrossed };

struct PieceDim {
  uint32_t n, magic, shift, spare;
  int64_t user, packed;  // byte steps
};

struct Piece {
  uint64_t user, packed;  // addresses of word 0's block on either side
  uint64_t offs;          // kTable: int32_t byte offsets of dims[ndims-1]; kMixed: int64_t byte offsets
  uint64_t starts, hints; // kMixed: uint32_t first word of each run; uint32_t run of each 64th word
  uint32_t words;
  uint32_t tile;          // number of the first tile in the batch
  uint32_t block, block_magic, block_shift;  // words per block; kMixed: words of the whole table
  uint32_t runs;          // kMixed
  uint8_t word_log2, ndims, dense, kind;  // dense: the packed side has no gaps
  uint8_t unroll, spare[3];               // words per thread and tile
  PieceDim dims[kPieceDims];              // outermost first
};

struct Batch {
  uint32_t n, tiles, packing, spare;
  Piece pieces[kBatch];
};
// A launch of one piece. Short, because a launch waits for its arguments to arrive.
struct One {
  Piece piece;
  uint32_t packing, spare;
};
static_assert(sizeof(Batch) <= 4096, "kernel arguments are limited to 4 KiB on older drivers");

// n / d for n < 2^31, d >= 2, from numbers made by `divisor`.
UNDERTOW_HD uint32_t divide(uint32_t n, uint32_t magic, uint32_t shift) {
#if defined(__CUDA_ARCH__)
  return __umulhi(n, magic) >> shift;
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(n) * magic) >> 32) >> shift;
#endif
}

inline void divisor(uint32_t d, uint32_t& magic, uint32_t& shift) {
  uint32_t log = 0;
  while ((1ull << log) < d) ++log;
  magic = d < 2 ? 0 : static_cast<uint32_t>((1ull << (31 + log)) / d + 1);
  shift = d < 2 ? 0 : log - 1;
}

UNDERTOW_HD uint32_t run_of(const Piece& p, uint32_t word) {
  const uint32_t* starts = reinterpret_cast<const uint32_t*>(p.starts);
  const uint32_t* hints = reinterpret_cast<const uint32_t*>(p.hints);
  uint32_t low = hints[word >> kHintShift], high = hints[(word >> kHintShift) + 1] + 1;
  if (high > p.runs) high = p.runs;
  UNDERTOW_ROLLED
  while (high - low > 1) {  // the last run that starts at or before `word`
    const uint32_t middle = (low + high) / 2;
    if (starts[middle] <= word) low = middle; else high = middle;
  }
  return low;
}

// The general form: byte offsets of word `t` on the user's and on the packed side.
UNDERTOW_HD void place(const Piece& p, uint32_t t, int64_t& user, int64_t& packed) {
  const int log = p.word_log2;
  uint32_t q = p.block > 1 ? divide(t, p.block_magic, p.block_shift) : t;
  const uint32_t w = t - q * p.block;
  user = static_cast<int64_t>(w) << log;
  packed = static_cast<int64_t>(p.dense ? t : w) << log;
  if (p.kind == kMixed) {
    const uint32_t r = run_of(p, w);
    user = reinterpret_cast<const int64_t*>(p.offs)[r] +
           (static_cast<int64_t>(w - reinterpret_cast<const uint32_t*>(p.starts)[r]) << log);
  }
  UNDERTOW_ROLLED
  for (int d = p.ndims - 1; d >= 0; --d) {
    const PieceDim& dim = p.dims[d];
    const uint32_t up = d > 0 ? divide(q, dim.magic, dim.shift) : 0;
    const uint32_t k = q - up * dim.n;
    q = up;
    const bool table = p.kind == kTable && d == p.ndims - 1;
    user += table ? reinterpret_cast<const int32_t*>(p.offs)[k] : static_cast<int64_t>(k) * dim.user;
    if (!p.dense) packed += static_cast<int64_t>(k) * dim.packed;
  }
}

// The common form, dense on the packed side and without mixed lengths: U words at once, user's offsets only.
template <int U>
UNDERTOW_HD void places(const Piece& p, uint32_t first, uint32_t step, int64_t* user) {
  uint32_t q[U];
  UNDERTOW_UNROLL
  for (int i = 0; i < U; ++i) {
    const uint32_t t = first + static_cast<uint32_t>(i) * step;
    q[i] = p.block > 1 ? divide(t, p.block_magic, p.block_shift) : t;
    user[i] = static_cast<int64_t>(t - q[i] * p.block) << p.word_log2;
  }
  int d = p.ndims - 1;
  if (p.kind == kTable) {
    const PieceDim& dim = p.dims[d];
    UNDERTOW_UNROLL
    for (int i = 0; i < U; ++i) {
      const uint32_t up = d > 0 ? divide(q[i], dim.magic, dim.shift) : 0;
      user[i] += reinterpret_cast<const int32_t*>(p.offs)[q[i] - up * dim.n];
      q[i] = up;
    }
    --d;
  }
  UNDERTOW_ROLLED
  for (; d > 0; --d) {
    const PieceDim& dim = p.dims[d];
    UNDERTOW_UNROLL
    for (int i = 0; i < U; ++i) {
      const uint32_t up = divide(q[i], dim.magic, dim.shift);
      user[i] += static_cast<int64_t>(q[i] - up * dim.n) * dim.user;
      q[i] = up;
    }
  }
  if (d == 0) {
    UNDERTOW_UNROLL
    for (int i = 0; i < U; ++i) user[i] += static_cast<int64_t>(q[i]) * p.dims[0].user;
  }
}

}  // namespace undertow::gpu
