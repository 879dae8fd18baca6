// The copy kernels: one loop over equal blocks, and one gather and one scatter over a table of blocks.
//
// A strided copy has a step on both sides, so pack and unpack are the same code with the roles exchanged, and an array
// of structs can be packed field by field. Kernels exist per block length (1 to 64 bytes unrolled at compile time, and
// one for longer blocks) and per instruction set; `kernels()` picks the set by cpuid once. `UNDERTOW_MPI_ISA`
// (generic, avx2, avx512) lowers the choice, which the tests use.
#pragma once

#include <cstdint>

namespace undertow {

constexpr int64_t kMaxFixed = 64;

// n blocks of `len` bytes: block i goes from s + i*ss to d + i*ds. Blocks do not overlap in d.
using StridedFn = void (*)(char* d, const char* s, int64_t n, int64_t ds, int64_t ss, int64_t len);
// n blocks of `len` bytes from s + offs[i] to d + i*len (gather), or from s + i*len to d + offs[i] (scatter).
using TableFn = void (*)(char* d, const char* s, const int32_t* offs, int64_t n, int64_t len);
// n blocks of lens[i] bytes, dense in the packed stream.
using MixedFn = void (*)(char* d, const char* s, const int32_t* offs, const int32_t* lens, int64_t n);
// rows x cols blocks; the source steps `srow`, `scol`, the target `drow`, `dcol`. Tiled when memory order is crossed.
using TransposeFn = void (*)(char* d, const char* s, int64_t rows, int64_t cols, int64_t srow, int64_t scol,
                             int64_t drow, int64_t dcol, int64_t len);

struct Kernels {
  const char* name;
  StridedFn strided[kMaxFixed + 1];  // by block length; [0] is the one for longer blocks
  StridedFn dense[kMaxFixed + 1];    // the same when ds == len: stores may run into the next block's place
  TableFn gather[kMaxFixed + 1];
  TableFn scatter[kMaxFixed + 1];
  MixedFn gather_mixed, scatter_mixed;
  TransposeFn transpose;
};

const Kernels& kernels();
extern const Kernels kKernelsGeneric, kKernelsAvx2, kKernelsAvx512;

}  // namespace undertow
