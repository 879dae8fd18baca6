// A datatype back to its constructor calls, and from these to IR: all combiners of MPI 3.1 to 5.0.
//
// Extents and bounds come from the library (they carry every resize and every rule about padding); the order of bytes
// comes from the constructor. At the end size and true bounds of the IR must equal the library's; anything else is passed
// through. What the library makes of the bytes themselves is asked before a type's first use (prove.cc).
#include <algorithm>
#include <vector>

#include "contents.hh"
#include "decode.hh"

namespace undertow {
namespace {

constexpr int kMaxDepth = 64;

struct Decoder {
  uint32_t combiners = 0;
  bool first_leaf = true, mixed = false;
  MPI_Datatype leaf = constants.byte;
  int64_t leaf_size = 1;

  void saw(MPI_Datatype type, const Bounds& b) {
    if (b.size != b.extent) {
      mixed = true;
    } else if (first_leaf) {
      leaf = type;
      leaf_size = b.size;
    } else if (handle_key(leaf) != handle_key(type)) {
      mixed = true;
    }
    first_leaf = false;
  }

  Ref predefined(MPI_Datatype type, const Bounds& b) {
    if (b.size == 0) return bytes(0);
    saw(type, b);
    if (b.size == b.extent && b.true_lb == 0 && b.true_extent == b.size) return bytes(b.size);
    combiners |= 1u << kPair;  // a pair with padding: ask the library where its bytes are
    const std::vector<int64_t> where = library_order(type, b);
    std::vector<int64_t> offs, lens;
    for (int64_t w : where) {
      if (!offs.empty() && offs.back() + lens.back() == w)
        ++lens.back();
      else
        offs.push_back(w), lens.push_back(1);
    }
    return runs(std::move(offs), std::move(lens));
  }

  // Blocks of `blocklength(k)` elements at byte offset `displacement(k)`.
  template <class Length, class Displacement>
  Ref blocks(int64_t n, int64_t extent, const Ref& child, Length length, Displacement displacement) {
    if (child->kind == Kind::Bytes && child->size == extent) {
      std::vector<int64_t> offs(n), lens(n);
      for (int64_t k = 0; k < n; ++k) offs[k] = displacement(k), lens[k] = mul(length(k), extent);
      return runs(std::move(offs), std::move(lens));
    }
    std::vector<Part> parts;
    parts.reserve(n);
    for (int64_t k = 0; k < n; ++k)
      if (length(k) > 0) parts.push_back({displacement(k), loop(length(k), extent, child)});
    return seq(std::move(parts));
  }

  Ref type(MPI_Datatype handle, int depth) {
    if (depth > kMaxDepth) throw Unsupported("nested too deeply");
    const Bounds b = bounds_of(handle);
    const Contents k(handle);
    combiners |= 1u << k.name;
    if (Envelope(handle).predefined()) return predefined(handle, b);
    if (k.name == kStruct) return structure(k, depth);
    const Ref child = normalise(type(k.types.at(0), depth + 1));
    const int64_t e = bounds_of(k.types.at(0)).extent;
    const bool big = k.large();
    switch (k.name) {
      case kDup:
      case kResized:
        return child;
      case kContiguous:
        return loop(big ? k.c(0) : k.i(0), e, child);
      case kVector: {
        const int64_t n = big ? k.c(0) : k.i(0), len = big ? k.c(1) : k.i(1), step = big ? k.c(2) : k.i(2);
        return loop(n, mul(step, e), loop(len, e, child));
      }
      case kHvector: {
        const int64_t n = big ? k.c(0) : k.i(0), len = big ? k.c(1) : k.i(1), step = big ? k.c(2) : k.a(0);
        return loop(n, step, loop(len, e, child));
      }
      case kIndexed: {
        const int64_t n = big ? k.c(0) : k.i(0);
        return blocks(n, e, child, [&](int64_t j) { return big ? k.c(1 + j) : k.i(1 + j); },
                      [&](int64_t j) { return mul(big ? k.c(1 + n + j) : k.i(1 + n + j), e); });
      }
      case kHindexed: {
        const int64_t n = big ? k.c(0) : k.i(0);
        return blocks(n, e, child, [&](int64_t j) { return big ? k.c(1 + j) : k.i(1 + j); },
                      [&](int64_t j) { return big ? k.c(1 + n + j) : k.a(j); });
      }
      case kIndexedBlock: {
        const int64_t n = big ? k.c(0) : k.i(0), len = big ? k.c(1) : k.i(1);
        return blocks(n, e, child, [&](int64_t) { return len; },
                      [&](int64_t j) { return mul(big ? k.c(2 + j) : k.i(2 + j), e); });
      }
      case kHindexedBlock: {
        const int64_t n = big ? k.c(0) : k.i(0), len = big ? k.c(1) : k.i(1);
        return blocks(n, e, child, [&](int64_t) { return len; },
                      [&](int64_t j) { return big ? k.c(2 + j) : k.a(j); });
      }
      case kSubarray:
        return subarray(k, e, child);
      case kDarray:
        return darray(k, e, child);
      default:
        throw Unsupported("unknown combiner");
    }
  }

  Ref structure(const Contents& k, int depth) {
    const bool big = k.large();
    const int64_t n = big ? k.c(0) : k.i(0);
    std::vector<Part> parts;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t len = big ? k.c(1 + j) : k.i(1 + j), off = big ? k.c(1 + n + j) : k.a(j);
      if (len == 0) continue;
      const Ref child = normalise(type(k.types.at(j), depth + 1));
      parts.push_back({off, loop(len, bounds_of(k.types.at(j)).extent, child)});
    }
    return seq(std::move(parts));
  }

