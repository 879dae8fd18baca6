// What every file that speaks MPI shares: mpi.h made safe to preload, the library's functions, and the constants.
//
// Open MPI's predefined handles are addresses of variables in libmpi. A preloaded library must not refer to them (under
// Python libmpi is not in a scope where the loader would find them), so the macro behind them is replaced by a lookup.
// Everything else comes from the user's own mpi.h, through tables generated for that MPI.
#pragma once

#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>

#include <cstddef>
#include <cstdint>

#include "resolve.hh"

#if defined(OPEN_MPI) && !defined(UNDERTOW_ABI)
#undef OMPI_PREDEFINED_GLOBAL
#define OMPI_PREDEFINED_GLOBAL(type, global) (reinterpret_cast<type>(::undertow::find_data(#global)))
#endif

namespace undertow {

#include "reals.inc"

// For what calls that pass read: reached by an offset, without asking the table of addresses that the loader fills.
#define UNDERTOW_HIDDEN __attribute__((visibility("hidden")))

extern Real real UNDERTOW_HIDDEN;
extern Own own;

struct Constants {
  MPI_Datatype byte, packed, type_null;
  MPI_Comm comm_null, self, world;
  MPI_Request request_null;
};
extern Constants constants;  // filled by MPI_Init

template <class Handle>
uintptr_t handle_key(Handle h) {
  if constexpr (sizeof(Handle) == sizeof(uintptr_t))
    return reinterpret_cast<uintptr_t>((void*)h);
  else
    return static_cast<uintptr_t>(static_cast<uint32_t>((intptr_t)h));
}

enum class Mode : int { Auto, Force, Check, Off };
extern Mode mode;
extern "C" const char* const undertow_symbol_names[];

void say(const char* format, ...) __attribute__((format(printf, 1, 2)));  // one line on stderr, with the rank

}  // namespace undertow
