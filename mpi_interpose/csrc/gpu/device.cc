// See device.hh.
#include "device.hh"

#include <cstdlib>
#include <cstring>

#include "context.hh"

namespace undertow::gpu {

Counters counters;
HostPath host_path = [] {
  const char* wish = std::getenv("UNDERTOW_MPI_GPU");
  if (wish && !std::strcmp(wish, "direct")) return HostPath::Direct;
  if (wish && !std::strcmp(wish, "staged")) return HostPath::Staged;
  return HostPath::Auto;
}();

namespace {

constexpr int64_t kKeepPinned = 512ll << 20;
constexpr int64_t kDirectBytes = 1 << 20;   // above, kernel into device scratch and the copy engine (auto)

// Pinned memory is allocated and freed with some context current; any of ours serves, as it is portable.
void* pin(int64_t bytes) {
  constexpr unsigned kPortable = 1, kMapped = 2;
  void* p = nullptr;
  Context* c = any_context();
  if (!c) return nullptr;
  Context::Use use(*c);
  return cuda.cuMemHostAlloc(&p, static_cast<size_t>(bytes), kPortable | kMapped) == 0 ? p : nullptr;
}

void unpin(void* p) {
  Context::Use use(*any_context());
  cuda.cuMemFreeHost(p);
}

Pool& pinned() {
  static Pool* pool = new Pool(pin, unpin, kKeepPinned);
  return *pool;
}

struct Scratch {
  Scratch(Context& context, int64_t n) : c(context), bytes(n), at(static_cast<char*>(c.scratch.get(n))) {
    if (!at) throw Failure("no device memory for " + std::to_string(n) + " bytes of scratch");
  }
  ~Scratch() { c.scratch.put(at, bytes); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  Context& c;
  int64_t bytes;
  char* at;
};

uint64_t number(const void* p) { return reinterpret_cast<uint64_t>(p); }

// One side in host memory that a kernel cannot reach, or not as fast as a copy engine: through device scratch.
void through_scratch(Context& c, const Plan& plan, int64_t count, char* user, char* packed, bool packing) {
  const int64_t bytes = count * plan.size;
  Scratch scratch(c, bytes);
  const std::vector<Piece> pieces = c.pieces(plan, count, number(user), number(scratch.at));
  if (packing) {
    c.launch(pieces, true, c.stream);
    c.copy(packed, scratch.at, bytes, c.stream);
  } else {
    c.copy(scratch.at, packed, bytes, c.stream);
    c.launch(pieces, false, c.stream);
  }
  c.wait(c.stream);
}

bool direct(Memory packed, int64_t bytes) {
  if (packed == Memory::Device) return true;
  if (packed != Memory::Pinned || host_path == HostPath::Staged) return false;
  return host_path == HostPath::Direct || bytes <= kDirectBytes;
}

void move(const Plan& plan, int64_t count, char* user, char* packed, bool packing) {
  const int64_t bytes = count * plan.size;
  if (bytes <= 0) return;
  char* probe = user + plan.ir->lo;  // the origin itself may lie outside the buffer
  Context& c = context_of(probe, packed);
  Context::Use use(c);
  counters.bytes += bytes;
  int64_t off = 0;
  if (contiguous(plan, count, &off)) {
    packing ? c.copy(packed, user + off, bytes, c.stream) : c.copy(user + off, packed, bytes, c.stream);
    c.wait(c.stream);
    return;
  }
  if (where(probe).memory != Memory::Device) {  // only the packed side is on the device
    std::vector<char> host(static_cast<size_t>(bytes));
    if (packing) {
      undertow::pack(plan, count, user, host.data());
      c.copy(packed, host.data(), bytes, c.stream);
      c.wait(c.stream);
    } else {
      c.copy(host.data(), packed, bytes, c.stream);
      c.wait(c.stream);
      undertow::unpack(plan, count, host.data(), user);
    }
    return;
  }
  if (!direct(where(packed).memory, bytes)) return through_scratch(c, plan, count, user, packed, packing);
  c.launch(c.pieces(plan, count, number(user), number(packed)), packing, c.stream);
  c.wait(c.stream);
}

}  // namespace

void pack(const Plan& plan, int64_t count, const void* user, void* packed) {
  move(plan, count, static_cast<char*>(const_cast<void*>(user)), static_cast<char*>(packed), true);
}

void unpack(const Plan& plan, int64_t count, const void* packed, void* user) {
  move(plan, count, static_cast<char*>(user), static_cast<char*>(const_cast<void*>(packed)), false);
}

// The type's present bytes are packed, the received ones laid over them, and all unpacked: no byte outside the type is
// touched, and those inside belong to this receive.
void unpack_part(const Plan& plan, int64_t count, const void* packed, void* user, int64_t bytes) {
  if (bytes <= 0) return;
  std::vector<char> host(static_cast<size_t>(count * plan.size));
  pack(plan, count, user, host.data());
  if (where(packed).memory == Memory::Device) {
    Context& c = context_of(packed);
    Context::Use use(c);
    c.copy(host.data(), packed, bytes, c.stream);
    c.wait(c.stream);
  } else {
    std::memcpy(host.data(), packed, static_cast<size_t>(bytes));
  }
  unpack(plan, count, host.data(), user);
}

void copy(void* to, const void* from, int64_t bytes) {
  if (bytes <= 0) return;
  Context& c = context_of(to, from);
  Context::Use use(c);
  c.copy(to, from, bytes, c.stream);
  c.wait(c.stream);
}

void enqueue(const Plan& plan, int64_t count, const void* user, void* packed, bool packing, Handle stream) {
  Context& c = context_of(static_cast<const char*>(user) + plan.ir->lo, packed);
  Context::Use use(c);
  int64_t off = 0;
  char* u = static_cast<char*>(const_cast<void*>(user));
  if (contiguous(plan, count, &off)) {
    packing ? c.copy(packed, u + off, count * plan.size, stream) : c.copy(u + off, packed, count * plan.size, stream);
    return;
  }
  c.launch(c.pieces(plan, count, number(user), number(packed)), packing, stream);
}

void* slab_get(int64_t bytes, const void* device_side) {
  context_of(device_side);
  void* slab = pinned().get(bytes);
  if (slab) ++counters.slabs;
  return slab;
}
void slab_put(void* slab, int64_t bytes) { pinned().put(slab, bytes); }

void release_all() {
  if (detail::state != 1) return;
  pinned().clear();
  forget_contexts();
}

}  // namespace undertow::gpu
