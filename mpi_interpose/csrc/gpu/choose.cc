// See choose.hh.
#include "choose.hh"

#include <cstdio>
#include <cstdlib>
#include <limits>

#include "driver.hh"

namespace undertow::gpu {

namespace {

constexpr int64_t kNearStep = 32;    // steps up to a sector count as "along the row"
constexpr uint32_t kShortSide = 8;   // a crossed pair of loops this short is left to the flat kernels
constexpr uint32_t kManyWords = 1u << 18;
constexpr uint32_t kTilesOf64 = 1u << 20;  // words of 1 to 4 bytes from which on larger tiles pay
constexpr int64_t kMostStep = std::numeric_limits<int32_t>::max();

bool loops(const Piece& p) { return p.kind == kNest || p.kind == kCrossed; }

bool short_steps(const Piece& p) {
  for (int d = 0; d < p.ndims; ++d)
    if (std::llabs(p.dims[d].user) > kMostStep || std::llabs(p.dims[d].packed) > kMostStep) return false;
  return true;
}

uint32_t ceiling(uint32_t n, uint32_t d) { return n / d + (n % d != 0); }

Choice nest_of(unsigned unroll, unsigned threads) {
  return {Form::Nest, static_cast<uint8_t>(unroll), 0, static_cast<uint16_t>(threads)};
}
Choice plain(Form form, unsigned threads) { return {form, 1, 0, static_cast<uint16_t>(threads)}; }
Choice tiles_of(unsigned side) { return {Form::Cross, 1, static_cast<uint8_t>(side), 256}; }

uint32_t words_of_thread(const Choice& c, const Piece& p) {
  return c.form == Form::Pour || c.form == Form::Stream ? stream_words(p.word_log2) : c.unroll;
}

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
  if (two("nest %ux%u%n") && (a == 1 || a == 4) && threads(b)) return nest_of(a, b);
  if (is("stream %u%n") && threads(a)) return plain(Form::Stream, a);
  if (is("pour %u%n") && threads(a)) return plain(Form::Pour, a);
  if (is("cross %u%n") && (a == 16 || a == 32 || a == 64)) return tiles_of(a);
  throw Failure("a kernel called '" + text + "'; there are `general`, `nest 1x128` (1 or 4 words, 64 to 256 threads), "
                "`stream 128`, `pour 128` and `cross 32` (16, 32 or 64)");
}

bool serves(const Choice& c, const Piece& p, bool packing) {
  if (c.form == Form::General) return true;
  if (!loops(p) || !short_steps(p)) return false;
  const bool nest = p.ndims >= 1 && p.ndims <= kNestDims;
  switch (c.form) {
    case Form::Nest: return nest && p.dense && (c.unroll == 1 || p.word_log2 < 2);
    case Form::Stream: return nest && p.dense && p.word_log2 >= 2;
    case Form::Pour:
      return packing && nest && p.dense && p.word_log2 < 2 && p.words % stream_words(p.word_log2) == 0 && p.packed % 16 == 0;
    default:
      if (!crosses(p) || p.ndims > 3) return false;
      return c.side == 16 ? p.word_log2 == 4 : c.side == 32 || p.word_log2 < 3;
  }
}

// From benchmarks/results/mpi_gpu_variants*.json (an H200, 29 November 2026): in each cell the fastest kernel, or one that is
// within a few per cent of it. Up to some 32 MiB the cache holds the strided side of a pack, if the packed side does not push
// it out; that is what streams are for. Above, the memory sets the pace, and one word per thread in small blocks goes best
// with it. Several short words per thread save instructions.
Choice choose(const Piece& p, bool packing) {
  constexpr int64_t kInCache = 32ll << 20, kLarge = 4ll << 20;
  const int64_t bytes = static_cast<int64_t>(p.words) << p.word_log2;
  const int log = p.word_log2;
  Choice choice = nest_of(1, 256);
  if (loops(p) && crosses(p)) {
    if (log == 4) choice = tiles_of(bytes <= kInCache ? 16 : 32);
    else choice = tiles_of(log == 3 || p.words <= kTilesOf64 ? 32 : 64);
    if (serves(choice, p, packing)) return choice;
    choice = nest_of(1, 256);
  }
  if (log == 4 && bytes >= kLarge) {
    if (bytes > kInCache) choice = nest_of(1, 128);
    else if (packing) choice = plain(Form::Stream, 256);
  } else if (log == 3 && packing && bytes >= kLarge) {
    choice = plain(Form::Stream, 128);
  } else if (log == 2 && p.words >= kManyWords) {
    choice = plain(Form::Stream, 128);
  } else if (log < 2 && p.words >= kManyWords) {
    choice = plain(Form::Pour, 128);
    if (!serves(choice, p, packing)) choice = nest_of(4, 256);
  }
  return serves(choice, p, packing) ? choice : Choice{};
}

std::string kernel_name(const Choice& c, const Piece& p) {
  const std::string log = std::to_string(p.word_log2);
  const std::string tail = log + "_" + std::to_string(p.ndims);
  switch (c.form) {
    case Form::Nest: return "undertow_nest_" + tail + "_" + std::to_string(c.unroll);
    case Form::Stream: return "undertow_stream_" + tail;
    case Form::Pour: return "undertow_pour_" + tail;
    default: return "undertow_cross_" + log + "_" + std::to_string(c.side);
  }
}

int kernel_code(const Choice& c, const Piece& p) {
  const int shape = p.word_log2 * 4 + (c.form == Form::Cross ? c.side / 32 : p.ndims);
  return (static_cast<int>(c.form) * 5 + c.unroll) * 20 + shape;
}

Loops<kNestDims> loops_of(const Piece& p, bool packing) {
  Loops<kNestDims> s{};
  s.user = p.user;
  s.packed = p.packed;
  s.words = p.words;
  s.packing = packing;
  s.block = p.block;
  s.magic = p.block_magic;
  s.shift = p.block_shift;
  for (int d = 0; d < p.ndims; ++d) {  // innermost first
    const PieceDim& dim = p.dims[p.ndims - 1 - d];
    s.level[d] = {dim.n, dim.magic, dim.shift, static_cast<int32_t>(dim.user)};
  }
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
  return ceiling(p.words, c.threads * words_of_thread(c, p));
}

}  // namespace undertow::gpu
