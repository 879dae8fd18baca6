// What the handlers see of the device: is this buffer on one, which record describes it there, a pinned slab for it.
//
// A message from or to device memory always goes through a slab, contiguous ones and predefined types too, because the
// library underneath cannot read device memory. So a predefined type has a record of its own here.
#pragma once

#include <optional>

#include "device.hh"
#include "driver.hh"
#include "types.hh"

namespace undertow {

bool device_side_slow(const void* user, MPI_Datatype type);
// One line for each call that is not staged, where its buffer is device memory and the library cannot read that.
void warn_of_device(Site site, const void* buffer);

// Whether the bytes that `type` touches at `user` (also MPI_BOTTOM) are device memory.
inline bool device_side(const void* user, MPI_Datatype type) {
  return __builtin_expect(gpu::possible(), 0) && device_side_slow(user, type);
}

// The first address that a type touches: its origin may lie outside the buffer.
inline const void* user_bytes(const Record& r, const void* user) {
  return static_cast<const char*>(user) + r.plan.ir->lo;
}

// The record of a type used on device memory; NULL (said once) when the type is not understood. Counts the use.
Record* device_record(MPI_Datatype type);
Record* device_wanted(MPI_Datatype type, Use use, int64_t count);  // NULL too when nothing is to be moved

char* device_slab_get(int64_t bytes, const void* device);  // NULL: no pinned memory
void device_slab_put(char* slab, int64_t bytes);

// Pack or unpack when either side is device memory; false when neither is. Failures of the driver end the program with
// one line, because a message that was not packed must not be sent.
bool device_pack(Record& record, int64_t count, const void* user, void* packed);
bool device_unpack(Record& record, int64_t count, const void* packed, void* user, int64_t bytes);

// Packs and unpacks of this scope share launches and one wait, in `finish`. Costs a load without a device.
class DeviceGroup {
 public:
  DeviceGroup() {
    if (__builtin_expect(gpu::possible(), 0)) group_.emplace();
  }
  void finish();

 private:
  std::optional<gpu::Group> group_;
};

void device_copy(void* to, const void* from, int64_t bytes);  // between device and host memory, complete on return
void device_stop();  // before MPI_Finalize

}  // namespace undertow
