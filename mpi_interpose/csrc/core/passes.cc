// The canonical form of an IR: fold, flatten, merge, hoist. Every rule keeps each byte in its place in the packed
// stream; none sorts. (TEMPI's stream_swap sorts strides, which sends wrong data when the receiver's type differs.)
//
// Rules, bottom up: drop what is empty; a loop of one is its child; a loop over bytes that touch is bytes; nested loops
// whose strides continue each other are one loop; an offset moves outward; neighbouring byte ranges merge; ranges of
// one length and one step are a loop; equal children with one step are a loop.
#include "ir.hh"

namespace undertow {
namespace {

Ref moved(int64_t off, const Ref& node) {
  if (off == 0 || node->kind != Kind::Seq) return at(off, node);
  std::vector<Part> parts = node->parts;
  for (Part& p : parts) p.off = add(p.off, off);
  if (parts.size() == 1) return at(parts[0].off, parts[0].node);
  return seq(std::move(parts));
}

Ref make_loop(int64_t count, int64_t stride, const Ref& child) {
  if (count == 0 || child->size == 0) return bytes(0);
  if (count == 1) return child;
  if (child->kind == Kind::Seq && child->parts.size() == 1)
    return moved(child->parts[0].off, make_loop(count, stride, child->parts[0].node));
  if (child->kind == Kind::Bytes && stride == child->size) return bytes(mul(count, stride));
  if (child->kind == Kind::Loop && stride == mul(child->count, child->stride))
    return make_loop(mul(count, child->count), child->stride, child->child);
  return loop(count, stride, child);
}

// A table whose ranges all have one length runs through an unrolled kernel; merging a few neighbours would only make
// its lengths differ. So neighbours merge when that leaves one length, or at most half as many ranges.
bool worth_merging(size_t before, size_t after, bool equal_before, bool equal_after) {
  return !equal_before || equal_after || 2 * after <= before;
}

// Lengths that are small multiples of one word become a table of words, for the same reason.
void split_words(std::vector<int64_t>& offs, std::vector<int64_t>& lens) {
  int64_t total = 0, all = 0;
  for (int64_t l : lens) total += l, all |= l;
  const int64_t word = all & -all;  // the largest power of two that divides every length
  const int64_t n = static_cast<int64_t>(lens.size());
  if (word < 4 || word > 16 || n < 64 || total > 3 * word * n || total / word > (1 << 21)) return;
  std::vector<int64_t> o;
  o.reserve(total / word);
  for (size_t i = 0; i < lens.size(); ++i)
    for (int64_t at = 0; at < lens[i]; at += word) o.push_back(offs[i] + at);
  lens.assign(o.size(), word);
  offs = std::move(o);
}

// Byte ranges in order, already without empty ones.
Ref make_runs(const std::vector<int64_t>& offs, const std::vector<int64_t>& lens) {
  std::vector<int64_t> o, l;
  o.reserve(offs.size());
  l.reserve(offs.size());
  for (size_t i = 0; i < offs.size(); ++i) {
    if (lens[i] == 0) continue;
    if (!o.empty() && o.back() + l.back() == offs[i])
      l.back() = add(l.back(), lens[i]);
    else
      o.push_back(offs[i]), l.push_back(lens[i]);
  }
  if (o.empty()) return bytes(0);
  auto constant = [](const std::vector<int64_t>& v) {
    for (int64_t x : v)
      if (x != v[0]) return false;
    return true;
  };
  const bool equal_after = constant(l);
  if (!worth_merging(offs.size(), o.size(), constant(lens), equal_after)) {
    o = offs;
    l = lens;
  } else if (!equal_after) {
    split_words(o, l);
  }
  const int64_t base = o[0];
  if (o.size() == 1) return at(base, bytes(l[0]));
  bool regular = true;
  const int64_t step = add(o[1], -base);
  for (size_t i = 0; i < o.size() && regular; ++i)
    regular = l[i] == l[0] && o[i] == add(base, mul(static_cast<int64_t>(i), step));
  if (regular) return at(base, loop(static_cast<int64_t>(o.size()), step, bytes(l[0])));
  for (int64_t& v : o) v = add(v, -base);
  return at(base, runs(std::move(o), std::move(l)));
}

// Collects neighbouring byte ranges; everything else goes out as it is.
struct Gatherer {
  std::vector<Part> out;
  std::vector<int64_t> offs, lens;

  void flush() {
    if (offs.empty()) return;
    const Ref node = make_runs(offs, lens);
    offs.clear();
    lens.clear();
    emit(0, node);
  }
  void emit(int64_t off, const Ref& node) {
    if (node->size == 0) return;
    if (node->kind == Kind::Seq)
      for (const Part& p : node->parts) out.push_back({add(off, p.off), p.node});
    else
      out.push_back({off, node});
  }
  void take(int64_t off, const Ref& node) {
    if (node->size == 0) return;
    if (node->kind == Kind::Seq) {
      for (const Part& p : node->parts) take(add(off, p.off), p.node);
    } else if (node->kind == Kind::Bytes) {
      offs.push_back(off);
      lens.push_back(node->size);
    } else {
      flush();
      emit(off, node);
    }
  }
};

Ref make_seq(const std::vector<Part>& parts) {
  Gatherer g;
  for (const Part& p : parts) g.take(p.off, p.node);
  g.flush();
  std::vector<Part>& out = g.out;
  if (out.empty()) return bytes(0);
  if (out.size() == 1) return at(out[0].off, out[0].node);
  const int64_t step = add(out[1].off, -out[0].off);
  bool regular = true;
  for (size_t i = 1; i < out.size() && regular; ++i)
    regular = equal(out[i].node, out[0].node) && out[i].off == add(out[0].off, mul(static_cast<int64_t>(i), step));
  if (regular) return moved(out[0].off, make_loop(static_cast<int64_t>(out.size()), step, out[0].node));
  return seq(std::move(out));
}

}  // namespace

Ref normalise(const Ref& node) {
  switch (node->kind) {
    case Kind::Bytes:
      return node;
    case Kind::Loop:
      return make_loop(node->count, node->stride, normalise(node->child));
    case Kind::Runs: {
      std::vector<int64_t> lens(node->offs.size());
      for (size_t i = 0; i < lens.size(); ++i) lens[i] = node->run_len(i);
      return make_runs(node->offs, lens);
    }
    case Kind::Seq: {
      std::vector<Part> parts;
      parts.reserve(node->parts.size());
      for (const Part& p : node->parts) parts.push_back({p.off, normalise(p.node)});
      return make_seq(parts);
    }
  }
  throw Unsupported("unknown node kind");
}

}  // namespace undertow
