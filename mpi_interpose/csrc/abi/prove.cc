// Whether the library packs a type's bytes as its IR says, asked once before the first use of each layout: a small type
// by a pattern that names every byte's place, a large one by random bytes; then several elements in a row by random bytes,
// at an even address and at an odd one, because a library may choose its loops by count and alignment (Open MPI 5's wrong
// ones need a buffer on a multiple of 8). A type that fails is passed through for good. The faces of a halo are few shapes:
// of a type with the shape of one that agreed, one element is compared.
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <unordered_map>
#include <vector>

#include "decode.hh"
#include "report.hh"
#include "round.hh"

namespace undertow {
namespace {

constexpr int64_t kMaxNoise = 1 << 28;    // packed bytes of larger types, which are compared by one pack of random bytes
constexpr int64_t kRow = 3;               // elements in a row
constexpr int64_t kAligned = 64;
constexpr int64_t kMaxRow = 1ll << 36;    // address space for them; elements further apart are compared one by one
constexpr uint32_t kNoiseAfter = 2;       // and not before their third use: a type used once is not worth it

std::mutex g_lock;

// Zeros in which elements are laid out: address space without memory until it is touched, because a type may reach over
// many GiB and touch little of them. Page faults would be most of what a proof takes, and the types of a program's round
// are proved one after the other, so a small span stays mapped for good and a large one until proofs_end; what was written
// there is wiped.
struct Kept {
  size_t bytes;
  int advice;
  unsigned char* base = nullptr;
};
Kept g_small{1 << 19, MADV_NOHUGEPAGE}, g_large{64 << 20, MADV_HUGEPAGE};

unsigned char* map(size_t bytes, int advice) {
  const size_t all = bytes + 2 * kStray;
  void* p = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Unsupported("too far apart to compare with the library");
  madvise(p, all, advice);
  return static_cast<unsigned char*>(p) + kStray;
}

void unmap(unsigned char* base, size_t bytes) { munmap(base - kStray, bytes + 2 * kStray); }

void unmap_large() {  // under g_lock
  if (g_large.base) unmap(g_large.base, g_large.bytes);
  g_large.base = nullptr;
}

struct Span {
  unsigned char* base = nullptr;
  size_t own_bytes = 0;  // 0: of a kept one
  explicit Span(int64_t n) {
    const size_t bytes = static_cast<size_t>(n);
    if (bytes > g_large.bytes) {
      own_bytes = bytes;
      base = map(bytes, MADV_NOHUGEPAGE);
      return;
    }
    Kept& k = bytes > g_small.bytes ? g_large : g_small;
    if (!k.base) k.base = map(k.bytes, k.advice);
    base = k.base;
  }
  ~Span() {
    if (own_bytes) unmap(base, own_bytes);
  }
  Span(const Span&) = delete;
  Span& operator=(const Span&) = delete;
};

using Packed = std::vector<unsigned char>;

// By the library. `origin` is wiped by `wipe` before anything is thrown.
template <class Wipe>
Packed packed_by_library(const Record& r, int64_t count, const void* origin, Wipe wipe) {
  Packed out(static_cast<size_t>(r.plan.size * count));
  int position = 0;
  const int rc = own.Pack(origin, static_cast<int>(count), handle_of(r), out.data(), static_cast<int>(out.size()), &position,
                          constants.self);
  wipe();
  must(rc, "Pack");
  if (position != static_cast<int>(out.size())) throw Unsupported("the library packs another number of bytes");
  return out;
}

void must_agree(const Packed& theirs, const Packed& ours) {
  if (theirs != ours) throw Unsupported("the library packs other bytes than the type's");
}

// One element in a buffer whose bytes name their places, eight bits of these at a time.
void compare_places(const Record& r, const Bounds& b) {
  if (b.size == 0) throw Unsupported("nothing to compare");
  const Span span(b.true_extent);
  unsigned char* const origin = shifted(span.base, -b.true_lb);
  constexpr int64_t kCycle = 256;
  std::array<unsigned char, kCycle> cycle;
  std::iota(cycle.begin(), cycle.end(), 0);
  for (int shift = 0; shift == 0 || (b.true_extent - 1) >> shift; shift += 8) {
    for (int64_t at = 0; at < b.true_extent; at += kCycle) {
      const size_t n = static_cast<size_t>(std::min(kCycle, b.true_extent - at));
      shift ? std::memset(span.base + at, static_cast<int>(at >> shift) & 255, n) : std::memcpy(span.base + at, cycle.data(), n);
    }
    Packed ours(static_cast<size_t>(b.size));
    walk_pack(*r.plan.ir, 1, r.plan.extent, reinterpret_cast<const char*>(origin), reinterpret_cast<char*>(ours.data()), 0,
              b.size);
    must_agree(packed_by_library(r, 1, origin, [&] { std::memset(span.base, 0, b.true_extent); }), ours);
  }
}

// Random bytes, none of them zero.
Packed noise_of(int64_t n) {
  constexpr uint64_t low = 0x0101010101010101, high = 0x8080808080808080;
  Packed out(static_cast<size_t>(n + 7) / 8 * 8);
  uint64_t x = 0x9e3779b97f4a7c15ull;
  for (size_t at = 0; at < out.size(); at += 8) {
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    const uint64_t word = x | ((x - low) & ~x & high) >> 7;  // a zero becomes a one
    std::memcpy(&out[at], &word, 8);
  }
  out.resize(static_cast<size_t>(n));
  return out;
}

// `count` elements of random bytes, none of them zero, at the places where the IR has bytes, and zeros elsewhere; the
// buffer lies `odd` bytes beyond a multiple of 64. Packed by the library and by our kernels. A byte from a place of
// another byte agrees by chance once in 254, so a wrong order is seen, and one from outside never agrees.
void compare_noise(const Record& r, const Bounds& b, int64_t count, int64_t odd) {
  if (b.size * count > kMaxNoise) throw Unsupported("too large to compare with the library");
  const int64_t n = b.size * count, reach = (count - 1) * r.plan.extent;
  Packed noise = noise_of(n), ours(static_cast<size_t>(n));
  const Span span(b.true_extent + std::abs(reach) + 2 * kAligned);
  const int64_t before = -b.true_lb - std::min<int64_t>(0, reach);
  unsigned char* origin = shifted(span.base, before + (kAligned - before % kAligned) % kAligned + odd);
  const auto lay = [&] {
    walk_unpack(*r.plan.ir, count, r.plan.extent, reinterpret_cast<const char*>(noise.data()),
                reinterpret_cast<char*>(origin), 0, n);
  };
  lay();
  pack(r.plan, count, reinterpret_cast<const char*>(origin), reinterpret_cast<char*>(ours.data()));
  must_agree(packed_by_library(r, count, origin, [&] {
    std::fill(noise.begin(), noise.end(), 0);
    if (!span.own_bytes) lay();
  }), ours);
}

}  // namespace

// The layout, of a type that is another one moved by a multiple of a cache line that one's: a library meets the same
// addresses there.
static uint64_t shape_of(const Record& r) {
  const Node& ir = *r.plan.ir;
  const bool moved = ir.kind == Kind::Seq && ir.parts.size() == 1;
  uint64_t key = moved ? ir.parts[0].node->hash : ir.hash;
  for (int64_t v : {static_cast<int64_t>(r.combiners), r.plan.extent, static_cast<int64_t>(handle_key(r.leaf)), r.plan.size,
                    moved ? ir.parts[0].off & (kAligned - 1) : 0})
    key = (key ^ static_cast<uint64_t>(v)) * 0x9e3779b97f4a7c15ull;
  return key;
}

// Throws Unsupported where the library packs something else than we do.
static void compare(const Record& r, bool shape_known) {
  const Bounds b = bounds_of(handle_of(r));
  if (shape_known || b.true_extent > kMaxPattern || b.size > kMaxPattern) compare_noise(r, b, 1, 0);
  else compare_places(r, b);
  int64_t reach;
  if (!shape_known && b.size > 0 && b.size * kRow <= kMaxNoise && !__builtin_mul_overflow(kRow, std::abs(r.plan.extent), &reach) &&
      reach <= kMaxRow && b.true_extent <= kMaxRow)
    for (int64_t odd : {0, 1}) compare_noise(r, b, kRow, odd);
}

bool prove(Record& r) {
  const int64_t span = r.plan.ir->hi - r.plan.ir->lo;
  if (mode == Mode::Auto && (span > kMaxPattern || r.plan.size > kMaxPattern) &&
      r.proof_wishes.fetch_add(1, std::memory_order_relaxed) < kNoiseAfter)
    return false;
  // By shape: 1 as the library, 2 not. Of a shape that is known to agree, one element of each layout is compared still.
  static auto* shapes = new std::unordered_map<uint64_t, int>;
  static auto* layouts = new std::unordered_map<uint64_t, int>;
  const uint64_t shape = shape_of(r), layout = (shape ^ r.plan.ir->hash) * 0x9e3779b97f4a7c15ull;
  std::lock_guard<std::mutex> guard(g_lock);
  int& state = (*layouts)[layout];
  if (state == 0 && !r.dead.load()) {
    int& alike = (*shapes)[shape];
    state = 1;
    try {
      compare(r, alike == 1);
    } catch (const std::exception& e) {
      state = 2;
      report_refused(e.what());
    }
    if (alike == 0) alike = state;
  }
  r.proof.store(state, std::memory_order_release);
  if (!this_round.timed()) unmap_large();
  return state == 1;
}

void proofs_end() {
  std::lock_guard<std::mutex> guard(g_lock);
  unmap_large();
}

}  // namespace undertow
