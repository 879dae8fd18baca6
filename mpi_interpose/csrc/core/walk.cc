// Pack and unpack by walking the tree: the reference that the kernels are compared with, and the path for segments
// (a receive that brought fewer bytes than the type asks for). Whole subtrees outside the segment are skipped by
// arithmetic, so a short segment of a large type is cheap.
#include <algorithm>
#include <cstring>

#include "ir.hh"

namespace undertow {
namespace {

// `leaf(off, n, pos)` is called for each byte range in order: n bytes at type offset `off`, at stream position `pos`.
template <class Leaf>
void walk(const Node& n, int64_t off, int64_t pos, int64_t from, int64_t to, Leaf& leaf) {
  if (n.size == 0 || pos + n.size <= from || pos >= to) return;
  switch (n.kind) {
    case Kind::Bytes: {
      const int64_t skip = std::max<int64_t>(0, from - pos), stop = std::min(n.size, to - pos);
      leaf(off + skip, stop - skip, pos + skip);
      return;
    }
    case Kind::Loop: {
      const int64_t one = n.child->size;
      const int64_t first = std::max<int64_t>(0, (from - pos) / one);
      const int64_t last = std::min(n.count, (std::min(to - pos, n.size) + one - 1) / one);
      for (int64_t i = first; i < last; ++i) walk(*n.child, off + i * n.stride, pos + i * one, from, to, leaf);
      return;
    }
    case Kind::Seq:
      for (const Part& p : n.parts) {
        walk(*p.node, off + p.off, pos, from, to, leaf);
        pos += p.node->size;
      }
      return;
    case Kind::Runs:
      for (size_t i = 0; i < n.offs.size() && pos < to; ++i) {
        const int64_t len = n.run_len(i), skip = std::max<int64_t>(0, from - pos), stop = std::min(len, to - pos);
        if (skip < stop) leaf(off + n.offs[i] + skip, stop - skip, pos + skip);
        pos += len;
      }
      return;
  }
}

template <class Leaf>
void walk_elements(const Node& n, int64_t count, int64_t extent, int64_t from, int64_t to, Leaf leaf) {
  if (n.size == 0 || count <= 0) return;
  to = std::min(to, mul(count, n.size));
  if (from >= to) return;
  for (int64_t i = from / n.size; i * n.size < to; ++i) walk(n, i * extent, i * n.size, from, to, leaf);
}

}  // namespace

void walk_pack(const Node& n, int64_t count, int64_t extent, const char* src, char* dst, int64_t from, int64_t to) {
  walk_elements(n, count, extent, from, to,
                [=](int64_t off, int64_t len, int64_t pos) { std::memcpy(dst + (pos - from), shifted(src, off), len); });
}

void walk_unpack(const Node& n, int64_t count, int64_t extent, const char* src, char* dst, int64_t from, int64_t to) {
  walk_elements(n, count, extent, from, to,
                [=](int64_t off, int64_t len, int64_t pos) { std::memcpy(shifted(dst, off), src + (pos - from), len); });
}

}  // namespace undertow
