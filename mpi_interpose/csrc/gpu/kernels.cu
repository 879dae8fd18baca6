// The copy kernel: pieces in, words moved. One source for pack and unpack, which differ in the side that is read.
//
// A tile belongs to one piece and is a run of consecutive packed words; each thread first computes all its places, then
// loads, then stores, so that several loads are in flight. A launch of one piece has a kernel for its word size, short
// arguments and a block for each tile; one of several pieces has a persistent grid that walks over the tiles of all.
// Types whose loops cross memory order (a transpose) go through a tile in shared memory, so that both sides are read and
// written along rows.
// `python -m undertow.mpi_interpose.gpu_kernels` compiles this file to kernels.ptx, which is what is shipped.
#include "shapes.hh"

using namespace undertow::gpu;

namespace undertow::gpu::words {  // no anonymous namespace: its names would hold the path of this file

// Whether words pass the caches as streams (evicted first). Off where a source's neighbours are read again soon.
constexpr bool kStream = false;

template <class Word>
__device__ __forceinline__ Word load(const Word* p) {
  if constexpr (kStream) return __ldcs(p);
  else return *p;
}
template <class Word>
__device__ __forceinline__ void store(Word* p, Word v) {
  if constexpr (kStream) __stcs(p, v);
  else *p = v;
}

template <int Log> struct WordOf;
template <> struct WordOf<0> { using type = uint8_t; };
template <> struct WordOf<1> { using type = uint16_t; };
template <> struct WordOf<2> { using type = uint32_t; };
template <> struct WordOf<3> { using type = uint2; };
template <> struct WordOf<4> { using type = uint4; };

template <int Log, int U>
__device__ __forceinline__ void copy_tile(const Piece& p, uint32_t tile, bool packing) {
  using Word = typename WordOf<Log>::type;
  const uint32_t first = tile * (kThreads * U) + threadIdx.x;
  int64_t user[U];
  places<U>(p, first, kThreads, user);
  Word v[U];
  char* const u = reinterpret_cast<char*>(p.user);
  Word* const k = reinterpret_cast<Word*>(p.packed) + first;
#pragma unroll
  for (int i = 0; i < U; ++i)
    if (first + i * kThreads < p.words)
      v[i] = load(packing ? reinterpret_cast<const Word*>(u + user[i]) : k + i * kThreads);
#pragma unroll
  for (int i = 0; i < U; ++i)
    if (first + i * kThreads < p.words) {
      store(packing ? k + i * kThreads : reinterpret_cast<Word*>(u + user[i]), v[i]);
    }
}

// Everything else, and small pieces: one word per thread.
template <int Log>
__device__ __forceinline__ void copy_word(const Piece& p, uint32_t tile, bool packing) {
  using Word = typename WordOf<Log>::type;
  const uint32_t t = tile * kThreads + threadIdx.x;
  if (t >= p.words) return;
  int64_t user, packed;
  place(p, t, user, packed);
  Word* u = reinterpret_cast<Word*>(p.user + user);
  Word* k = reinterpret_cast<Word*>(p.packed + packed);
  if (packing) *k = *u;
  else *u = *k;
}

// The two innermost loops cross: `o` has the small step on the user's side, `i` on the packed side.
template <int Log>
__device__ __forceinline__ void cross_tile(const Piece& p, uint32_t tile, bool packing, void* shared) {
  using Word = typename WordOf<Log>::type;
  Word(*square)[kTile + 1] = reinterpret_cast<Word(*)[kTile + 1]>(shared);
  const PieceDim &o = p.dims[p.ndims - 2], &i = p.dims[p.ndims - 1];
  const uint32_t across = (i.n + kTile - 1) / kTile, down = (o.n + kTile - 1) / kTile;
  uint32_t q = tile / across;
  const uint32_t i0 = (tile - q * across) * kTile;
  uint32_t rest = q / down;
  const uint32_t o0 = (q - rest * down) * kTile;
  int64_t user = 0, packed = 0;
#pragma unroll 1
  for (int d = p.ndims - 3; d >= 0; --d) {
    const uint32_t up = d > 0 ? rest / p.dims[d].n : 0;
    const uint32_t k = rest - up * p.dims[d].n;
    rest = up;
    user += k * p.dims[d].user;
    packed += k * p.dims[d].packed;
  }
  char* u = reinterpret_cast<char*>(p.user) + user + static_cast<int64_t>(o0) * o.user + static_cast<int64_t>(i0) * i.user;
  char* k = reinterpret_cast<char*>(p.packed) + packed + static_cast<int64_t>(o0) * o.packed + static_cast<int64_t>(i0) * i.packed;
  const uint32_t lane = threadIdx.x % kTile, row = threadIdx.x / kTile;
  constexpr int kRows = kThreads / kTile, kSteps = kTile / kRows;
  // Along the user's side lanes follow o, along the packed side they follow i.
  Word v[kSteps];  // all loads are on their way before the first is laid down
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const uint32_t r = row + s * kRows;
    if (packing) {
      if (o0 + lane < o.n && i0 + r < i.n)
        v[s] = *reinterpret_cast<const Word*>(u + lane * o.user + static_cast<int64_t>(r) * i.user);
    } else {
      if (i0 + lane < i.n && o0 + r < o.n)
        v[s] = *reinterpret_cast<const Word*>(k + lane * i.packed + static_cast<int64_t>(r) * o.packed);
    }
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) square[row + s * kRows][lane] = v[s];
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const uint32_t r = row + s * kRows;
    if (packing) {
      if (i0 + lane < i.n && o0 + r < o.n)
        *reinterpret_cast<Word*>(k + lane * i.packed + static_cast<int64_t>(r) * o.packed) = square[lane][r];
    } else {
      if (o0 + lane < o.n && i0 + r < i.n)
        *reinterpret_cast<Word*>(u + lane * o.user + static_cast<int64_t>(r) * i.user) = square[lane][r];
    }
  }
  __syncthreads();
}

