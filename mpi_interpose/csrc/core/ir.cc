// Construction, equality and the text form of IR nodes; see ir.hh for what the nodes mean.
#include "ir.hh"

#include <cctype>
#include <cstdlib>

namespace undertow {
namespace {

constexpr int kMaxDepth = 256;

uint64_t mix(uint64_t h, uint64_t v) {
  h ^= v + 0x9e3779b97f4a7c15ull + (h << 6) + (h >> 2);
  return h * 0xff51afd7ed558ccdull;
}

// Widens [lo, hi) of `n` by a child's bounds moved by `off`.
void cover(Node& n, bool& first, int64_t off, const Node& child) {
  if (child.size == 0) return;
  const int64_t lo = reachable(add(off, child.lo)), hi = reachable(add(off, child.hi));
  n.lo = first ? lo : std::min(n.lo, lo);
  n.hi = first ? hi : std::max(n.hi, hi);
  first = false;
}

}  // namespace

Ref bytes(int64_t n) {
  if (n < 0) throw Unsupported("negative size");
  auto node = std::make_shared<Node>();
  node->kind = Kind::Bytes;
  node->size = node->hi = n;
  node->pieces = n > 0;
  node->hash = mix(1, static_cast<uint64_t>(n));
  return node;
}

Ref loop(int64_t count, int64_t stride, Ref child) {
  if (count < 0) throw Unsupported("negative count");
  auto node = std::make_shared<Node>();
  node->kind = Kind::Loop;
  node->count = count;
  node->stride = stride;
  node->size = mul(count, child->size);
  node->pieces = mul(count, child->pieces);
  if (node->size > 0) {
    bool first = true;
    cover(*node, first, 0, *child);
    cover(*node, first, mul(count - 1, stride), *child);
  }
  node->hash = mix(mix(mix(2, static_cast<uint64_t>(count)), static_cast<uint64_t>(stride)), child->hash);
  node->child = std::move(child);
  return node;
}

Ref seq(std::vector<Part> parts) {
  auto node = std::make_shared<Node>();
  node->kind = Kind::Seq;
  node->hash = 3;
  bool first = true;
  for (const Part& p : parts) {
    node->size = add(node->size, p.node->size);
    node->pieces = add(node->pieces, p.node->pieces);
    cover(*node, first, p.off, *p.node);
    node->hash = mix(mix(node->hash, static_cast<uint64_t>(p.off)), p.node->hash);
  }
  node->parts = std::move(parts);
  return node;
}

Ref runs(std::vector<int64_t> offs, std::vector<int64_t> lens) {
  if (offs.size() != lens.size()) throw Unsupported("runs: offsets and lengths differ in number");
  auto node = std::make_shared<Node>();
  node->kind = Kind::Runs;
  node->hash = 4;
  bool first = true, same = true;
  for (size_t i = 0; i < offs.size(); ++i) {
    if (lens[i] < 0) throw Unsupported("negative length");
    same = same && lens[i] == lens[0];
    node->size = add(node->size, lens[i]);
    node->pieces += lens[i] > 0;
    node->hash = mix(mix(node->hash, static_cast<uint64_t>(offs[i])), static_cast<uint64_t>(lens[i]));
    if (lens[i] == 0) continue;
    const int64_t hi = reachable(add(reachable(offs[i]), lens[i]));
    node->lo = first ? offs[i] : std::min(node->lo, offs[i]);
    node->hi = first ? hi : std::max(node->hi, hi);
    first = false;
  }
  node->len = lens.empty() ? 0 : lens[0];
  if (!same) node->lens = std::move(lens);
  node->offs = std::move(offs);
  return node;
}

Ref at(int64_t off, Ref node) {
  if (off == 0 || node->size == 0) return node;
  return seq({Part{off, std::move(node)}});
}

bool equal(const Ref& a, const Ref& b) {
  if (a == b) return true;
  if (a->kind != b->kind || a->hash != b->hash || a->size != b->size) return false;
  switch (a->kind) {
    case Kind::Bytes:
      return true;
    case Kind::Loop:
      return a->count == b->count && a->stride == b->stride && equal(a->child, b->child);
    case Kind::Runs:
      return a->offs == b->offs && a->lens == b->lens && a->len == b->len;
    case Kind::Seq:
      if (a->parts.size() != b->parts.size()) return false;
      for (size_t i = 0; i < a->parts.size(); ++i)
        if (a->parts[i].off != b->parts[i].off || !equal(a->parts[i].node, b->parts[i].node)) return false;
      return true;
  }
  return false;
}

namespace {

void print(const Node& n, size_t limit, std::string& out) {
  auto number = [&out](int64_t v) { out += ' ' + std::to_string(v); };
  switch (n.kind) {
    case Kind::Bytes:
      out += "(bytes";
      number(n.size);
      break;
    case Kind::Loop:
      out += "(loop";
      number(n.count);
      number(n.stride);
      out += ' ';
      print(*n.child, limit, out);
      break;
    case Kind::Seq:
      out += "(seq";
      for (size_t i = 0; i < n.parts.size(); ++i) {
        if (limit && i >= limit) {
          out += " ... " + std::to_string(n.parts.size()) + " parts";
          break;
        }
        number(n.parts[i].off);
        out += ' ';
        print(*n.parts[i].node, limit, out);
      }
      break;
    case Kind::Runs:
      out += "(runs";
      for (size_t i = 0; i < n.offs.size(); ++i) {
        if (limit && i >= limit) {
          out += " ... " + std::to_string(n.offs.size()) + " runs";
          break;
        }
        number(n.offs[i]);
        number(n.run_len(i));
      }
      break;
  }
  out += ')';
}

struct Parser {
  const char* p;

