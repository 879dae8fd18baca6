// Device memory of our own that other processes of this host may read: made and exported by one rank, opened by others.
//
// User memory is never exported: a handle covers the whole allocation around an address, and pools that map memory
// themselves (torch's expandable segments, cupy's cuMemCreate) cannot be exported at all.
#pragma once

#include "context.hh"
#include "driver.hh"

namespace undertow::gpu {

// A slab in the context of the device memory `like`, with `mark` in its first eight bytes. False: no memory, no IPC.
struct Slab {
  Context* context = nullptr;
  char* at = nullptr;
  int64_t bytes = 0;
  IpcHandle handle{};
  bool make(const void* like, int64_t bytes, uint64_t mark);
  void free();
};

// Another process's slab, readable by kernels and copies of `context`; null when it cannot be opened or does not begin
// with `mark`, as in a container that shares the host but not its processes, or without peer access between cards.
char* open_slab(Context& context, const IpcHandle& handle, uint64_t mark);
void close_slab(Context& context, char* at);

}  // namespace undertow::gpu
