// The CUDA driver, found at run time: nothing is linked, nothing is loaded, and nothing happens before the program
// itself has loaded libcuda. Until then `on_device` is one load and one compare.
//
// How a program is noticed to have loaded the driver: the dynamic loader's list of libraries only grows at its end
// while our pin (a reference to its last member) is held, so a null `next` pointer there means that nothing was loaded
// since we looked. Only then are names compared.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace undertow::gpu {

using Result = int;           // CUresult, 0 is success
using Handle = void*;         // context, module, function, stream, event
using Address = unsigned long long;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The functions used, by the names that libcuda exports.
#define UNDERTOW_CUDA_FUNCTIONS(X)                                                                                  \
  X(cuGetErrorName, (Result, const char**))                                                                         \
  X(cuPointerGetAttributes, (unsigned, int*, void**, Address))                                                      \
  X(cuCtxGetCurrent, (Handle*))                                                                                     \
  X(cuCtxPushCurrent_v2, (Handle))                                                                                  \
  X(cuCtxPopCurrent_v2, (Handle*))                                                                                  \
  X(cuCtxSynchronize, ())                                                                                           \
  X(cuCtxSetLimit, (int, size_t))                                                                                   \
  X(cuDeviceGet, (int*, int))                                                                                       \
  X(cuDeviceGetName, (char*, int, int))                                                                             \
  X(cuDeviceGetAttribute, (int*, int, int))                                                                         \
  X(cuDevicePrimaryCtxRetain, (Handle*, int))                                                                       \
  X(cuModuleLoadData, (Handle*, const void*))                                                                       \
  X(cuModuleGetFunction, (Handle*, Handle, const char*))                                                            \
  X(cuStreamCreate, (Handle*, unsigned))                                                                            \
  X(cuStreamSynchronize, (Handle))                                                                                  \
  X(cuStreamWaitEvent, (Handle, Handle, unsigned))                                                                  \
  X(cuEventCreate, (Handle*, unsigned))                                                                             \
  X(cuEventRecord, (Handle, Handle))                                                                                \
  X(cuLaunchKernel, (Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void**,  \
                     void**))                                                                                       \
  X(cuMemAlloc_v2, (Address*, size_t))                                                                              \
  X(cuMemFree_v2, (Address))                                                                                        \
  X(cuMemHostAlloc, (void**, size_t, unsigned))                                                                     \
  X(cuMemFreeHost, (void*))                                                                                         \
  X(cuMemcpyAsync, (Address, Address, size_t, Handle))

// Memory of another process; a driver may lack these.
struct IpcHandle {
  char opaque[64];
};
#define UNDERTOW_CUDA_IPC_FUNCTIONS(X)                                                                              \
  X(cuIpcGetMemHandle, (IpcHandle*, Address))                                                                       \
  X(cuIpcOpenMemHandle_v2, (Address*, IpcHandle, unsigned))                                                         \
  X(cuIpcCloseMemHandle, (Address))

struct Driver {
#define X(name, arguments) Result(*name) arguments = nullptr;
  UNDERTOW_CUDA_FUNCTIONS(X)
  UNDERTOW_CUDA_IPC_FUNCTIONS(X)
#undef X
};

extern Driver cuda;  // filled once the program has loaded libcuda
void must(Result result, const char* what);  // throws Failure with the driver's name of the error

// What the driver knows about an address.
enum class Memory : uint8_t { Host, Device, Pinned, Managed };
struct Where {
  Memory memory = Memory::Host;
  int device = -1;
  Handle context = nullptr;  // null for memory of a pool, which belongs to no context
};
Where where(const void* address);

namespace detail {
// The `next` field of the last library that we have looked at; that of none before the first look and once there is a driver.
extern std::atomic<void* const volatile*> watched __attribute__((visibility("hidden")));
bool loaded();  // looks at what was loaded since; true when the driver is usable
}  // namespace detail

// Not null: the program may have loaded a driver, so `possible` has to look.
__attribute__((always_inline)) inline void* news() { return *detail::watched.load(std::memory_order_relaxed); }

// Whether the program can have device memory at all. Two loads and one compare in a program without CUDA.
__attribute__((always_inline)) inline bool possible() { return __builtin_expect(news() != nullptr, 0) && detail::loaded(); }

bool on_device_slow(const void* address);
inline bool on_device(const void* address) {
  return __builtin_expect(possible(), 0) && address != nullptr && on_device_slow(address);
}

}  // namespace undertow::gpu
