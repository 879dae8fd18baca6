// See choose.hh.
#include "choose.hh"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>

#include "driver.hh"

namespace undertow::gpu {

namespace {

constexpr int64_t kNearStep = 32;    // steps up to a sector count as "along the row"
constexpr uint32_t kShortSide = 8;   // a crossed pair of loops this short is left to the flat kernels
constexpr int64_t kMostStep = std::numeric_limits<int32_t>::max();

bool loops(const Piece& p) { return p.kind == kNest || p.kind == kCrossed; }

bool short_steps(const Piece& p) {
  for (int d = 0; d < p.ndims; ++d)
    if (std::llabs(p.dims[d].user) > kMostStep || std::llabs(p.dims[d].packed) > kMostStep) return false;
  return true;
}

uint32_t ceiling(uint32_t n, uint32_t d) { return n / d + (n % d != 0); }

Choice unrolled(uint8_t unroll, uint16_t threads) { return {Form::Nest, unroll, 0, threads}; }

}  // namespace

bool crosses(const Piece& p) {
  if (p.ndims < 2 || p.block != 1) return false;
  const PieceDim &o = p.dims[p.ndims - 2], &i = p.dims[p.ndims - 1];
  const int64_t near = std::llabs(o.user), far = std::llabs(i.user);
  return near < far && near <= kNearStep && o.n >= kShortSide && i.n >= kShortSide && i.packed == (1ll << p.word_log2);
}

Choice read_choice(const std::string& text) {
  unsigned a = 0, b = 0;
  int read = 0;
  const auto is = [&](const char* form) { return std::sscanf(text.c_str(), form, &a, &read) == 1 && read == static_cast<int>(text.size()); };
  const auto two = [&](const char* form) { return std::sscanf(text.c_str(), form, &a, &b, &read) == 2 && read == static_cast<int>(text.size()); };
  const auto threads = [](unsigned n) { return n == 64 || n == 128 || n == 256; };
  if (text == "general") return {};
  if (two("nest %ux%u%n") && (a == 1 || a == 2 || a == 4) && threads(b)) return unrolled(static_cast<uint8_t>(a), static_cast<uint16_t>(b));
  if (is("stream %u%n") && threads(a)) return {Form::Stream, 1, 0, static_cast<uint16_t>(a)};
  if (is("gather %u%n") && threads(a)) return {Form::Gather, 1, 0, static_cast<uint16_t>(a)};
  if (is("both %u%n") && threads(a)) return {Form::Both, 1, 0, static_cast<uint16_t>(a)};
  if (is("cross %u%n") && (a == 16 || a == 32 || a == 64)) return {Form::Cross, 1, static_cast<uint8_t>(a), 256};
  throw Failure("a kernel called '" + text + "'; there are `general`, `nest 1x128` (1, 2 or 4 words, 64 to 256 threads), "
                "`stream 128`, `gather 128`, `both 128` and `cross 32` (16, 32 or 64)");
}

bool serves(const Choice& c, const Piece& p, bool packing) {
  if (c.form == Form::General) return true;
  if (!loops(p) || !short_steps(p)) return false;
  const bool nest = p.ndims >= 1 && p.ndims <= kNestDims;
  switch (c.form) {
    case Form::Nest: return nest && p.dense && (c.unroll == 1 || p.word_log2 >= 2);
    case Form::Stream: return nest && p.dense && p.word_log2 >= 2;
    case Form::Gather: {
      const uint32_t per = 16u >> p.word_log2;
      return packing && nest && p.dense && p.word_log2 < 4 && p.words % per == 0 && p.packed % 16 == 0;
    }
    case Form::Both: return nest;
    default:
      if (!crosses(p) || p.ndims > 3) return false;
      return c.side == 16 ? p.word_log2 >= 3 : c.side == 32 || p.word_log2 <= 3;
  }
}

Choice choose(const Piece&, bool) { return {}; }

std::string kernel_name(const Choice& c, const Piece& p) {
  const std::string log = std::to_string(p.word_log2);
  const std::string tail = log + "_" + std::to_string(p.ndims);
  switch (c.form) {
    case Form::Nest: return "undertow_nest_" + tail + "_" + std::to_string(c.unroll);
    case Form::Stream: return "undertow_stream_" + tail;
    case Form::Gather: return "undertow_gather_" + tail;
    case Form::Both: return "undertow_both_" + tail;
    default: return "undertow_cross_" + log + "_" + std::to_string(c.side);
  }
}

int kernel_code(const Choice& c, const Piece& p) {
  const int shape = p.word_log2 * 4 + (c.form == Form::Cross ? c.side / 32 : p.ndims);
  return (static_cast<int>(c.form) * 5 + c.unroll) * 20 + shape;
}

Loops<kNestDims> loops_of(const Piece& p, const Choice& c, bool packing) {
  Loops<kNestDims> s{};
  s.user = p.user;
  s.packed = p.packed;
  s.words = p.words;
  s.packing = packing;
  s.block = p.block;
  s.magic = p.block_magic;
  s.shift = p.block_shift;
  PieceDim dims[kNestDims];
  std::reverse_copy(p.dims, p.dims + p.ndims, dims);  // innermost first
  if (c.form == Form::Both && !packing && crosses(p))
    std::stable_sort(dims, dims + p.ndims, [](const PieceDim& a, const PieceDim& b) { return std::llabs(a.user) < std::llabs(b.user); });
  for (int d = 0; d < p.ndims; ++d)
    s.level[d] = {dims[d].n, dims[d].magic, dims[d].shift, static_cast<int32_t>(dims[d].user), static_cast<int32_t>(dims[d].packed)};
  return s;
}

Crossing crossing_of(const Piece& p, const Choice& choice, bool packing) {
  const PieceDim &o = p.dims[p.ndims - 2], &i = p.dims[p.ndims - 1];
  Crossing c{};
  c.user = p.user;
  c.packed = p.packed;
  c.packing = packing;
  c.outer_n = 1;
  c.o_n = o.n;
  c.i_n = i.n;
  c.o_user = static_cast<int32_t>(o.user);
  c.i_user = static_cast<int32_t>(i.user);
  c.o_packed = static_cast<int32_t>(o.packed);
  c.i_packed = static_cast<int32_t>(i.packed);
  c.across = ceiling(i.n, choice.side);
  c.down = ceiling(o.n, choice.side);
  divisor(c.across, c.across_magic, c.across_shift);
  divisor(c.down, c.down_magic, c.down_shift);
  if (p.ndims == 3) {
    c.outer_n = p.dims[0].n;
    c.outer_user = p.dims[0].user;
    c.outer_packed = p.dims[0].packed;
  }
  return c;
}

uint32_t grid_of(const Choice& c, const Piece& p) {
  if (c.form == Form::Cross) {
    const Crossing x = crossing_of(p, c, true);
    return x.across * x.down * x.outer_n;
  }
  const uint32_t words = c.form == Form::Gather ? p.words / (16u >> p.word_log2) : p.words;
  return ceiling(words, static_cast<uint32_t>(c.threads) * c.unroll);
}

}  // namespace undertow::gpu
