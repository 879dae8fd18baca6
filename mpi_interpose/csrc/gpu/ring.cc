// See ring.hh.
#include "ring.hh"

#include <algorithm>

#include "lower.hh"

namespace undertow::gpu {
namespace {

// Words [from, to) of a piece without gaps in its packed side: whole turns of the outermost loop, and what is left of
// the turns at either end. False for a part of a table of mixed lengths.
bool part_of(const Piece& p, uint32_t from, uint32_t to, std::vector<Piece>& out) {
  if (from >= to) return true;
  if (from == 0 && to == p.words) {
    out.push_back(p);
    return true;
  }
  if (p.ndims == 0 && p.kind == kMixed) return false;
  Piece part = p;
  auto finish = [&out](Piece& made) {
    if (made.kind == kCrossed && made.ndims < 2) made.kind = kNest;
    made.unroll = words_per_thread(made);
    out.push_back(made);
    return true;
  };
  auto slice = [&](uint32_t first, uint32_t n) {  // of the block of the only turn that is left
    part.user += static_cast<uint64_t>(first) << p.word_log2;
    part.packed += static_cast<uint64_t>(first) << p.word_log2;
    part.words = part.block = n;
    divisor(n, part.block_magic, part.block_shift);
    return finish(part);
  };
  if (p.ndims == 0) return slice(from, to - from);
  const bool table = p.kind == kTable && p.ndims == 1;
  const uint32_t inner = p.words / p.dims[0].n;
  auto turns = [&](uint32_t first, uint32_t n) {
    Piece some = p;
    some.packed += static_cast<uint64_t>(first) * inner << p.word_log2;
    if (table) some.offs += static_cast<uint64_t>(first) * sizeof(int32_t);
    else some.user += static_cast<uint64_t>(static_cast<int64_t>(first) * p.dims[0].user);
    some.dims[0].n = n;
    divisor(n, some.dims[0].magic, some.dims[0].shift);
    some.words = n * inner;
    return some;
  };
  auto within = [&](uint32_t turn, uint32_t first, uint32_t last) {
    part = turns(turn, 1);
    if (table) return slice(first, last - first);
    part.ndims = static_cast<uint8_t>(p.ndims - 1);
    for (int d = 0; d < part.ndims; ++d) part.dims[d] = p.dims[d + 1];
    if (part.kind == kCrossed && part.ndims < 2) part.kind = kNest;
    return part_of(part, first, last, out);
  };
  uint32_t first = from / inner;
  const uint32_t last = to / inner;
  if (first == last) return within(first, from % inner, to % inner);
  if (from % inner) {
    if (!within(first, from % inner, inner)) return false;
    ++first;
  }
  if (first < last) {
    Piece some = turns(first, last - first);
    finish(some);
  }
  return to % inner == 0 || within(last, 0, to % inner);
}

// By packed bytes, wherever the boundaries fall.
std::vector<Chunk> by_bytes(const std::vector<Piece>& pieces, uint64_t base, int64_t bytes, int64_t most) {
  std::vector<Chunk> chunks;
  for (int64_t from = 0; from < bytes; from += most) {
    Chunk chunk{from, std::min(most, bytes - from), {}};
    for (const Piece& p : pieces) {
      const int64_t at = static_cast<int64_t>(p.packed - base), end = at + (static_cast<int64_t>(p.words) << p.word_log2);
      const int64_t low = std::max(at, from), high = std::min(end, from + chunk.bytes);
      if (low >= high) continue;
      const size_t before = chunk.pieces.size();
      if (!part_of(p, static_cast<uint32_t>((low - at) >> p.word_log2), static_cast<uint32_t>((high - at) >> p.word_log2),
                   chunk.pieces))
        return {};
      for (size_t k = before; k < chunk.pieces.size(); ++k) chunk.pieces[k].packed -= static_cast<uint64_t>(from);
    }
    chunks.push_back(std::move(chunk));
  }
  return chunks;
}

// By turns of the outermost loop that all pieces share.
std::vector<Chunk> by_turns(const std::vector<Piece>& pieces, uint64_t base, int64_t bytes, int64_t most) {
  const PieceDim outer = pieces[0].dims[0];
  const int64_t step = outer.packed;
  if (step <= 0 || step > most || step * outer.n != bytes) return {};
  for (const Piece& p : pieces) {
    if (p.ndims == 0 || (p.kind == kTable && p.ndims == 1) || p.dims[0].n != outer.n || p.dims[0].packed != step) return {};
    int64_t reach = static_cast<int64_t>(p.packed - base) + (static_cast<int64_t>(p.block) << p.word_log2);
    for (int d = 1; d < p.ndims; ++d) {
      if (p.dims[d].packed < 0) return {};
      reach += (p.dims[d].n - 1) * p.dims[d].packed;
    }
    if (reach > step) return {};
  }
  const int64_t turns = most / step;
  std::vector<Chunk> chunks;
  for (int64_t first = 0; first < outer.n; first += turns) {
    const int64_t n = std::min<int64_t>(turns, outer.n - first);
    Chunk chunk{first * step, n * step, pieces};
    for (Piece& p : chunk.pieces) {
      p.words = static_cast<uint32_t>(p.words / outer.n * n);
      p.user += static_cast<uint64_t>(first * p.dims[0].user);
      p.dims[0].n = static_cast<uint32_t>(n);
      divisor(p.dims[0].n, p.dims[0].magic, p.dims[0].shift);
      p.unroll = words_per_thread(p);
    }
    chunks.push_back(std::move(chunk));
  }
  return chunks;
}

}  // namespace

std::vector<Chunk> chunks_of(const std::vector<Piece>& pieces, uint64_t base, int64_t bytes, int64_t most) {
  if (pieces.empty()) return {};
  std::vector<Chunk> chunks;
  if (std::all_of(pieces.begin(), pieces.end(), [](const Piece& p) { return p.dense; }))
    chunks = by_bytes(pieces, base, bytes, most);
  return chunks.empty() && pieces[0].ndims ? by_turns(pieces, base, bytes, most) : chunks;
}

}  // namespace undertow::gpu