template <int Log>
__device__ __forceinline__ void either(const Piece& p, uint32_t tile, bool packing) {
  if (p.unroll == 1) copy_word<Log>(p, tile, packing);
  else copy_tile<Log, kUnroll>(p, tile, packing);
}

__device__ __forceinline__ void walk(const Batch& batch) {
  __shared__ __align__(16) char square[kTile * (kTile + 1) * 16];
  const bool packing = batch.packing;
  int piece = 0;
  for (uint32_t tile = blockIdx.x; tile < batch.tiles; tile += gridDim.x) {
    while (piece + 1 < static_cast<int>(batch.n) && tile >= batch.pieces[piece + 1].tile) ++piece;
    const Piece& p = batch.pieces[piece];
    const uint32_t own = tile - p.tile;
    if (p.kind == kCrossed) {
      if (p.word_log2 == 0) cross_tile<0>(p, own, packing, square);
      else if (p.word_log2 == 1) cross_tile<1>(p, own, packing, square);
      else if (p.word_log2 == 2) cross_tile<2>(p, own, packing, square);
      else if (p.word_log2 == 3) cross_tile<3>(p, own, packing, square);
      else cross_tile<4>(p, own, packing, square);
      continue;
    }
    switch (p.word_log2) {
      case 0: either<0>(p, own, packing); break;
      case 1: either<1>(p, own, packing); break;
      case 2: either<2>(p, own, packing); break;
      case 3: either<3>(p, own, packing); break;
      default: either<4>(p, own, packing); break;
    }
  }
}

// ---- a number of loops that is known when this is compiled ----------------------------------------------------------

enum Hint { kPlain, kPackedStreams };

template <Hint kHint, class Word>
__device__ __forceinline__ void put(Word* to, Word v) {
  if constexpr (kHint == kPackedStreams) __stcs(to, v);
  else *to = v;
}

