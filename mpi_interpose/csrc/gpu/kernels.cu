// The copy kernel: pieces in, words moved. One source for pack and unpack, which differ in the side that is read.
//
// A tile belongs to one piece and is a run of consecutive packed words; each thread first computes all its places, then
// loads, then stores, so that several loads are in flight. A launch of one piece has a kernel for its word size, short
// arguments and a block for each tile; one of several pieces has a persistent grid that walks over the tiles of all.
// Types whose loops cross memory order (a transpose) go through a tile in shared memory, so that both sides are read and
// written along rows.
// `python -m undertow.mpi_interpose.gpu_kernels` compiles this file to kernels.ptx, which is what is shipped.
#include "pieces.hh"

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
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const uint32_t r = row + s * kRows;
    if (packing) {
      if (o0 + lane < o.n && i0 + r < i.n)
        square[r][lane] = *reinterpret_cast<const Word*>(u + lane * o.user + static_cast<int64_t>(r) * i.user);
    } else {
      if (i0 + lane < i.n && o0 + r < o.n)
        square[r][lane] = *reinterpret_cast<const Word*>(k + lane * i.packed + static_cast<int64_t>(r) * o.packed);
    }
  }
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
