// See transfer.hh.
#include "transfer.hh"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <vector>

#include "maybe_lock.hh"

namespace undertow {
namespace {

constexpr int kClasses = 48, kHeader = 64;
constexpr int64_t kKeepBytes = 256ll << 20;  // slabs beyond this many idle bytes go back to the system

std::mutex g_lock;
// Those of receives apart: a transport that reads a sender's slab where it is leaves copies of its cache lines with the
// peer, and to write these anew costs as much as some packing. What was received into stays this process's own.
std::vector<char*> g_idle[2][kClasses];
int64_t g_idle_bytes = 0;

// A transport that copies from process to process looks up every page of a slab: few large ones are quicker. Slabs of 64
// KiB to 1 MiB are cut from huge pages, of which the first kCarvedBytes are kept for good; larger ones have their own.
constexpr int kCarveFrom = 16, kCarveTo = 20;
constexpr int64_t kHugePage = 2ll << 20, kCarvedBytes = 64ll << 20;
std::vector<char*>* g_chunks = new std::vector<char*>;  // never freed: a slab may still be in flight at the end
char* g_chunk = nullptr;  // what is left of the newest huge page
int64_t g_chunk_left = 0, g_carved = 0;

struct Header {
  int size_class;  // -1: pinned memory of the device side
  bool incoming;   // kept for receives
  bool carved;     // never freed by itself
  int64_t bytes;
};

// Whole pages of `bytes` on a boundary of huge pages; NULL when there is no memory. Where the system has no huge pages,
// or the user has switched them off, these are as any others.
char* huge_pages(int64_t bytes) {
  void* block = nullptr;
  if (posix_memalign(&block, kHugePage, static_cast<size_t>(bytes))) return nullptr;
  if (bytes >= kHugePage) madvise(block, static_cast<size_t>(bytes / kHugePage * kHugePage), MADV_HUGEPAGE);
  return static_cast<char*>(block);
}

bool is_carved(const char* slab) {
  Header header;
  std::memcpy(&header, slab - kHeader, sizeof header);
  return header.carved;
}

// Under g_lock. NULL: no more are cut.
char* carve(int64_t bytes) {
  if (g_chunk_left < bytes) {
    if (g_carved + kHugePage > kCarvedBytes) return nullptr;
    char* chunk = huge_pages(kHugePage);
    if (!chunk) return nullptr;
    g_chunks->push_back(chunk);
    g_chunk = chunk, g_chunk_left = kHugePage, g_carved += kHugePage;
  }
  g_chunk_left -= bytes;
  return g_chunk + g_chunk_left;
}

int class_of(int64_t bytes) {
  return bytes <= 256 ? 8 : 64 - __builtin_clzll(static_cast<uint64_t>(bytes - 1));
}

}  // namespace

char* slab_get(int64_t bytes, const void* device, Use use) {
  if (device)
    if (char* block = device_slab_get(kHeader + bytes, device)) {
      const Header header{-1, false, false, bytes};
      std::memcpy(block, &header, sizeof header);
      return block + kHeader;
    }
  const int c = class_of(bytes);
  const int64_t whole = kHeader + (1ll << c);
  const bool incoming = use == kRecvUse;
  char* block = nullptr;
  {
    MaybeLock guard(g_lock);
    std::vector<char*>& idle = g_idle[incoming][c];
    if (!idle.empty()) {
      char* slab = idle.back();
      idle.pop_back();
      g_idle_bytes -= 1ll << c;
      return slab;
    }
    if (kCarveFrom <= c && c <= kCarveTo) block = carve(whole);
  }
  const bool carved = block != nullptr;
  if (c > kCarveTo) block = huge_pages(whole);
  if (void* plain = nullptr; !block && !posix_memalign(&plain, kHeader, static_cast<size_t>(whole)))
    block = static_cast<char*>(plain);
  if (!block) {
    if (device) {
      say("out of memory for a message of %lld bytes", static_cast<long long>(bytes));
      std::abort();
    }
    report_refused("no memory for a copy of the message");
    return nullptr;
  }
  const Header header{c, incoming, carved, bytes};
  std::memcpy(block, &header, sizeof header);
  return block + kHeader;
}

void slab_put(char* slab) {
  char* block = slab - kHeader;
  Header header;
  std::memcpy(&header, block, sizeof header);
  if (header.size_class < 0) return device_slab_put(block, kHeader + header.bytes);
  const int c = header.size_class;
  {
    MaybeLock guard(g_lock);
    if (header.carved || g_idle_bytes + (1ll << c) <= kKeepBytes) {
      g_idle[header.incoming][c].push_back(slab);
      g_idle_bytes += 1ll << c;
      return;
    }
  }
  std::free(block);
}

void slab_release_all() {
  device_stop();
  std::lock_guard<std::mutex> guard(g_lock);
  for (auto& lists : g_idle)
    for (auto& list : lists) {
      for (char* slab : list)
        if (!is_carved(slab)) std::free(slab - kHeader);
      list.clear();
    }
  g_idle_bytes = 0;
}

namespace {

int64_t first_difference(const char* a, const char* b, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (a[i] != b[i]) return i;
  return -1;
}

// Whether the library can be asked about this type with plain ints.
bool comparable(const Record& r, int64_t count) {
  return mode == Mode::Check && !r.dead.load() && count <= INT32_MAX && count * r.plan.size <= INT32_MAX;
}

}  // namespace

void pack_slab(Record& r, int64_t count, const void* user, char* slab) {
  if (device_pack(r, count, user, slab)) return;
  pack(r.plan, count, static_cast<const char*>(user), slab);
  if (!comparable(r, count)) return;
  const int64_t n = count * r.plan.size;
  char* other = slab_get(n);
  if (!other) return;
  int position = 0;
  const int rc = own.Pack(const_cast<void*>(user), static_cast<int>(count), handle_of(r), other, static_cast<int>(n),
                          &position, constants.self);
  if (rc == MPI_SUCCESS && position == n) {
    const int64_t at = first_difference(slab, other, n);
    if (at >= 0) {
      r.wrong.store(true);
      report_mismatch(r, "pack", at);
      std::memcpy(slab, other, static_cast<size_t>(n));
    }
  }
  slab_put(other);
}

void unpack_slab(Record& r, int64_t count, const char* slab, void* user, int64_t bytes) {
  const int64_t n = count * r.plan.size;
  if (bytes > n) bytes = n;
  if (device_unpack(r, count, slab, user, bytes)) return;
  if (bytes < n) {
    walk_unpack(*r.plan.ir, count, r.plan.extent, slab, static_cast<char*>(user), 0, bytes);
    return;
  }
  unpack(r.plan, count, slab, static_cast<char*>(user));
  if (!comparable(r, count)) return;
  // The library reads back what we wrote; both must be the message. Overlapping targets are the program's error.
  char* other = slab_get(n);
  if (!other) return;
  int position = 0;
  const int rc = own.Pack(user, static_cast<int>(count), handle_of(r), other, static_cast<int>(n), &position,
                          constants.self);
  const int64_t at = rc == MPI_SUCCESS && position == n ? first_difference(slab, other, n) : -1;
  if (at >= 0) {
    r.wrong.store(true);
    report_mismatch(r, "unpack", at);
    position = 0;
    own.Unpack(const_cast<char*>(slab), static_cast<int>(n), &position, user, static_cast<int>(count), handle_of(r),
               constants.self);
  }
  slab_put(other);
}

namespace {

// Open MPI's status says it in plain; the fields are in its mpi.h, and a part of its ABI.
template <class Status>
auto said(const Status* s, int) -> decltype(static_cast<int64_t>(s->_ucount)) {
  return s->_cancelled ? 0 : static_cast<int64_t>(s->_ucount);
}
// So does that of MPICH and its relatives: the lowest bit of the second word, and the count around it.
template <class Status>
auto said(const Status* s, int) -> decltype(static_cast<int64_t>(s->count_lo + s->count_hi_and_cancelled)) {
  const auto high = static_cast<uint64_t>(static_cast<uint32_t>(s->count_hi_and_cancelled)) >> 1;
  return s->count_hi_and_cancelled & 1 ? 0 : static_cast<int64_t>(high << 32 | static_cast<uint32_t>(s->count_lo));
}
template <class Status>
int64_t said(const Status* status, long) {
  int cancelled = 0;
  own.Test_cancelled(status, &cancelled);
  if (cancelled) return 0;
  MPI_Count n = 0;
  if (own.Get_elements_x(status, constants.byte, &n) != MPI_SUCCESS || n < 0) return 0;
  return n;
}

}  // namespace

int64_t received_bytes(MPI_Status* status) { return said(status, 0); }

}  // namespace undertow
