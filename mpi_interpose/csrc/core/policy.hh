// The measured table that decides: what a library's call took and what ours took, at points of a small space.
//
// A row is "use class block step bytes without_ns with_ns share leaf": the median of a call without us and with us, for a
// plan of that class whose pieces are `block` bytes, `step` bytes apart, at a message of `bytes`, made of basic elements
// of `leaf` bytes (0 or left out: not known). Our own time does not depend on these, but a library's does: MPICH copies a
// block of four MPI_CHAR as four elements. Uses are pack, unpack,
// and send and recv, which carry the peer's place (send_socket: same socket; send_local: same host; send_remote: another
// one). Without any row for the same socket those for the host are used, and the other way round. `share` is the part
// of (without - with) that this side of a message may call its own in the report. Between rows the logarithm of the gain
// is interpolated by distance in octaves; far from every row nothing is known, and the call passes through.
//
// A line "for 4 on amd-26-avx512" begins rows of the library's major version 4 on that kind of processor (processor.hh), "for 4"
// those of any. Where no section is of both, those of the version count, and else all; of several that count, each point
// has the row with the least gain, and points that one of them lacks go.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "processor.hh"

namespace undertow {

enum PolicyUse : int { kPolicyPack, kPolicyUnpack, kPolicySendLocal, kPolicyRecvLocal, kPolicySendRemote,
                       kPolicyRecvRemote, kPolicySendSocket, kPolicyRecvSocket, kPolicyUses };

class Policy {
 public:
  struct Answer {
    double ratio = 0;     // time without us / time with us; 0 when nothing is known
    double saved_ns = 0;  // per call, this side's share
  };

  // `version`: what the library says of itself. Returns the number of rows used; '#' starts a comment, lines of another
  // form are skipped.
  int load(const char* text, const char* version = "", const char* processor = undertow::processor()) {
    for (auto& list : rows_) list.clear();
    int best = 0;
    for (const char* at = text; at && *at; at = next_line(at))
      if (is_section(at)) best = std::max(best, fits(at, version, processor));
    Rows section;
    bool counts = true;  // what stands before any section
    int merged = -1;
    for (const char* at = text; at && *at; at = next_line(at)) {
      if (!is_section(at)) {
        if (counts) line(at, section);
        continue;
      }
      if (counts) merge(section, merged++);
      section = {};
      counts = fits(at, version, processor) == best;
    }
    if (counts) merge(section, merged);
    int n = 0;
    for (const auto& list : rows_) n += static_cast<int>(list.size());
    return n;
  }

  Answer ask(int use, int cls, double block, double step, double bytes, double leaf = 0) const {
    if (use < 0 || use >= kPolicyUses || cls < 0 || cls >= kClasses) return {};
    const Row want = place(block, step, bytes, leaf);
    std::array<double, kNear> far;
    std::array<const Row*, kNear> near{};
    use = stand_in(use);
    far.fill(kReach);
    for (const Row& r : rows_[use * kClasses + cls]) {
      double d = distance(want, r);
      const Row* row = &r;
      for (int k = 0; k < kNear; ++k)
        if (d < far[k]) std::swap(d, far[k]), std::swap(row, near[k]);
    }
    double weight = 0, log_ratio = 0, log_without = 0, share = 0;
    for (int k = 0; k < kNear && near[k]; ++k) {
      if (k && far[k] > kSpread * (far[0] + 0.25)) break;
      const double w = 1 / std::pow(far[k] + 0.02, 2);
      weight += w;
      log_ratio += w * (std::log(near[k]->without / near[k]->with) - kOtherElements * elements_apart(want, *near[k]));
      // Times grow with the bytes; a fixed part of a call is left out, so that savings are never overstated upwards.
      log_without += w * (std::log(near[k]->without) + std::min(0.0, want.bytes - near[k]->bytes) * std::log(2.0));
      share += w * near[k]->share;
    }
    if (weight == 0) return {};
    const double doubt = kDoubt * std::min(1.0, far[0] / kDoubted);
    const double ratio = std::exp(log_ratio / weight - doubt), without = std::exp(log_without / weight);
    return {ratio, without * (1 - 1 / ratio) * share / weight};
  }

  // How much longer the library's messages of `use` take than those of `base`: the geometric mean over the points that
  // both were measured at; 0 where there is none.
  double slower(int use, int base) const {
    double sum = 0;
    int n = 0;
    for (int cls = 0; cls < kClasses; ++cls)
      for (const Row& a : rows_[use * kClasses + cls])
        for (const Row& b : rows_[base * kClasses + cls])
          if (a.same_point(b))
            sum += std::log(a.without / b.without), ++n;
    return n ? std::exp(sum / n) : 0;
  }

  bool knows_messages() const {
    for (int use = kPolicySendLocal; use < kPolicyUses; ++use)
      if (!empty(use)) return true;
    return false;
  }

