// The intermediate representation of a datatype: which bytes, in which order, and nothing about MPI.
//
// A type map is an ordered list of byte ranges relative to the buffer's address. Four node kinds write it down without
// expanding it: Bytes (n bytes from here), Loop (a child repeated with a byte stride), Seq (children at byte offsets)
// and Runs (a table of byte ranges). Order is part of the meaning: the packed stream is the nodes read left to right,
// so no pass may sort, and overlapping or negative strides are legal. Nodes are immutable and shared. All numbers are
// int64 and every sum or product that could leave that range throws Unsupported, which callers turn into pass-through.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace undertow {

struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline int64_t add(int64_t a, int64_t b) {
  int64_t r;
  if (__builtin_add_overflow(a, b, &r)) throw Unsupported("offset overflow");
  return r;
}

// Offsets of bytes lie within this, further than memory reaches, so that their differences and negatives are numbers.
constexpr int64_t kReach = int64_t{1} << 60;

inline int64_t reachable(int64_t off) {
  if (off < -kReach || off > kReach) throw Unsupported("reaches further than memory");
  return off;
}

inline int64_t mul(int64_t a, int64_t b) {
  int64_t r;
  if (__builtin_mul_overflow(a, b, &r)) throw Unsupported("size overflow");
  return r;
}

// p + n for a `p` that need not point into the bytes: MPI_BOTTOM is null and its types hold addresses; an origin may lie
// far outside its type.
template <class T>
T* shifted(T* p, int64_t n) {
  static_assert(sizeof(T) == 1, "bytes");
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(n));
}

enum class Kind : uint8_t { Bytes, Loop, Seq, Runs };

struct Node;
using Ref = std::shared_ptr<const Node>;

struct Part {
  int64_t off;
  Ref node;
};

struct Node {
  Kind kind = Kind::Bytes;
  int64_t size = 0;           // packed bytes
  int64_t lo = 0, hi = 0;     // the touched bytes lie in [lo, hi) of the origin; 0, 0 when size is 0
  int64_t pieces = 0;         // contiguous byte ranges, before any merging
  uint64_t hash = 0;          // structural
  int64_t count = 0;          // Loop
  int64_t stride = 0;         // Loop, bytes
  Ref child;                  // Loop
  std::vector<Part> parts;    // Seq
  std::vector<int64_t> offs;  // Runs
  std::vector<int64_t> lens;  // Runs; empty when all ranges have length `len`
  int64_t len = 0;            // Runs
  int64_t run_len(size_t i) const { return lens.empty() ? len : lens[i]; }
};

// Constructors keep the structure as given (the passes simplify); zero counts and zero lengths are legal.
Ref bytes(int64_t n);
Ref loop(int64_t count, int64_t stride, Ref child);
Ref seq(std::vector<Part> parts);
Ref runs(std::vector<int64_t> offs, std::vector<int64_t> lens);
Ref at(int64_t off, Ref node);  // `node` moved by `off` bytes

bool equal(const Ref& a, const Ref& b);

// Text form, e.g. "(loop 3 16 (bytes 4))", "(seq 0 (bytes 4) 8 (bytes 2))", "(runs 0 4 8 4)"; parse(text(n)) equals n.
// `limit` > 0 shortens long tables for people (and then does not parse back).
std::string text(const Ref& node, size_t limit = 0);
Ref parse(const std::string& text);

// passes.cc: the canonical form. Same bytes in the same order, fewer and larger nodes.
Ref normalise(const Ref& node);

// walk.cc: the definition of pack and unpack, slow and obviously right, for any segment [from, to) of the packed
// stream of `count` elements spaced `extent` bytes apart. Also used for short receives.
void walk_pack(const Node& node, int64_t count, int64_t extent, const char* src, char* dst, int64_t from, int64_t to);
void walk_unpack(const Node& node, int64_t count, int64_t extent, const char* src, char* dst, int64_t from, int64_t to);

}  // namespace undertow