  Ref subarray(const Contents& k, int64_t e, const Ref& child) {
    const bool big = k.large();
    const int64_t n = k.i(0);
    const bool c_order = (big ? k.i(1) : k.i(1 + 3 * n)) == MPI_ORDER_C;
    auto at3 = [&](int64_t row, int64_t d) { return big ? k.c(row * n + d) : k.i(1 + row * n + d); };
    Ref node = child;
    int64_t step = e, start = 0;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t d = c_order ? n - 1 - j : j;  // the fastest dimension first
      node = loop(at3(1, d), step, node);
      start = add(start, mul(at3(2, d), step));
      step = mul(step, at3(0, d));
    }
    return at(start, node);
  }

  Ref darray(const Contents& k, int64_t e, const Ref& child) {
    const bool big = k.large();
    int64_t size = k.i(0), rank = k.i(1);
    const int64_t n = k.i(2);
    const size_t distribs = big ? 3 : 3 + n;
    auto gsize = [&](int64_t d) { return big ? k.c(d) : k.i(3 + d); };
    const bool c_order = k.i(distribs + 3 * n) == MPI_ORDER_C;
    std::vector<int64_t> coordinate(n);
    for (int64_t d = 0; d < n; ++d) {  // the process grid is row-major for both storage orders
      size /= k.i(distribs + 2 * n + d);
      coordinate[d] = rank / size;
      rank %= size;
    }
    Ref node = child;
    int64_t step = e;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t d = c_order ? n - 1 - j : j, g = gsize(d), p = k.i(distribs + 2 * n + d), r = coordinate[d];
      const int64_t kind = k.i(distribs + d);
      int64_t arg = k.i(distribs + n + d);
      if (kind == MPI_DISTRIBUTE_NONE) {
        node = loop(g, step, node);
      } else if (kind == MPI_DISTRIBUTE_BLOCK) {
        if (arg == MPI_DISTRIBUTE_DFLT_DARG) arg = (g + p - 1) / p;
        const int64_t first = std::min(g, mul(r, arg)), last = std::min(g, add(first, arg));
        node = at(mul(first, step), loop(last - first, step, node));
      } else {
        if (arg == MPI_DISTRIBUTE_DFLT_DARG) arg = 1;
        const int64_t first = mul(r, arg), period = mul(p, arg);
        const int64_t rest = std::max<int64_t>(0, g - first), full = rest / period, tail = std::min(arg, rest % period);
        node = seq({Part{mul(first, step), loop(full, mul(period, step), loop(arg, step, node))},
                    Part{mul(add(first, mul(full, period)), step), loop(tail, step, node)}});
      }
      step = mul(step, g);
    }
    return node;
  }
};

}  // namespace

void must(int rc, const char* what) {
  if (rc != MPI_SUCCESS) throw Unsupported(std::string(what) + " failed");
}

Bounds bounds_of(MPI_Datatype type) {
  MPI_Count size = 0, lb = 0, extent = 0, true_lb = 0, true_extent = 0;
  must(own.Type_size_x(type, &size), "Type_size_x");
  must(own.Type_get_extent_x(type, &lb, &extent), "Type_get_extent_x");
  must(own.Type_get_true_extent_x(type, &true_lb, &true_extent), "Type_get_true_extent_x");
  if (size < 0) throw Unsupported("size is undefined");
  return {size, lb, extent, true_lb, true_extent};
}

// Packs one element of a byte pattern with the library; the positions of its bytes in the buffer, in packed order.
std::vector<int64_t> library_order(MPI_Datatype type, const Bounds& b) {
  if (b.true_extent > kMaxPattern || b.size > kMaxPattern || b.size == 0) throw Unsupported("too large to compare");
  std::vector<int64_t> where(b.size, 0);
  std::vector<unsigned char> buffer(b.true_extent + 2 * kStray), packed(b.size);
  unsigned char* const first = buffer.data() + kStray;
  for (int shift = 0; shift < 24; shift += 8) {
    for (int64_t i = 0; i < b.true_extent; ++i) first[i] = static_cast<unsigned char>(i >> shift);
    int position = 0;
    must(own.Pack(shifted(first, -b.true_lb), 1, type, packed.data(), static_cast<int>(b.size), &position,
                  constants.self),
         "Pack");
    if (position != b.size) throw Unsupported("the library packs another number of bytes");
    for (int64_t i = 0; i < b.size; ++i) where[i] |= static_cast<int64_t>(packed[i]) << shift;
  }
  for (int64_t& w : where) w += b.true_lb;
  return where;
}

Decoded decode(MPI_Datatype type) {
  Decoder d;
  Decoded out;
  const Bounds b = bounds_of(type);
  out.ir = normalise(d.type(type, 0));
  if (out.ir->size != b.size) throw Unsupported("size differs from the library's");
  if (b.size > 0 && (out.ir->lo != b.true_lb || out.ir->hi != add(b.true_lb, b.true_extent)))
    throw Unsupported("true bounds differ from the library's");
  out.lb = b.lb;
  out.extent = b.extent;
  out.combiners = d.combiners;
  out.mixed = d.mixed;
  out.leaf = d.mixed || d.first_leaf ? constants.byte : d.leaf;
  out.leaf_size = d.mixed || d.first_leaf ? 1 : d.leaf_size;
  return out;
}

}  // namespace undertow
