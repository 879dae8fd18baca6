// See ipc.hh.
#include "ipc.hh"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <optional>

#include "handlers_coll.hh"
#include "resolve.hh"
#include "slab.hh"

namespace undertow {
namespace {

constexpr int64_t kAlign = 256, kMark = 256;  // the halves begin behind the mark
constexpr int kMostSlabs = 8;                 // communicators that may have one: slabs are never freed
// With auto: on two H200 the offers of a call cost 8 µs, lost where its largest block had up to 128 KiB, and won from
// 512 KiB on, 4 to 60 times (results/mpi_gpu_collectives).
constexpr int64_t kWorth = 256 << 10;
constexpr int kAskAgain = 8;         // so many calls of a neighbour collective, and larger slabs may be made
constexpr int64_t kTrial = 4 << 20;  // bytes read from others before they are relied on

std::atomic<int> g_slabs{0};
int g_keyval = MPI_KEYVAL_INVALID;

int64_t most_half() {
  static const int64_t bytes = [] {
    const char* v = std::getenv("UNDERTOW_MPI_IPC_MB");
    const long mb = v && *v ? std::strtol(v, nullptr, 10) : 64;
    return static_cast<int64_t>(mb < 1 ? 1 : mb) << 20;
  }();
  return bytes;
}

int64_t least_half() { return most_half() / 4; }  // larger ones are made when calls need them

// What a communicator has agreed on.
struct Served {
  enum { kOpen, kYes, kNo } verdict = kOpen;
  uint64_t calls = 0, turn = 0;
  bool neighbours = false;  // kind of the last call
  bool grid = false;
  int rank = 0;
  int64_t half = 0;  // bytes of either half, the same on all ranks
  int wish = 0;      // log2 of what some rank had needed, as all know; 0: nothing is known
  bool full = false; // larger ones could not be had
  gpu::Slab slab;
  std::vector<char*> of;  // every rank's slab as seen here; ours at our own rank
};

struct Offer {
  int64_t bytes, at;  // bytes < 0: this block goes through the library
  int32_t rank, need;  // need: log2 of a half for all of this call's blocks, or 0; every rank hears it of every other
};

int forget(MPI_Comm, int, void* attribute, void*) {
  Served* served = static_cast<Served*>(attribute);
  if (served->verdict != Served::kYes) delete served;  // others may still read a slab that was served
  return MPI_SUCCESS;
}
int copy_nothing(MPI_Comm, int, void*, void*, void*, int* flag) {
  *flag = 0;
  return MPI_SUCCESS;
}

Served* served_by(MPI_Comm comm) {
  static std::once_flag once;
  std::call_once(once, [] { own.Comm_create_keyval(copy_nothing, forget, &g_keyval, nullptr); });
  void* kept = nullptr;
  int found = 0, kind = MPI_UNDEFINED;
  if (g_keyval == MPI_KEYVAL_INVALID || own.Comm_get_attr(comm, g_keyval, &kept, &found) != MPI_SUCCESS) return nullptr;
  if (found) return static_cast<Served*>(kept);
  Served* made = new Served;
  made->rank = rank_in(comm);
  made->grid = own.Topo_test(comm, &kind) == MPI_SUCCESS && kind == MPI_CART;
  if (own.Comm_set_attr(comm, g_keyval, made) == MPI_SUCCESS) return made;
  delete made;
  return nullptr;
}

// Whether `bad` is 0 on every rank. Collective, and a barrier.
bool all_good(MPI_Comm comm, bool good) {
  int bad = !good, any = 1;
  return own.Allreduce(&bad, &any, 1, MPI_INT, MPI_MAX, comm) == MPI_SUCCESS && any == 0;
}

const void* bytes_of(const PeerBlock& block) {
  const Record* r = record_of(block.type);
  return r ? user_bytes(*r, block.at) : block.at;
}

const void* first_device(const std::vector<PeerBlock>& blocks) {
  for (const PeerBlock& block : blocks)
    if (block.count > 0 && gpu::on_device(bytes_of(block))) return bytes_of(block);
  return nullptr;
}

// Whether a call with these blocks should go this way: the rank's own opinion.
bool worth(const std::vector<PeerBlock>& sends, int rank, bool neighbours) {
  if (g_ipc.load(std::memory_order_relaxed) == Ipc::kAll) return true;
  for (size_t k = 0; k < sends.size(); ++k) {
    const PeerBlock& b = sends[k];
    if (b.count <= 0 || (!neighbours && static_cast<int>(k) == rank)) continue;
    const Record* r = record_of(b.type);
    if (!r && gpu::on_device(b.at)) r = device_record(b.type);
    if (r && r->plan.size > 0 && b.count >= (kWorth + r->plan.size - 1) / r->plan.size) return true;
  }
  return false;
}

int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// log2 of the half that would hold all of a rank's device blocks.
int class_of_half(const std::vector<PeerBlock>& sends) {
  int64_t need = 0;
  for (const PeerBlock& b : sends) {
    int64_t bytes = 0;
    const Record* r = b.count > 0 && gpu::on_device(bytes_of(b)) ? device_record(b.type) : nullptr;
    if (!r || __builtin_mul_overflow(b.count, r->plan.size, &bytes) || bytes > most_half()) continue;
    need += aligned(bytes);
  }
  int c = 0;
  while ((1ll << c) < std::max(need, least_half()) && (1ll << c) < most_half()) ++c;
  return c;
}

// Seconds of the fastest of a few copies.
double seconds(gpu::Context& context, char* to, const char* from, int64_t bytes) {
  double best = 1e9;
  for (int k = 0; k < 5; ++k) {
    const auto began = std::chrono::steady_clock::now();
    context.copy(to, from, bytes, context.stream);
    context.wait(context.stream);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count());
  }
  return best;
}

// Whether reading the others' slabs is no slower than a copy to pinned memory and one back.
bool fast(const Served& s) {
  gpu::Context& context = *s.slab.context;
  const int64_t bytes = std::min(kTrial, s.half);
  char* const pinned = device_slab_get(bytes, s.slab.at);
  if (!pinned) return false;
  gpu::Context::Use use(context);
  char* const own_half = s.slab.at + kMark;
  double slowest = 0;
  for (const char* other : s.of)
    if (other != s.slab.at) slowest = std::max(slowest, seconds(context, own_half, other + kMark + s.half, bytes));
  const double by_host = seconds(context, pinned, own_half, bytes) + seconds(context, own_half, pinned, bytes);
  device_slab_put(pinned, bytes);
  return slowest <= by_host;
}

struct Introduction {
  uint64_t host, mark;
  gpu::IpcHandle handle;
};

// Slabs whose halves hold 2^size bytes, made and opened by all ranks; s.verdict says whether that went well.
void introduce(Served& s, MPI_Comm comm, const void* device, int size) {
  const int n = size_of(comm);
  s.verdict = Served::kNo;
  s.half = std::min<int64_t>(1ll << size, most_half());
  static std::atomic<uint64_t> number{0};
  const uint64_t mark = (static_cast<uint64_t>(getpid()) << 32) ^ (++number << 8) ^ 0x5ab5ull ^ host_number();
  bool good = false;
  try {
    good = s.slab.make(device, kMark + 2 * s.half, mark);
  } catch (const std::exception& error) {
    say("device memory for other ranks: %s", error.what());
  }
  Introduction mine{host_number(), mark, s.slab.handle};
  std::vector<Introduction> all(n);
  if (own.Allgather(&mine, sizeof mine, constants.byte, all.data(), sizeof mine, constants.byte, comm) != MPI_SUCCESS)
    return;
  if (!all_good(comm, good)) return s.slab.free();
  s.of.assign(n, nullptr);
  try {
    for (int k = 0; k < n && good; ++k) {
      if (k == s.rank) s.of[k] = s.slab.at;
      else if (all[k].host == mine.host) s.of[k] = gpu::open_slab(*s.slab.context, all[k].handle, all[k].mark);
      good = s.of[k] != nullptr;
    }
    if (good && g_ipc.load(std::memory_order_relaxed) == Ipc::kAuto) good = fast(s);
  } catch (const std::exception& error) {
    say("device memory of other ranks: %s", error.what());
    good = false;
  }
  if (all_good(comm, good)) {
    s.verdict = Served::kYes;
    return;
  }
  for (int k = 0; k < n; ++k)
    if (k != s.rank && s.of[k]) gpu::close_slab(*s.slab.context, s.of[k]);
  all_good(comm, true);  // nobody has it open any more
  s.slab.free();
}

void negotiate(Served& s, MPI_Comm comm, const void* device, bool wish, int size) {
  const bool room = g_slabs.load() < kMostSlabs;
  int facts[4] = {device == nullptr, !room, wish, size}, any[4] = {1, 1, 0, 0};
  if (own.Allreduce(facts, any, 4, MPI_INT, MPI_MAX, comm) != MPI_SUCCESS || any[1]) s.verdict = Served::kNo;
  if (any[0] || any[1] || !any[2]) return;
  ++g_slabs;
  introduce(s, comm, device, any[3]);
}

// Larger slabs in place of these, when some rank had more to send than its half holds: `size`, the same on all ranks.
// All are in this call, so nobody reads any longer. Where larger ones cannot be had, all keep what they have.
void grow(Served& s, MPI_Comm comm, int size) {
  if (s.full || std::min<int64_t>(1ll << size, most_half()) <= s.half || !all_good(comm, true)) return;
  const Served before = s;
  introduce(s, comm, before.slab.at, size);
  if (s.verdict != Served::kYes) {
    s.verdict = Served::kYes, s.half = before.half, s.slab = before.slab, s.of = before.of, s.full = true;
    return;
  }
  for (int k = 0; k < static_cast<int>(before.of.size()); ++k)
    if (k != s.rank) gpu::close_slab(*before.slab.context, before.of[k]);
  all_good(comm, true);
  gpu::Slab(before.slab).free();
}

// Packs what it can into this call's half.
void offer(Served& s, std::vector<PeerBlock>& sends, std::vector<Offer>& offers) {
  char* const half = s.slab.at + kMark + static_cast<int64_t>(s.turn % 2) * s.half;
  const int card = s.slab.context->device;
  int64_t used = 0;
  DeviceGroup group;
  for (size_t k = 0; k < sends.size(); ++k) {
    PeerBlock& b = sends[k];
    int64_t bytes;
    Record* r = b.count > 0 && gpu::on_device(bytes_of(b)) ? device_record(b.type) : nullptr;
    if (!r || r->plan.size == 0 || __builtin_mul_overflow(b.count, r->plan.size, &bytes)) continue;
    if (gpu::where(user_bytes(*r, b.at)).device != card || bytes > s.half - used) continue;
    device_pack(*r, b.count, b.at, half + used);
    r->tally[kSendUse].taken.fetch_add(1, std::memory_order_relaxed);
    r->tally[kSendUse].bytes.fetch_add(bytes, std::memory_order_relaxed);
    offers[k] = {bytes, half + used - s.slab.at, s.rank, 0};
    b.moved = true;
    used += aligned(bytes);
  }
  group.finish();  // the bytes are there before the offer is
}

void take(Served& s, std::vector<PeerBlock>& receives, const std::vector<Offer>& offers) {
  DeviceGroup group;
  std::vector<std::vector<char>> kept;  // until the group has finished
  for (size_t k = 0; k < receives.size(); ++k) {
    PeerBlock& b = receives[k];
    const Offer& o = offers[k];
    if (o.bytes < 0) continue;
    b.moved = true;
    const char* from = s.of[o.rank] + o.at;
    Record* r = device_record(b.type);
    const gpu::Where where = gpu::where(r ? user_bytes(*r, b.at) : b.at);
    const bool elsewhere = where.memory == gpu::Memory::Device && where.device != s.slab.context->device;
    if (!r || elsewhere) {
      kept.emplace_back(static_cast<size_t>(o.bytes));
      device_copy(kept.back().data(), from, o.bytes);
      from = kept.back().data();
    }
    if (r) {
      unpack_slab(*r, b.count, from, b.at, o.bytes);
      continue;
    }
    int position = 0;
    own.Unpack(const_cast<char*>(from), static_cast<int>(o.bytes), &position, b.at, static_cast<int>(b.count), b.type,
               constants.self);
  }
  group.finish();
}

}  // namespace