// U words per thread, a block's threads apart.
template <int Log, int D, int U, Hint kHint>
__device__ __forceinline__ void nest(const Loops<D>& s) {
  using Word = typename WordOf<Log>::type;
  const uint32_t first = blockIdx.x * (blockDim.x * U) + threadIdx.x;
  char* user[U];
  Word v[U];
#pragma unroll
  for (int i = 0; i < U; ++i) user[i] = reinterpret_cast<char*>(s.user) + spot(s, first + i * blockDim.x, Log);
  Word* const packed = reinterpret_cast<Word*>(s.packed) + first;
  if (s.packing) {
#pragma unroll
    for (int i = 0; i < U; ++i)
      if (first + i * blockDim.x < s.words) v[i] = *reinterpret_cast<const Word*>(user[i]);
#pragma unroll
    for (int i = 0; i < U; ++i)
      if (first + i * blockDim.x < s.words) put<kHint>(packed + i * blockDim.x, v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < U; ++i)
      if (first + i * blockDim.x < s.words) {
        if constexpr (kHint == kPackedStreams) v[i] = __ldcs(packed + i * blockDim.x);
        else v[i] = packed[i * blockDim.x];
      }
#pragma unroll
    for (int i = 0; i < U; ++i)
      if (first + i * blockDim.x < s.words) *reinterpret_cast<Word*>(user[i]) = v[i];
  }
}

// Packs of words of 1 or 2 bytes: as many as fill one store of 16 bytes.
template <int Log, int D>
__device__ __forceinline__ void pour(const Loops<D>& s) {
  using Word = typename WordOf<Log>::type;
  constexpr int kPer = stream_words(Log);
  const uint32_t at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= s.words / kPer) return;
  union {
    uint4 all;
    Word each[kPer];
  } v;
#pragma unroll
  for (int i = 0; i < kPer; ++i)
    v.each[i] = *reinterpret_cast<const Word*>(reinterpret_cast<const char*>(s.user) + spot(s, at * kPer + i, Log));
  __stcs(reinterpret_cast<uint4*>(s.packed) + at, v.all);
}

// A tile of T x T words, a block's 256 threads; a thread's loads are all on their way before the first is laid down.
template <int Log, int T>
__device__ __forceinline__ void cross(const Crossing& c) {
  using Word = typename WordOf<Log>::type;
  __shared__ Word square[T][T + 1];
  constexpr int kRows = kThreads / T, kSteps = T / kRows;
  const Corner at = corner(c, blockIdx.x, T);
  char* const user = reinterpret_cast<char*>(c.user) + at.user;
  char* const packed = reinterpret_cast<char*>(c.packed) + at.packed;
  const uint32_t lane = threadIdx.x % T, row = threadIdx.x / T;
  // Along the user's side lanes follow o, along the packed side they follow i.
  const bool near_o = lane < at.o_left, near_i = lane < at.i_left;
  char* const user_lane = user + product(lane, c.o_user);
  char* const packed_lane = packed + (static_cast<int64_t>(lane) << Log);
  Word v[kSteps];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const uint32_t r = row + s * kRows;
    if (c.packing) {
      if (near_o && r < at.i_left) v[s] = *reinterpret_cast<const Word*>(user_lane + product(r, c.i_user));
    } else {
      if (near_i && r < at.o_left) v[s] = *reinterpret_cast<const Word*>(packed_lane + product(r, c.o_packed));
    }
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) square[row + s * kRows][lane] = v[s];
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const uint32_t r = row + s * kRows;
    if (c.packing) {
      if (near_i && r < at.o_left) *reinterpret_cast<Word*>(packed_lane + product(r, c.o_packed)) = square[lane][r];
    } else {
      if (near_o && r < at.i_left) *reinterpret_cast<Word*>(user_lane + product(r, c.i_user)) = square[lane][r];
    }
  }
}

}  // namespace undertow::gpu::words

