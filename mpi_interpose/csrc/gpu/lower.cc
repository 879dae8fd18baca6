// See lower.hh.
#include "lower.hh"

#include <algorithm>

namespace undertow::gpu {

std::optional<Choice> forced_kernel;

namespace {

constexpr int kMaxNest = 24;
constexpr uint32_t kWideTilesFrom = 1u << 18;  // 16-byte words cross through tiles from 4 MiB on; below, the cache does
constexpr uint32_t kWave = 1u << 19;  // about what a large device holds at several words per thread; below, one each

// Loops outermost first; loops that continue each other are one.
struct Nest {
  Dim dim[kMaxNest];
  int n = 0;
  void push(const Dim& d) {
    if (d.n == 1) return;
    if (n > 0 && dim[n - 1].ss == d.n * d.ss && dim[n - 1].ds == d.n * d.ds) {
      dim[n - 1] = {dim[n - 1].n * d.n, d.ss, d.ds};
      return;
    }
    if (n == kMaxNest) throw Unsupported("nested too deeply for the device");
    dim[n++] = d;
  }
  int64_t fold(int64_t len) {
    while (n > 0 && dim[n - 1].ss == len && dim[n - 1].ds == len) len *= dim[--n].n;
    return len;
  }
};

int64_t lowest_bit(uint64_t v) { return v ? static_cast<int64_t>(std::min<uint64_t>(v & -v, 16)) : 16; }

uint8_t log_of(int64_t word) { return static_cast<uint8_t>(__builtin_ctzll(static_cast<uint64_t>(word))); }

uint64_t steps(const Nest& nest) {
  uint64_t all = 0;
  for (int i = 0; i < nest.n; ++i) all |= static_cast<uint64_t>(nest.dim[i].ss) | static_cast<uint64_t>(nest.dim[i].ds);
  return all;
}

struct Maker {
  std::vector<Piece>& out;

  // Cuts the outermost loops off until the rest fits a piece's loops and word numbers.
  void cut(Piece p, const Nest& nest, int first, int64_t block_words) {
    const int depth = nest.n - first;
    int64_t words = block_words;
    bool fits = depth <= kPieceDims;
    for (int i = first; i < nest.n && fits; ++i) fits = !__builtin_mul_overflow(words, nest.dim[i].n, &words) && words <= kMaxWords;
    if (fits && block_words <= kMaxWords) return make(p, nest, first, block_words, words);
    if (depth == 0) return slice(p, block_words);
    if (p.kind == kTable && depth == 1) throw Unsupported("a table of more than 2^30 words for the device");
    const Dim& d = nest.dim[first];
    int64_t inner = block_words;
    bool small = depth <= kPieceDims;
    for (int i = first + 1; i < nest.n && small; ++i) small = !__builtin_mul_overflow(inner, nest.dim[i].n, &inner) && inner <= kMaxWords;
    const int64_t chunk = small ? std::max<int64_t>(1, kMaxWords / inner) : 1;
    for (int64_t i = 0; i < d.n; i += chunk) {
      if (out.size() > static_cast<size_t>(kMaxBlocks)) throw Unsupported("too many parts for the device");
      Piece part = p;
      part.user += static_cast<uint64_t>(i * d.ss);
      part.packed += static_cast<uint64_t>(i * d.ds);
      Nest rest = nest;
      rest.dim[first].n = std::min(chunk, d.n - i);
      if (chunk == 1) cut(part, rest, first + 1, block_words);
      else cut(part, rest, first, block_words);
    }
  }

  void slice(Piece p, int64_t words) {
    const Nest none{};
    for (int64_t at = 0; at < words; at += kMaxWords) {
      Piece part = p;
      part.user += static_cast<uint64_t>(at << p.word_log2);
      part.packed += static_cast<uint64_t>(at << p.word_log2);
      const int64_t n = std::min<int64_t>(kMaxWords, words - at);
      make(part, none, 0, n, n);
    }
  }

  void make(Piece p, const Nest& nest, int first, int64_t block_words, int64_t words) {
    p.words = static_cast<uint32_t>(words);
    p.block = static_cast<uint32_t>(block_words);
    divisor(p.block, p.block_magic, p.block_shift);
    p.ndims = static_cast<uint8_t>(nest.n - first);
    int64_t dense = block_words << p.word_log2;
    p.dense = 1;
    for (int i = nest.n - 1; i >= first; --i) {
      const Dim& d = nest.dim[i];
      PieceDim& out_dim = p.dims[i - first];
      out_dim.n = static_cast<uint32_t>(d.n);
      divisor(out_dim.n, out_dim.magic, out_dim.shift);
      out_dim.spare = 0;
      out_dim.user = d.ss;
      out_dim.packed = d.ds;
      p.dense = p.dense && d.ds == dense;
      dense *= d.n;
    }
    if (p.kind == kNest && crossed(p)) p.kind = kCrossed;
    p.unroll = words_per_thread(p);
    out.push_back(p);
  }

