// Runs a plan: adds the call's element count as one more loop, folds what touches, orders the loops, calls kernels.
//
// Loops are merged before they run (a dense inner loop joins the block, two loops that continue each other are one),
// the longest of several short loops goes innermost, and two loops that cross memory order go through the tiled
// transpose. Pack and unpack share everything: a Step holds the user's side and the packed side, and only the kernel
// call knows the direction.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "kernels.hh"
#include "plan.hh"

namespace undertow {
namespace {

constexpr int64_t kTileBytes = 16 << 10;  // half of a small L1 data cache
constexpr int kMaxDims = 24;
constexpr int64_t kShortLoop = 8;

struct Nest {
  Dim dim[kMaxDims];
  int n = 0;
  int64_t len = 0;

  void push(const Dim& d) {
    if (d.n == 1) return;
    if (n > 0) {
      Dim& o = dim[n - 1];  // the loop around the new one
      if (o.ss == d.n * d.ss && o.ds == d.n * d.ds) {
        o = {o.n * d.n, d.ss, d.ds};
        return;
      }
    }
    dim[n++] = d;
  }
  void fold_block() {
    while (n > 0 && dim[n - 1].ss == len && dim[n - 1].ds == len) len *= dim[--n].n;
  }
  void order() {
    if (n < 2 || dim[n - 1].n >= kShortLoop) return;
    int longest = n - 1;
    for (int i = 0; i < n; ++i)
      if (dim[i].n > dim[longest].n) longest = i;
    if (longest != n - 1) std::rotate(dim + longest, dim + longest + 1, dim + n);
  }
  bool crossed() const {
    if (n < 2 || len > 16) return false;
    const Dim &o = dim[n - 2], &i = dim[n - 1];
    return std::llabs(o.ss) < std::llabs(i.ss) && std::llabs(o.ss) <= 64 && o.n >= kShortLoop && i.n >= kShortLoop;
  }
};

template <bool Pack>
void innermost(const Kernels& k, const Nest& nest, char* user, char* packed) {
  const int64_t len = nest.len, slot = len <= kMaxFixed ? len : 0;
  const Dim& d = nest.dim[nest.n - 1];
  if (Pack)
    (d.ds == len ? k.dense : k.strided)[slot](packed, user, d.n, d.ds, d.ss, len);
  else
    k.strided[slot](user, packed, d.n, d.ss, d.ds, len);
}

template <bool Pack>
void table(const Kernels& k, const Op& op, char* user, char* packed) {
  const int64_t n = static_cast<int64_t>(op.offs.size()), slot = op.len <= kMaxFixed ? op.len : 0;
  if (op.len == 0)
    Pack ? k.gather_mixed(packed, user, op.offs.data(), op.lens.data(), n)
         : k.scatter_mixed(user, packed, op.offs.data(), op.lens.data(), n);
  else
    Pack ? k.gather[slot](packed, user, op.offs.data(), n, op.len)
         : k.scatter[slot](user, packed, op.offs.data(), n, op.len);
}

// Calls body(user, packed) for every iteration of the nest's outermost `depth` loops.
template <class Body>
void iterate(const Nest& nest, int depth, char* user, char* packed, Body body) {
  int64_t index[kMaxDims] = {};
  for (;;) {
    body(user, packed);
    int k = depth - 1;
    for (; k >= 0; --k) {
      const Dim& d = nest.dim[k];
      user = shifted(user, d.ss);
      packed += d.ds;
      if (++index[k] < d.n) break;
      user = shifted(user, -d.n * d.ss);
      packed -= d.n * d.ds;
      index[k] = 0;
    }
    if (k < 0) return;
  }
}

template <bool Pack>
void run_op(const Kernels& k, const Op& op, const Dim& a, const Dim& b, char* user, char* packed) {
  user = shifted(user, op.soff);
  packed += op.doff;
  Nest nest;
  nest.push(a);
  nest.push(b);
  for (const Dim& d : op.dims) nest.push(d);
  if (!op.offs.empty())
    return iterate(nest, nest.n, user, packed, [&](char* u, char* p) { table<Pack>(k, op, u, p); });
  nest.len = op.len;
  nest.fold_block();
  if (nest.n == 0) {
    Pack ? std::memcpy(packed, user, nest.len) : std::memcpy(user, packed, nest.len);
    return;
  }
  if (nest.crossed()) {
    const Dim &o = nest.dim[nest.n - 2], &i = nest.dim[nest.n - 1];
    return iterate(nest, nest.n - 2, user, packed, [&](char* u, char* p) {
      Pack ? k.transpose(p, u, o.n, i.n, o.ss, i.ss, o.ds, i.ds, nest.len)
           : k.transpose(u, p, i.n, o.n, i.ds, o.ds, i.ss, o.ss, nest.len);
    });
  }
  nest.order();
  iterate(nest, nest.n - 1, user, packed, [&](char* u, char* p) { innermost<Pack>(k, nest, u, p); });
}

template <bool Pack>
void run(const Plan& plan, int64_t count, char* user, char* packed) {
  if (plan.size == 0 || count <= 0) return;
  const Kernels& k = kernels();
  Dim elements{count, plan.extent, plan.size}, outer = plan.outer;
  if (plan.ops.size() == 1) return run_op<Pack>(k, plan.ops[0], elements, outer, user, packed);
  if (outer.n == 1) {
    outer = elements;
    elements.n = 1;
  } else if (elements.ss == outer.n * outer.ss) {
    outer.n *= elements.n;
    elements.n = 1;
  }
  const int64_t tile = std::max<int64_t>(1, kTileBytes / std::max<int64_t>(1, outer.ds));
  for (int64_t e = 0; e < elements.n; ++e)
    for (int64_t i = 0; i < outer.n; i += tile) {
      const Dim part{std::min(tile, outer.n - i), outer.ss, outer.ds}, none{1, 0, 0};
      char* u = shifted(user, e * elements.ss + i * outer.ss);
      char* p = packed + e * elements.ds + i * outer.ds;
      for (const Op& op : plan.ops) run_op<Pack>(k, op, none, part, u, p);
    }
}

const Kernels& choose() {
  const char* wish = std::getenv("UNDERTOW_MPI_ISA");
  auto allowed = [wish](const char* name) { return !wish || !*wish || std::strcmp(wish, name) == 0; };
  __builtin_cpu_init();
#if defined(UNDERTOW_HAVE_AVX512)
  if (allowed("avx512") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw"))
    return kKernelsAvx512;
#endif
#if defined(UNDERTOW_HAVE_AVX2)
  if ((allowed("avx2") || allowed("avx512")) && __builtin_cpu_supports("avx2")) return kKernelsAvx2;
#endif
  return kKernelsGeneric;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

void pack(const Plan& plan, int64_t count, const char* src, char* dst) {
  run<true>(plan, count, const_cast<char*>(src), dst);
}

void unpack(const Plan& plan, int64_t count, const char* src, char* dst) {
  run<false>(plan, count, dst, const_cast<char*>(src));
}

}  // namespace undertow
