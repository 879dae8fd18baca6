// See hook.hh.
#include "hook.hh"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "device.hh"
#include "lower.hh"
#include "report.hh"

namespace undertow {
namespace {

std::mutex g_lock;
std::unordered_map<uintptr_t, Record*>* g_predefined = new std::unordered_map<uintptr_t, Record*>;
bool g_said = false;

Record* make_predefined(MPI_Datatype type) {
  int integers = 0, addresses = 0, types = 0, combiner = 0;
  if (own.Type_get_envelope(type, &integers, &addresses, &types, &combiner) != MPI_SUCCESS) return nullptr;
  if (combiner != MPI_COMBINER_NAMED && combiner != MPI_COMBINER_F90_REAL && combiner != MPI_COMBINER_F90_COMPLEX &&
      combiner != MPI_COMBINER_F90_INTEGER)
    return nullptr;  // derived and not seen committed: the library must say what it says
  Decoded d = decode(type);
  Record* r = new Record;
  r->plan = make_plan(d.ir, d.lb, d.extent);
  r->key = handle_key(type);
  r->combiners = d.combiners;
  r->leaf = d.leaf;
  r->leaf_size = d.leaf_size;
  r->twin = type;  // contiguous already, unless it is a pair type with padding
  r->twin_state.store(r->plan.size == r->plan.extent ? 1 : 0);
  return r;
}

[[noreturn]] void fatal(const std::exception& error) {
  say("device buffer: %s", error.what());
  std::abort();
}

template <class F>
auto guarded(F body) {
  try {
    return body();
  } catch (const std::exception& error) {
    fatal(error);
  }
}

}  // namespace

// A library that reads device memory itself keeps what it does well: contiguous messages, and reductions of them.
bool library_is_cuda_aware() {
  static const bool aware = [] {
    const char* wish = std::getenv("UNDERTOW_MPI_CUDA_AWARE");
    if (wish && *wish) return *wish != '0';
    int (*ask)() = reinterpret_cast<int (*)()>(find("MPIX_Query_cuda_support"));
    return ask && ask() == 1;
  }();
  return aware;
}

void warn_of_device(Site site, const void* buffer) {
  static std::atomic<bool> said[kSites];
  if (!buffer || !gpu::on_device(buffer) || library_is_cuda_aware() || said[site].exchange(true)) return;
  say("%s is given device memory, which this MPI cannot read or write by itself, and which the preload does not stage in "
      "that call: it will fail or crash. Use host memory there; UNDERTOW_MPI_CUDA_AWARE=1 says that the library can",
      undertow_symbol_names[site]);
}

bool device_side_slow(const void* user, MPI_Datatype type) {
  const Record* r = record_of(type);
  if (!gpu::on_device(r ? user_bytes(*r, user) : user)) return false;
  int64_t off = 0;
  return !((!r || gpu::contiguous(r->plan, 2, &off)) && library_is_cuda_aware());
}

Record* device_record(MPI_Datatype type) {
  if (Record* r = record_of(type)) return r;
  std::lock_guard<std::mutex> guard(g_lock);
  const auto found = g_predefined->find(handle_key(type));
  if (found != g_predefined->end()) return found->second;
  Record* r = nullptr;
  try {
    r = make_predefined(type);
  } catch (const std::exception& e) {
    report_refused(e.what());
  }
  if (r) return (*g_predefined)[handle_key(type)] = r;
  if (!g_said) say("a device buffer is used with a datatype that is not understood; the call goes to the library as it is");
  g_said = true;
  return nullptr;
}

Record* device_wanted(MPI_Datatype type, Use use, int64_t count) {
  if (count <= 0) return nullptr;
  Record* r = device_record(type);
  int64_t bytes;
  if (!r || r->plan.size == 0 || __builtin_mul_overflow(count, r->plan.size, &bytes)) return nullptr;
  r->tally[use].taken.fetch_add(1, std::memory_order_relaxed);
  r->tally[use].bytes.fetch_add(bytes, std::memory_order_relaxed);
  return r;
}

char* device_slab_get(int64_t bytes, const void* device) {
  return guarded([&] { return static_cast<char*>(gpu::slab_get(bytes, device)); });
}
void device_slab_put(char* slab, int64_t bytes) { gpu::slab_put(slab, bytes); }

bool device_pack(Record& r, int64_t count, const void* user, void* packed) {
  if (!gpu::possible() || !(gpu::on_device(user_bytes(r, user)) || gpu::on_device(packed))) return false;
  guarded([&] { gpu::pack(r.plan, count, user, packed); });
  return true;
}

bool device_unpack(Record& r, int64_t count, const void* packed, void* user, int64_t bytes) {
  if (!gpu::possible() || !(gpu::on_device(user_bytes(r, user)) || gpu::on_device(packed))) return false;
  guarded([&] {
    if (bytes >= count * r.plan.size)
      gpu::unpack(r.plan, count, packed, user);
    else
      gpu::unpack_part(r.plan, count, packed, user, bytes);
  });
  return true;
}

void DeviceGroup::finish() {
  if (group_) guarded([&] { group_->finish(); });
}

void device_copy(void* to, const void* from, int64_t bytes) {
  guarded([&] { gpu::copy(to, from, bytes); });
}

void device_stop() { gpu::release_all(); }

}  // namespace undertow

// For measurements: how packed bytes reach host memory from now on (0 auto, 1 direct, 2 staged), in place of what
// UNDERTOW_MPI_GPU said; on every rank alike, between calls. The second fills launches, pieces, copies, bytes and slabs.
extern "C" __attribute__((visibility("default"))) void undertow_measure_gpu_path(int path) {
  undertow::gpu::host_path = static_cast<undertow::gpu::HostPath>(path);
}
extern "C" __attribute__((visibility("default"))) void undertow_measure_gpu_counters(int64_t out[5]) {
  const undertow::gpu::Counters& c = undertow::gpu::counters;
  const int64_t all[] = {c.launches, c.pieces, c.copies, c.bytes, c.slabs};
  std::memcpy(out, all, sizeof all);
}