// One piece that is no transpose, a block for each of its tiles. Named by log2 of the word and the words per thread.
#define UNDERTOW_ONE(LOG)                                                                                            \
  extern "C" __global__ void __launch_bounds__(kThreads) undertow_one_##LOG##_1(const __grid_constant__ One one) {   \
    words::copy_word<LOG>(one.piece, blockIdx.x, one.packing);                                                       \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(kThreads) undertow_one_##LOG##_4(const __grid_constant__ One one) {   \
    words::copy_tile<LOG, kUnroll>(one.piece, blockIdx.x, one.packing);                                              \
  }
UNDERTOW_ONE(0)
UNDERTOW_ONE(1)
UNDERTOW_ONE(2)
UNDERTOW_ONE(3)
UNDERTOW_ONE(4)
static_assert(kUnroll == 4, "the names above end with it");

extern "C" __global__ void __launch_bounds__(kThreads, 4) undertow_copy(const __grid_constant__ Batch batch) {
  words::walk(batch);
}

// Named by the log2 of the word, the loops, and the words per thread or the side of a tile; see choose.cc.
#define UNDERTOW_KERNEL(NAME, ARGUMENTS, ...)                                                                        \
  extern "C" __global__ void __launch_bounds__(kThreads) undertow_##NAME(const __grid_constant__ ARGUMENTS a) {      \
    words::__VA_ARGS__(a);                                                                                           \
  }
#define UNDERTOW_NEST(LOG, D, U) UNDERTOW_KERNEL(nest_##LOG##_##D##_##U, Loops<D>, nest<LOG, D, U, words::kPlain>)
#define UNDERTOW_SINGLE(LOG, D) UNDERTOW_NEST(LOG, D, 1)
#define UNDERTOW_FOURFOLD(LOG, D) UNDERTOW_NEST(LOG, D, 4)
#define UNDERTOW_STREAM(LOG, D)                                                                                      \
  UNDERTOW_KERNEL(stream_##LOG##_##D, Loops<D>, nest<LOG, D, stream_words(LOG), words::kPackedStreams>)
#define UNDERTOW_POUR(LOG, D) UNDERTOW_KERNEL(pour_##LOG##_##D, Loops<D>, pour<LOG, D>)
#define UNDERTOW_CROSS(LOG, T) UNDERTOW_KERNEL(cross_##LOG##_##T, Crossing, cross<LOG, T>)
#define UNDERTOW_EACH(WHAT, LOG) WHAT(LOG, 1) WHAT(LOG, 2) WHAT(LOG, 3)

UNDERTOW_EACH(UNDERTOW_SINGLE, 0)
UNDERTOW_EACH(UNDERTOW_SINGLE, 1)
UNDERTOW_EACH(UNDERTOW_SINGLE, 2)
UNDERTOW_EACH(UNDERTOW_SINGLE, 3)
UNDERTOW_EACH(UNDERTOW_SINGLE, 4)
UNDERTOW_EACH(UNDERTOW_FOURFOLD, 0)
UNDERTOW_EACH(UNDERTOW_FOURFOLD, 1)
UNDERTOW_EACH(UNDERTOW_STREAM, 2)
UNDERTOW_EACH(UNDERTOW_STREAM, 3)
UNDERTOW_EACH(UNDERTOW_STREAM, 4)
UNDERTOW_EACH(UNDERTOW_POUR, 0)
UNDERTOW_EACH(UNDERTOW_POUR, 1)
UNDERTOW_CROSS(0, 32)
UNDERTOW_CROSS(1, 32)
UNDERTOW_CROSS(2, 32)
UNDERTOW_CROSS(3, 32)
UNDERTOW_CROSS(4, 32)
UNDERTOW_CROSS(0, 64)
UNDERTOW_CROSS(1, 64)
UNDERTOW_CROSS(2, 64)
UNDERTOW_CROSS(4, 16)
static_assert(kNestDims == 3, "UNDERTOW_EACH goes to that");
