// The handlers of MPI_Init and MPI_Finalize; see state.cc.
#pragma once

#include "glue.hh"

namespace undertow {

int started(int rc);  // after a successful MPI_Init
void stopping();      // before MPI_Finalize

template <class F>
int on_init(F next, Site, void* argc, void* argv) {
  return started(next(static_cast<int*>(argc), static_cast<char***>(argv)));
}

template <class F>
int on_init_thread(F next, Site, void* argc, void* argv, int required, int* provided) {
  return started(next(static_cast<int*>(argc), static_cast<char***>(argv), required, provided));
}

template <class F>
int on_finalize(F next, Site) {
  stopping();
  return next();
}

}  // namespace undertow