std::atomic<Ipc> g_ipc{[] {
  const char* v = std::getenv("UNDERTOW_MPI_IPC");
  if (!v || !*v || std::strcmp(v, "0") == 0) return Ipc::kOff;
  return std::strcmp(v, "auto") == 0 ? Ipc::kAuto : Ipc::kAll;
}()};

bool ipc_due(MPI_Comm comm) {
  if (g_ipc.load(std::memory_order_relaxed) == Ipc::kAuto && fortran_mapped()) return false;
  Served* const found = served_by(comm);
  if (!found || found->verdict == Served::kNo) return false;
  if (found->verdict == Served::kYes) return true;
  ++found->calls;
  return !(found->calls & (found->calls - 1));
}

int ipc_exchange(MPI_Comm comm, bool neighbours, std::vector<PeerBlock>& sends, std::vector<PeerBlock>& receives) {
  Served& s = *served_by(comm);
  const bool send_worth = worth(sends, s.rank, neighbours);
  if (s.verdict == Served::kOpen) {
    const void* device = first_device(sends);
    negotiate(s, comm, device ? device : first_device(receives), send_worth, class_of_half(sends));
    if (s.verdict != Served::kYes) return MPI_SUCCESS;
  } else {
    if (s.neighbours != neighbours) all_good(comm, true);
    if (neighbours && s.half < most_half() && !s.full && s.turn % kAskAgain == 0) {
      const int mine = send_worth ? class_of_half(sends) : 0;
      if (own.Allreduce(&mine, &s.wish, 1, MPI_INT, MPI_MAX, comm) != MPI_SUCCESS) s.wish = 0;
    }
    grow(s, comm, s.wish);
  }
  s.neighbours = neighbours;
  std::vector<Offer> out(sends.size(), Offer{-1, 0, 0, 0}), in(receives.size(), Offer{-1, 0, 0, 0});
  if (send_worth) offer(s, sends, out);
  const int need = !neighbours && send_worth ? class_of_half(sends) : 0;
  for (Offer& o : out) o.need = need;
  const int rc = (neighbours ? real.MPI_Neighbor_alltoall : real.MPI_Alltoall)(
      out.data(), sizeof(Offer), constants.byte, in.data(), sizeof(Offer), constants.byte, comm);
  if (rc != MPI_SUCCESS) return rc;
  take(s, receives, in);
  if (!neighbours)
    for (const Offer& o : in) s.wish = std::max<int>(s.wish, o.need);
  ++s.turn;
  if (neighbours && !s.grid) all_good(comm, true);
  return MPI_SUCCESS;
}

}  // namespace undertow

// For measurements: the switch (0 off, 1 all, 2 auto), to be turned on every rank alike, between calls.
extern "C" __attribute__((visibility("default"))) void undertow_measure_ipc(int way) {
  undertow::g_ipc.store(static_cast<undertow::Ipc>(way));
}
