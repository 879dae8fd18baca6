// The device side without MPI, as a C ABI for tests and benchmarks; plans come from core/capi.cc.
#include <cstring>
#include <string>

#include "context.hh"
#include "device.hh"
#include "paths.hh"

using namespace undertow;

namespace {
thread_local std::string g_error;

template <class F>
const char* attempt(F f) {  // NULL, or why it failed
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    g_error = e.what();
    return g_error.c_str();
  }
}
}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int undertow_gpu_possible() { return gpu::possible(); }
EXPORT int undertow_gpu_memory(const void* address) { return static_cast<int>(gpu::where(address).memory); }
// The kernel for launches of one piece that it serves, by name (see choose.hh); "": as `choose` says.
EXPORT const char* undertow_gpu_use_kernel(const char* name) {
  return attempt([&] {
    gpu::forced_kernel.reset();
    if (*name) gpu::forced_kernel = gpu::read_choice(name);
  });
}
// Whether a plan between two addresses is one piece that the named kernel serves; -1: no such kernel.
EXPORT int undertow_gpu_serves(void* plan, int64_t count, uint64_t user, uint64_t packed, int packing, const char* name) {
  int found = -1;
  attempt([&] {
    gpu::Tables none;
    none.of_op = [](size_t) { return gpu::Table{}; };
    none.whole = [](const gpu::Blocks&, int64_t) { return gpu::Table{}; };
    const gpu::Choice choice = *name ? gpu::read_choice(name) : gpu::Choice{};
    const std::vector<gpu::Piece> pieces = gpu::lower(*static_cast<Plan*>(plan), count, user, packed, none);
    found = pieces.size() == 1 && gpu::serves(choice, pieces[0], packing != 0);
  });
  return found;
}
EXPORT void undertow_gpu_ring(int64_t half) { gpu::ring_half = half / 256 * 256; }
EXPORT void undertow_gpu_host_path(int path) { gpu::host_path = static_cast<gpu::HostPath>(path); }

// What `text` says: the most bytes that go directly; -1 when it is no such text (undertow_gpu_error says why).
EXPORT int64_t undertow_gpu_direct_up_to(const char* text, int packing, int64_t block) {
  int64_t bytes = -1;
  attempt([&] { bytes = gpu::read_paths(text).direct_up_to(packing != 0, block); });
  return bytes;
}
EXPORT const char* undertow_gpu_error() { return g_error.c_str(); }

EXPORT const char* undertow_gpu_pack(void* plan, int64_t count, const void* user, void* packed) {
  return attempt([&] { gpu::pack(*static_cast<Plan*>(plan), count, user, packed); });
}
EXPORT const char* undertow_gpu_unpack(void* plan, int64_t count, const void* packed, void* user, int64_t bytes) {
  return attempt([&] {
    const Plan& p = *static_cast<Plan*>(plan);
    if (bytes < count * p.size) gpu::unpack_part(p, count, packed, user, bytes);
    else gpu::unpack(p, count, packed, user);
  });
}
EXPORT const char* undertow_gpu_enqueue(void* plan, int64_t count, const void* user, void* packed, int packing,
                                        void* stream) {
  return attempt([&] { gpu::enqueue(*static_cast<Plan*>(plan), count, user, packed, packing != 0, stream); });
}
EXPORT void* undertow_gpu_group_open() { return new gpu::Group; }
EXPORT const char* undertow_gpu_group_close(void* group) {
  gpu::Group* g = static_cast<gpu::Group*>(group);
  const char* error = attempt([&] { g->finish(); });
  delete g;
  return error;
}
EXPORT void* undertow_gpu_slab_get(int64_t bytes, const void* device) {
  void* slab = nullptr;
  attempt([&] { slab = gpu::slab_get(bytes, device); });
  return slab;
}
EXPORT void undertow_gpu_slab_put(void* slab, int64_t bytes) { gpu::slab_put(slab, bytes); }
EXPORT void undertow_gpu_counters(int64_t out[8]) {
  const gpu::Counters& c = gpu::counters;
  const int64_t all[] = {c.launches, c.pieces, c.copies, c.bytes, c.slabs, c.code_loads, c.ptx_loads, c.load_us};
  std::memcpy(out, all, sizeof all);
}
// How a plan becomes pieces between two addresses, without a device: one line each.
EXPORT const char* undertow_gpu_describe(void* plan, int64_t count, uint64_t user, uint64_t packed) {
  const char* error = attempt([&] {
    gpu::Tables tables;
    tables.of_op = [](size_t) { return gpu::Table{}; };
    tables.whole = [](const gpu::Blocks& blocks, int64_t) {
      gpu::Table t;
      t.runs = static_cast<uint32_t>(blocks.offs.size());
      return t;
    };
    static const char* const kinds[] = {"loops", "table", "mixed table", "transpose"};
    std::string text;
    for (const gpu::Piece& p : gpu::lower(*static_cast<Plan*>(plan), count, user, packed, tables)) {
      text += std::string(kinds[p.kind]) + ": " + std::to_string(p.words) + " words of " +
              std::to_string(1 << p.word_log2) + " B, " + std::to_string(p.block) + " per block";
      for (int d = 0; d < p.ndims; ++d)
        text += ", " + std::to_string(p.dims[d].n) + " x step " + std::to_string(p.dims[d].user);
      text += p.dense ? "\n" : ", with gaps in the packed side\n";
    }
    g_error = text;
  });
  return error ? error : g_error.c_str();
}