 private:
  static constexpr int kClasses = 6, kNear = 3;
  static constexpr double kReach = 3, kSpread = 2;
  // A gain that was measured here is a clear one; read from rows that are farther off it is worth less, by 4 % from half an
  // octave on.
  static constexpr double kDoubt = 0.04, kDoubted = 0.5;
  // A gain measured with other elements is worth less by the square root of 2 for each octave that their sizes differ: a
  // library may be that much quicker with larger ones.
  static constexpr double kOtherElements = 0.35;
  struct Row {
    double block, step, bytes;  // in octaves
    double leaf;                // in octaves; -1: not known
    int align;                  // log2 of the largest power of two up to 16 that divides the block
    int alias;                  // of a step: octaves of the largest power of two in it beyond 64 (cache sets collide)
    double without = 0, with = 0, share = 1;
    double gain() const { return without / with; }
    bool same_point(const Row& r) const { return block == r.block && step == r.step && bytes == r.bytes && leaf == r.leaf; }
  };
  using Rows = std::array<std::vector<Row>, kPolicyUses * kClasses>;
  Rows rows_;

  // How well the section that begins at `at` fits: 2 with version and kind of processor, 1 with the version.
  static int fits(const char* at, const char* version, const char* processor) {
    const bool known = !std::strncmp(version, "Open MPI", 8) || !std::strncmp(version, "MPICH", 5);
    const char* digit = std::strpbrk(version, "0123456789");
    char major[16] = "", kind[32] = "";
    const int words = std::sscanf(at, "for %15s on %31[^\n ]", major, kind);
    if (!known || !digit || std::atoi(major) != std::atoi(digit)) return 0;
    return words < 2 || !std::strcmp(kind, processor) ? 2 : 1;
  }

  // The row with the less gain; none is left where one takes a side of a message alone and the other both.
  static Row least(const Row& a, const Row& b) {
    Row row = a.gain() <= b.gain() ? a : b;
    if (a.share != b.share) row.with = std::max(row.with, row.without);
    return row;
  }

  // Adds the `nth` section that counts.
  void merge(const Rows& section, int nth) {
    for (size_t k = 0; k < rows_.size(); ++k) {
      if (nth <= 0) {  // before it only rows without a section, which stay
        rows_[k].insert(rows_[k].end(), section[k].begin(), section[k].end());
        continue;
      }
      std::vector<Row> both;
      for (const Row& mine : rows_[k])
        for (const Row& other : section[k])
          if (mine.same_point(other)) both.push_back(least(mine, other));
      rows_[k] = std::move(both);
    }
  }

  bool empty(int use) const {
    for (int cls = 0; cls < kClasses; ++cls)
      if (!rows_[use * kClasses + cls].empty()) return false;
    return true;
  }
  int stand_in(int use) const {
    static constexpr int others[kPolicyUses] = {kPolicyPack,       kPolicyUnpack,     kPolicySendSocket, kPolicyRecvSocket,
                                                kPolicySendRemote, kPolicyRecvRemote, kPolicySendLocal,  kPolicyRecvLocal};
    return empty(use) ? others[use] : use;
  }
  static Row place(double block, double step, double bytes, double leaf) {
    const auto octave = [](double v) { return std::log2(std::max(1.0, v)); };
    const int64_t b = std::max<int64_t>(1, static_cast<int64_t>(block));
    const int64_t s = std::max<int64_t>(1, static_cast<int64_t>(step));
    const auto power = [](int64_t v) { return __builtin_ctzll(static_cast<uint64_t>(v)); };
    return {octave(block), octave(step), octave(bytes), leaf > 0 ? octave(leaf) : -1, std::min(4, power(b)), std::max(0, std::min(6, power(s) - 6))};
  }
  static double elements_apart(const Row& a, const Row& b) {  // in octaves
    return a.leaf < 0 || b.leaf < 0 ? 0 : std::abs(a.leaf - b.leaf);
  }
  static double distance(const Row& a, const Row& b) {
    return std::abs(a.block - b.block) + 0.5 * std::abs(a.step - b.step) + 0.5 * std::abs(a.bytes - b.bytes) +
           0.4 * std::abs(a.align - b.align) + 0.15 * std::abs(a.alias - b.alias) +
           0.5 * elements_apart(a, b);
  }
  static const char* next_line(const char* at) {
    const char* end = std::strchr(at, '\n');
    return end ? end + 1 : nullptr;
  }
  static bool is_section(const char* at) { return !std::strncmp(at, "for ", 4); }
  static int index(const char* word, const char* const* names, int n) {
    for (int i = 0; i < n; ++i)
      if (std::strcmp(word, names[i]) == 0) return i;
    return -1;
  }
  static void line(const char* at, Rows& into) {
    static const char* const uses[] = {"pack", "unpack", "send_local", "recv_local", "send_remote", "recv_remote",
                                       "send_socket", "recv_socket"};
    static const char* const classes[] = {"contiguous", "strided", "crossed", "table", "mixed", "records"};
    char use[16], cls[16];
    double block, step, bytes, without, with, share, leaf = 0;
    const char* line_end = std::strchr(at, '\n');
    const std::string words(at, line_end ? static_cast<size_t>(line_end - at) : std::strlen(at));
    const int read = std::sscanf(words.c_str(), "%15s %15s %lf %lf %lf %lf %lf %lf %lf", use, cls, &block, &step, &bytes,
                                 &without, &with, &share, &leaf);
    if (read < 8) return;
    const int u = index(use, uses, kPolicyUses), c = index(cls, classes, kClasses);
    if (u < 0 || c < 0 || !(without > 0) || !(with > 0) || !(share >= 0)) return;
    Row row = place(block, step, bytes, leaf);
    row.without = without, row.with = with, row.share = share;
    into[u * kClasses + c].push_back(row);
  }
};

}  // namespace undertow
