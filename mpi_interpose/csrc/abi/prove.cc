// Whether the library packs a type's bytes as its IR says, asked once before the first use of each layout: a small type
// by a pattern that names every byte's place, a large one by random bytes; then several elements in a row by random bytes,
// at an even address and at an odd one, because a library may choose its loops by count and alignment (Open MPI 5's wrong
// ones need a buffer on a multiple of 8). A type that fails is passed through for good.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "decode.hh"
#include "report.hh"

namespace undertow {
namespace {

constexpr int64_t kMaxNoise = 1 << 28;    // packed bytes of larger types, which are compared by one pack of random bytes
constexpr int64_t kRow = 3;               // elements in a row
constexpr int64_t kAligned = 64;
constexpr int64_t kMaxRow = 1ll << 36;    // address space for them; elements further apart are compared one by one
constexpr uint32_t kNoiseAfter = 2;       // and not before their third use: a type used once is not worth it

void expand(const Node& n, int64_t off, std::vector<int64_t>& out) {
  if (n.size == 0) return;
  switch (n.kind) {
    case Kind::Bytes:
      for (int64_t i = 0; i < n.size; ++i) out.push_back(off + i);
      return;
    case Kind::Loop:
      for (int64_t i = 0; i < n.count; ++i) expand(*n.child, off + i * n.stride, out);
      return;
    case Kind::Seq:
      for (const Part& p : n.parts) expand(*p.node, off + p.off, out);
      return;
    case Kind::Runs:
      for (size_t r = 0; r < n.offs.size(); ++r)
        for (int64_t i = 0; i < n.run_len(r); ++i) out.push_back(off + n.offs[r] + i);
  }
}

// Address space without memory until it is touched, because a type may reach over many GiB and touch little of them.
struct Span {
  unsigned char* base;
  size_t bytes;
  explicit Span(int64_t n) : bytes(static_cast<size_t>(n)) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw Unsupported("too far apart to compare with the library");
    madvise(p, bytes, MADV_NOHUGEPAGE);
    base = static_cast<unsigned char*>(p);
  }
  ~Span() { munmap(base, bytes); }
  Span(const Span&) = delete;
  Span& operator=(const Span&) = delete;
};

// `count` elements of random bytes, none of them zero, at the places where the IR has bytes, and zeros elsewhere; the
// buffer lies `odd` bytes beyond a multiple of 64. Packed by the library and by our kernels. A byte from a place of
// another byte agrees by chance once in 255, so a wrong order is seen, and one from outside never agrees.
void compare_noise(const Record& r, const Bounds& b, int64_t count, int64_t odd) {
  if (b.size * count > kMaxNoise) throw Unsupported("too large to compare with the library");
  const int64_t n = b.size * count, reach = (count - 1) * r.plan.extent;
  std::vector<unsigned char> noise(n), theirs(n), ours(n);
  uint64_t x = 0x9e3779b97f4a7c15ull;
  for (unsigned char& v : noise) {
    x ^= x << 13, x ^= x >> 7, x ^= x << 17;
    v = static_cast<unsigned char>(1 + (x >> 32) % 255);
  }
  const Span span(b.true_extent + std::abs(reach) + 2 * kAligned);
  const int64_t before = -b.true_lb - std::min<int64_t>(0, reach);
  unsigned char* origin = shifted(span.base, before + (kAligned - before % kAligned) % kAligned + odd);
  walk_unpack(*r.plan.ir, count, r.plan.extent, reinterpret_cast<const char*>(noise.data()),
              reinterpret_cast<char*>(origin), 0, n);
  int position = 0;
  must(own.Pack(origin, static_cast<int>(count), handle_of(r), theirs.data(), static_cast<int>(n), &position,
                constants.self), "Pack");
  pack(r.plan, count, reinterpret_cast<const char*>(origin), reinterpret_cast<char*>(ours.data()));
  if (position != n || theirs != ours) throw Unsupported("the library packs other bytes than the type's");
}

}  // namespace

bool prove(Record& r) {
  const int64_t span = r.plan.ir->hi - r.plan.ir->lo;
  if (mode == Mode::Auto && (span > kMaxPattern || r.plan.size > kMaxPattern) &&
      r.proof_wishes.fetch_add(1, std::memory_order_relaxed) < kNoiseAfter)
    return false;
  static std::mutex lock;
  static auto* known = new std::unordered_map<uint64_t, int>;
  uint64_t key = r.plan.ir->hash;
  for (uint64_t v : {static_cast<uint64_t>(r.combiners), static_cast<uint64_t>(r.plan.extent),
                     static_cast<uint64_t>(handle_key(r.leaf)), static_cast<uint64_t>(r.plan.size)})
    key = (key ^ v) * 0x9e3779b97f4a7c15ull;
  std::lock_guard<std::mutex> guard(lock);
  int& state = (*known)[key];
  if (state == 0 && !r.dead.load()) {
    state = 1;
    try {
      const Bounds b = bounds_of(handle_of(r));
      if (b.true_extent > kMaxPattern || b.size > kMaxPattern) {
        compare_noise(r, b, 1, 0);
      } else {
        std::vector<int64_t> order;
        expand(*r.plan.ir, 0, order);
        if (order != library_order(handle_of(r), b)) throw Unsupported("the library packs other bytes than the type's");
      }
      int64_t reach;
      if (b.size > 0 && b.size * kRow <= kMaxNoise && !__builtin_mul_overflow(kRow, std::abs(r.plan.extent), &reach) &&
          reach <= kMaxRow && b.true_extent <= kMaxRow)
        for (int64_t odd : {0, 1}) compare_noise(r, b, kRow, odd);
    } catch (const std::exception& e) {
      state = 2;
      report_refused(e.what());
    }
  }
  r.proof.store(state, std::memory_order_release);
  return state == 1;
}

}  // namespace undertow
