// See device.hh.
#include "device.hh"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <shared_mutex>
#include <utility>

#include "context.hh"
#include "paths.hh"

namespace undertow::gpu {

Counters counters;
HostPath host_path = [] {
  const char* wish = std::getenv("UNDERTOW_MPI_GPU");
  if (wish && !std::strcmp(wish, "direct")) return HostPath::Direct;
  if (wish && !std::strcmp(wish, "staged")) return HostPath::Staged;
  return HostPath::Auto;
}();

std::atomic<int64_t> ring_half{[] {
  const char* wish = std::getenv("UNDERTOW_MPI_GPU_RING_KB");
  const int64_t kib = wish && *wish ? std::strtoll(wish, nullptr, 10) : 4096;
  return kib > 0 ? kib << 10 : int64_t{0};
}()};

namespace {

constexpr int64_t kKeepPinned = 512ll << 20;

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

struct Copy {
  void* to;
  const void* from;
  int64_t bytes;
};

// What a thread has queued and not yet waited for, all of one context and direction.
struct Queue {
  int depth = 0;
  Context* context = nullptr;
  bool packing = false;
  std::vector<Piece> pieces;
  std::vector<Copy> after;                        // from device scratch to host memory, once the kernel is queued
  std::vector<std::unique_ptr<Scratch>> scratch;
  std::vector<std::pair<void*, int64_t>> slabs;   // to be put back
  bool busy = false;

  void flush() {
    if (busy) {
      Context& c = *context;
      Context::Use use(c);
      busy = false;
      std::vector<Piece> now;
      now.swap(pieces);
      c.launch(now, packing, c.stream);
      for (const Copy& copy : after) c.copy(copy.to, copy.from, copy.bytes, c.stream);
      after.clear();
      c.wait(c.stream);
    }
    scratch.clear();
    for (const auto& slab : slabs) pinned().put(slab.first, slab.second);
    slabs.clear();
  }
  void join(Context& c, bool way) {
    if (busy && (context != &c || packing != way)) flush();
    context = &c;
    packing = way;
    busy = true;
  }
};
thread_local Queue t_queue;

bool direct(Memory packed, int64_t bytes, int64_t block, bool packing) {
  if (packed == Memory::Device) return true;
  if (packed != Memory::Pinned || host_path == HostPath::Staged) return false;
  return host_path == HostPath::Direct || bytes <= machine_paths().direct_up_to(packing, block);
}

// Only the packed side is on the device: the core packs on the host.
void on_host(Context& c, const Plan& plan, int64_t count, char* user, char* packed, bool packing) {
  const int64_t bytes = count * plan.size;
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
}

// Queues a large message chunk by chunk; false when it is small, is to go directly, or cannot be cut.
bool by_ring(Queue& q, Context& c, const Plan& plan, int64_t count, char* user, char* packed, bool packing) {
  const int64_t bytes = count * plan.size, half = ring_half;
  if (half <= 0 || bytes <= 2 * half || direct(Memory::Pinned, bytes, plan.form(count).block, packing)) return false;
  auto halves = std::make_unique<Scratch>(c, 2 * half);
  const uint64_t base = number(halves->at);
  const std::vector<Chunk> chunks = chunks_of(c.pieces(plan, count, number(user), base), base, bytes, half);
  if (chunks.empty()) return false;
  c.relay(chunks, halves->at, half, packed, packing);
  q.scratch.push_back(std::move(halves));
  return true;
}

void queue(const Plan& plan, int64_t count, char* user, char* packed, bool packing) {
  const int64_t bytes = count * plan.size;
  if (bytes <= 0) return;
  char* probe = user + plan.ir->lo;  // the origin itself may lie outside the buffer
  const Where u = where(probe), k = where(packed);
  Context& c = context_of(u.memory == Memory::Device ? u : k);
  Context::Use use(c);
  counters.bytes += bytes;
  Queue& q = t_queue;
  int64_t off = 0;
  if (contiguous(plan, count, &off)) {
    q.join(c, packing);
    return packing ? c.copy(packed, user + off, bytes, c.stream) : c.copy(user + off, packed, bytes, c.stream);
  }
  if (u.memory != Memory::Device) return on_host(c, plan, count, user, packed, packing);
  q.join(c, packing);
  if (k.memory == Memory::Pinned && by_ring(q, c, plan, count, user, packed, packing)) return;
  char* reached = packed;
  if (!direct(k.memory, bytes, plan.form(count).block, packing)) {
    q.scratch.push_back(std::make_unique<Scratch>(c, bytes));
    reached = q.scratch.back()->at;
    if (packing) q.after.push_back({packed, reached, bytes});
    else c.copy(reached, packed, bytes, c.stream);
  }
  const std::vector<Piece> pieces = c.pieces(plan, count, number(user), number(reached));
  q.pieces.insert(q.pieces.end(), pieces.begin(), pieces.end());
}

void move(const Plan& plan, int64_t count, char* user, char* packed, bool packing) {
  Group group;
  queue(plan, count, user, packed, packing);
  group.finish();
}

}  // namespace

namespace {
std::shared_mutex g_tables;  // shared: pieces are queued that refer to tables
}

Group::Group() : outermost_(t_queue.depth++ == 0) {
  if (outermost_) g_tables.lock_shared();
}
Group::~Group() {
  --t_queue.depth;
  if (!outermost_) return;
  if (t_queue.busy || !t_queue.slabs.empty()) t_queue = Queue{};  // a failure: what was queued is given up with it
  g_tables.unlock_shared();
  if (!g_tables.try_lock()) return;
  trim_contexts();
  g_tables.unlock();
}
void Group::finish() {
  if (outermost_) t_queue.flush();
}

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
  Group group;
  pack(plan, count, user, host.data());
  t_queue.flush();  // the bytes are needed now, also inside a group
  if (where(packed).memory == Memory::Device) {
    Context& c = context_of(packed);
    Context::Use use(c);
    c.copy(host.data(), packed, bytes, c.stream);
    c.wait(c.stream);
  } else {
    std::memcpy(host.data(), packed, static_cast<size_t>(bytes));
  }
  unpack(plan, count, host.data(), user);
  t_queue.flush();  // `host` ends here
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
void slab_put(void* slab, int64_t bytes) {
  if (t_queue.busy) t_queue.slabs.emplace_back(slab, bytes);
  else pinned().put(slab, bytes);
}

void release_all() {
  if (!possible()) return;
  pinned().clear();
  forget_contexts();
}

}  // namespace undertow::gpu