  void space() {
    while (std::isspace(static_cast<unsigned char>(*p))) ++p;
  }
  bool closes() {
    space();
    return *p == ')';
  }
  int64_t number() {
    space();
    char* end;
    errno = 0;
    const long long v = std::strtoll(p, &end, 10);
    if (end == p || errno) throw Unsupported("number expected at: " + std::string(p).substr(0, 20));
    p = end;
    return v;
  }
  void expect(char c) {
    space();
    if (*p != c) throw Unsupported(std::string("'") + c + "' expected at: " + std::string(p).substr(0, 20));
    ++p;
  }
  std::string word() {
    space();
    std::string w;
    while (std::isalpha(static_cast<unsigned char>(*p))) w += *p++;
    return w;
  }
  Ref node(int depth) {
    if (depth > kMaxDepth) throw Unsupported("nested too deeply");
    expect('(');
    const std::string kind = word();
    Ref result;
    if (kind == "bytes") {
      result = bytes(number());
    } else if (kind == "loop") {
      const int64_t count = number(), stride = number();
      result = loop(count, stride, node(depth + 1));
    } else if (kind == "seq") {
      std::vector<Part> parts;
      while (!closes()) {
        const int64_t off = number();
        parts.push_back({off, node(depth + 1)});
      }
      result = seq(std::move(parts));
    } else if (kind == "runs") {
      std::vector<int64_t> offs, lens;
      while (!closes()) {
        offs.push_back(number());
        lens.push_back(number());
      }
      result = runs(std::move(offs), std::move(lens));
    } else {
      throw Unsupported("unknown node '" + kind + "'");
    }
    expect(')');
    return result;
  }
};

}  // namespace

std::string text(const Ref& node, size_t limit) {
  std::string out;
  print(*node, limit, out);
  return out;
}

Ref parse(const std::string& text) {
  Parser parser{text.c_str()};
  Ref node = parser.node(0);
  parser.space();
  if (*parser.p) throw Unsupported("text after the node");
  return node;
}

}  // namespace undertow