  static bool crossed(const Piece& p) {
    return crosses(p) && (p.word_log2 <= 3 || p.words >= kWideTilesFrom);
  }
};

void collect(const Node& n, int64_t off, Blocks& out) {
  if (n.size == 0) return;
  auto block = [&out](int64_t at, int64_t len) {
    if (len == 0) return;
    if (!out.offs.empty() && out.offs.back() + out.lens.back() == at) {
      out.lens.back() += len;
      return;
    }
    if (static_cast<int64_t>(out.offs.size()) >= kMaxBlocks) throw Unsupported("too many blocks for the device");
    out.offs.push_back(at);
    out.lens.push_back(len);
  };
  switch (n.kind) {
    case Kind::Bytes:
      block(off, n.size);
      break;
    case Kind::Loop:
      for (int64_t i = 0; i < n.count; ++i) collect(*n.child, off + i * n.stride, out);
      break;
    case Kind::Seq:
      for (const Part& p : n.parts) collect(*p.node, off + p.off, out);
      break;
    case Kind::Runs:
      for (size_t i = 0; i < n.offs.size(); ++i) block(off + n.offs[i], n.run_len(i));
      break;
  }
}

Piece blank(uint64_t user, uint64_t packed) {
  Piece p{};
  p.user = user;
  p.packed = packed;
  return p;
}

// All blocks of one element as one table, the elements as a loop around it.
void lower_whole(Maker& maker, const Plan& plan, int64_t count, uint64_t user, uint64_t packed, const Tables& tables) {
  const Blocks blocks = blocks_of(*plan.ir);
  Nest nest;
  nest.push({count, plan.extent, plan.size});
  const int64_t word = std::min(blocks.grain, lowest_bit(user | packed | steps(nest)));
  if (plan.size / word > kMaxWords) throw Unsupported("one element is too large for the device");
  const Table table = tables.whole(blocks, word);
  Piece p = blank(user, packed);
  p.kind = kMixed;
  p.word_log2 = log_of(word);
  p.offs = table.offs;
  p.starts = table.starts;
  p.hints = table.hints;
  p.runs = table.runs;
  maker.cut(p, nest, 0, plan.size / word);
}

}  // namespace

uint8_t words_per_thread(const Piece& p) {
  return p.dense && (p.kind == kNest || p.kind == kTable) && p.words >= kWave ? kUnroll : 1;
}

Blocks blocks_of(const Node& ir) {
  Blocks blocks;
  collect(ir, 0, blocks);
  uint64_t all = 0;
  for (size_t i = 0; i < blocks.offs.size(); ++i)
    all |= static_cast<uint64_t>(blocks.offs[i]) | static_cast<uint64_t>(blocks.lens[i]);
  blocks.grain = lowest_bit(all);
  return blocks;
}

void number_words(const Blocks& blocks, int64_t word, std::vector<uint32_t>& starts, std::vector<uint32_t>& hints) {
  int64_t at = 0;
  starts.clear();
  hints.clear();
  for (size_t i = 0; i < blocks.offs.size(); ++i) {
    starts.push_back(static_cast<uint32_t>(at));
    const int64_t end = at + blocks.lens[i] / word;
    while (static_cast<int64_t>(hints.size()) << kHintShift < end) hints.push_back(static_cast<uint32_t>(i));
    at = end;
  }
  hints.push_back(static_cast<uint32_t>(blocks.offs.size() - 1));
}

bool contiguous(const Plan& plan, int64_t count, int64_t* off) {
  if (plan.ops.size() != 1 || !plan.ops[0].offs.empty()) return false;
  const Op& op = plan.ops[0];
  Nest nest;
  nest.push({count, plan.extent, plan.size});
  nest.push(plan.outer);
  for (const Dim& d : op.dims) nest.push(d);
  nest.fold(op.len);
  *off = op.soff;
  return nest.n == 0;
}

std::vector<Piece> lower(const Plan& plan, int64_t count, uint64_t user, uint64_t packed, const Tables& tables) {
  std::vector<Piece> pieces;
  Maker maker{pieces};
  if (plan.size == 0 || count <= 0) return pieces;
  bool mixed = plan.ops.size() > kMaxPieces;
  for (const Op& op : plan.ops) mixed = mixed || (!op.offs.empty() && op.len == 0);
  if (mixed) {
    lower_whole(maker, plan, count, user, packed, tables);
  } else {
    for (size_t k = 0; k < plan.ops.size(); ++k) {
      const Op& op = plan.ops[k];
      Nest nest;
      nest.push({count, plan.extent, plan.size});
      nest.push(plan.outer);
      for (const Dim& d : op.dims) nest.push(d);
      Piece p = blank(user + static_cast<uint64_t>(op.soff), packed + static_cast<uint64_t>(op.doff));
      int64_t len = op.len, grain = 16;
      if (op.offs.empty()) {
        len = nest.fold(len);
      } else {
        const Table table = tables.of_op(k);
        grain = table.grain;
        p.kind = kTable;
        p.offs = table.offs;
        // Pushed past `push`: a table is no loop with a step on the user's side.
        if (nest.n == kMaxNest) throw Unsupported("nested too deeply for the device");
        nest.dim[nest.n++] = {static_cast<int64_t>(op.offs.size()), 0, op.len};
      }
      const int64_t word = std::min(grain, lowest_bit(p.user | p.packed | static_cast<uint64_t>(len) | steps(nest)));
      p.word_log2 = log_of(word);
      maker.cut(p, nest, 0, len / word);
    }
  }
  return pieces;
}

}  // namespace undertow::gpu
