// See driver.hh.
#include "driver.hh"

#include <dlfcn.h>
#include <link.h>

#include <cstdlib>
#include <cstring>
#include <mutex>

namespace undertow::gpu {

Driver cuda;

namespace detail {

namespace {

std::mutex g_lock;
std::atomic<int> g_state{0};  // 0 no driver seen, 1 driver usable, 2 switched off
void* const g_always = &g_lock;  // stands for a library that is always new
void* const g_never = nullptr;

bool is_driver(const char* path) {
  const char* base = path ? std::strrchr(path, '/') : nullptr;
  base = base ? base + 1 : path;
  return base && std::strncmp(base, "libcuda.so", 10) == 0;
}

bool fill(void* library) {
#define X(name, arguments)                                                             \
  cuda.name = reinterpret_cast<decltype(cuda.name)>(dlsym(library, #name));            \
  if (!cuda.name) return false;
  UNDERTOW_CUDA_FUNCTIONS(X)
#undef X
#define X(name, arguments) cuda.name = reinterpret_cast<decltype(cuda.name)>(dlsym(library, #name));
  UNDERTOW_CUDA_IPC_FUNCTIONS(X)
#undef X
  return true;
}

bool switched_off() {
  const char* wish = std::getenv("UNDERTOW_MPI_GPU");
  return wish && (!std::strcmp(wish, "off") || !std::strcmp(wish, "0"));
}

bool settle(bool usable) {
  g_state = usable ? 1 : 2;
  watched = usable ? &g_always : &g_never;
  return usable;
}

}  // namespace

std::atomic<void* const volatile*> watched{&g_always};

bool loaded() {
  if (g_state.load(std::memory_order_acquire)) return g_state == 1;
  std::lock_guard<std::mutex> guard(g_lock);
  if (g_state) return g_state == 1;
  if (switched_off()) return settle(false);
  const link_map* last = nullptr;
  for (const link_map* m = _r_debug.r_map; m; m = m->l_next) {
    last = m;
    if (!is_driver(m->l_name)) continue;
    void* library = dlopen(m->l_name, RTLD_NOLOAD | RTLD_NOW);
    if (!library) continue;
    return settle(fill(library));  // a driver older than these functions is left alone
  }
  // Hold the last library, so that what we watch stays mapped; the main program has an empty name and cannot go.
  if (last && (last->l_name[0] == 0 || dlopen(last->l_name, RTLD_NOLOAD | RTLD_LAZY)))
    watched = reinterpret_cast<void* const volatile*>(&last->l_next);
  return false;
}

}  // namespace detail

void must(Result result, const char* what) {
  if (result == 0) return;
  const char* name = nullptr;
  if (cuda.cuGetErrorName) cuda.cuGetErrorName(result, &name);
  throw Failure(std::string(what) + ": " + (name ? name : "CUDA error") + " (" + std::to_string(result) + ")");
}

Where where(const void* address) {
  enum { kContext = 1, kMemoryType = 2, kManaged = 8, kOrdinal = 9 };
  Where found;
  if (!possible()) return found;
  unsigned type = 0;
  uint64_t managed = 0;  // documented as a boolean; room for any width
  int attributes[] = {kContext, kMemoryType, kManaged, kOrdinal};
  void* values[] = {&found.context, &type, &managed, &found.device};
  if (cuda.cuPointerGetAttributes(4, attributes, values, reinterpret_cast<Address>(address)) != 0) return Where{};
  if (type == 0) return Where{};
  found.memory = (managed & 0xff) ? Memory::Managed : type == 1 ? Memory::Pinned : Memory::Device;
  return found;
}

bool on_device_slow(const void* address) { return where(address).memory == Memory::Device; }

}  // namespace undertow::gpu
