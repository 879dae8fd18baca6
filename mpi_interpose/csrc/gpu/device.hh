// Packing on a device: pieces are launched, contiguous bytes are copied, and slabs of pinned memory carry messages.
//
// Each function returns when its target may be read. The stream is a blocking one of the memory's own context, so work
// that the program queued on the legacy default stream (what torch and cupy use unless told otherwise) is done before
// ours; work on other streams must be finished by the program, as with every CUDA-aware MPI.
#pragma once

#include <atomic>

#include "driver.hh"
#include "plan.hh"

namespace undertow::gpu {

// count elements between `user` and count * size dense bytes at `packed`; either side, or both, in device memory.
// Throws Failure when the driver fails and Unsupported when the type is too large for the device.
void pack(const Plan& plan, int64_t count, const void* user, void* packed);
void unpack(const Plan& plan, int64_t count, const void* packed, void* user);
// A receive that brought only `bytes` bytes: the rest of the type's bytes keep their values.
void unpack_part(const Plan& plan, int64_t count, const void* packed, void* user, int64_t bytes);

// While a Group lives, this thread's packs and unpacks are only queued, and share launches; `finish` waits for all of
// them. Slabs that are put back meanwhile are kept until then. A group inside a group joins it.
class Group {
 public:
  Group();
  ~Group();  // what was not finished is given up
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;
  void finish();

 private:
  bool outermost_;
};

// Plain bytes, at least one side on the device.
void copy(void* to, const void* from, int64_t bytes);

// Only queues on `stream` (both sides device or pinned memory); for measurements. `device_side` names the context.
void enqueue(const Plan& plan, int64_t count, const void* user, void* packed, bool packing, Handle stream);

// Pinned memory that every context may use, for a message from or to `device_side`; null when the driver has none.
// Freed slabs are kept up to a limit.
void* slab_get(int64_t bytes, const void* device_side);
void slab_put(void* slab, int64_t bytes);
void release_all();  // before the driver goes

enum class HostPath : int { Auto, Direct, Staged };  // how a kernel's packed bytes reach host memory
extern HostPath host_path;

// Messages of more than two of these go through a ring of two halves of scratch of so many bytes (see ring.hh); 0: never.
// UNDERTOW_MPI_GPU_RING_KB at first.
extern std::atomic<int64_t> ring_half;

struct Counters {
  std::atomic<int64_t> launches{0}, pieces{0}, copies{0}, bytes{0}, slabs{0};
  std::atomic<int64_t> code_loads{0}, ptx_loads{0}, load_us{0};  // contexts that got machine code, or PTX; the time of it
};
extern Counters counters;

}  // namespace undertow::gpu
