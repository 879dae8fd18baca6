// A running comparison of the library's path with ours, for one use and size: which to take, and which calls to time.
//
// One call in mask + 1 of either path is timed, now ours first, now the library's. A few times of each make a pair (the
// least of them, because an interrupted call, or one that waited for its peer, says nothing of the path), and pairs are
// evidence (evidence.hh): our path is begun where they show a gain, and given up where they speak against it. In between
// the table is followed. While pairs agree with what is done, sampling becomes rarer. It begins often where the table
// takes the call, whose gain another machine may not have, so that a loss is seen soon. No clock and no MPI in here.
// Threads that time calls at once may spoil a pair for each other, which is noise like any other.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "evidence.hh"

namespace undertow {

// What to do with a call, and whether to time it.
struct Choice {
  bool ours, timed;
};

// Local calls are compared wherever the table does not know a heavy loss, messages only where the table takes them: for
// a message the comparison can switch our path off and on again, but never begin where nothing was measured.
struct OnlineRule {
  uint32_t row;  // times of either path in a pair; an even number, so that both meet what comes in turn
  bool explores;
};
constexpr OnlineRule kLocalRule{2, true}, kMessageRule{4, false};

enum Decision : int { kOpen, kLibrary, kOurs };  // kOpen: the table's

// What was measured of either path, for the report, and what follows.
class Samples {
 public:
  void note(bool ours, int64_t bytes, int64_t ns) {
    if (bytes <= 0) return;
    std::atomic<int64_t>& slot = ps_per_byte_[ours];
    const int64_t sample = std::max<int64_t>(1, ns * 1000 / bytes), old = slot.load(relaxed);
    // Rises slowly when the program's buffers have moved.
    slot.store(old == 0 || sample < old ? sample : old + std::min(old / 16, (sample - old) / 4), relaxed);
    samples_[ours].fetch_add(1, relaxed);
  }
  void settle(Decision decision) { decision_.store(decision, relaxed); }
  Decision decision() const { return static_cast<Decision>(decision_.load(relaxed)); }
  // `table`: what the table says.
  bool takes(bool table) const {
    const int decided = decision();
    return decided ? decided == kOurs : table;
  }
  int64_t ps_per_byte(bool ours) const { return ps_per_byte_[ours].load(relaxed); }
  uint32_t samples(bool ours) const { return samples_[ours].load(relaxed); }

 protected:
  static constexpr std::memory_order relaxed = std::memory_order_relaxed;

 private:
  std::atomic<int64_t> ps_per_byte_[2]{};  // library, ours
  std::atomic<uint32_t> samples_[2]{};
  std::atomic<int> decision_{kOpen};
};

class Online : public Samples {
 public:
  // `gain`: what the table says (time without us / with us; negative or 0: unknown); `table`: whether that is enough.
  Choice choose(const OnlineRule& rule, double gain, bool table) {
    if (!rule.explores && !table) return {false, false};
    uint32_t mask = mask_.load(relaxed);
    if (!mask) mask_.store(mask = table ? kSoon : kOften, relaxed);
    const uint32_t call = calls_.fetch_add(1, relaxed), phase = call & mask, eighth = (mask + 1) / 8;
    const bool ours = takes(table);
    if (phase != eighth && phase != 5 * eighth) return {ours, false};
    const bool backwards = call & (mask + 1);
    if ((phase == eighth) == backwards) return {false, true};
    return {ours || decision() || gain > 0.5 || gain <= 0, true};
  }
  void observe(const OnlineRule& rule, bool ours, int64_t bytes, int64_t ns, bool table) {
    if (bytes <= 0) return;
    note(ours, bytes, ns);
    const float each = static_cast<float>(std::max<int64_t>(1, ns)) / static_cast<float>(bytes);
    const uint32_t times = times_[ours].load(relaxed);
    least_[ours].store(times ? std::min(least_[ours].load(relaxed), each) : each, relaxed);
    times_[ours].store(times + 1, relaxed);
    if (times_[0].load(relaxed) < rule.row || times_[1].load(relaxed) < rule.row) return;
    times_[0].store(0, relaxed);
    times_[1].store(0, relaxed);
    const bool agrees = pair(least_[0].load(relaxed), least_[1].load(relaxed), table);
    const uint32_t mask = mask_.load(relaxed);
    const uint32_t next = agrees ? std::min(kRarest, 2 * mask + 1) : std::min(kOften, mask);
    mask_.store(decision() == kLibrary ? std::max(kOften, next) : next, relaxed);
  }

 private:
  static constexpr uint32_t kSoon = 15, kOften = 63, kRarest = 4095;
  std::atomic<uint32_t> calls_{0}, mask_{0};  // no mask yet: 0
  std::atomic<float> least_[2]{};    // of the pair that is being timed, ns per byte
  std::atomic<uint32_t> times_[2]{};
  std::atomic<Gain> gain_{Gain()};
  std::atomic<Doubt> doubt_{Doubt()};

  // Whether it speaks for what is done.
  bool pair(double library, double ours, bool table) {
    if (takes(table)) {
      Doubt doubt = doubt_.load(relaxed);
      if (doubt.pair(library, ours)) settle(kLibrary), doubt = Doubt();
      doubt_.store(doubt, relaxed);
      return ours <= library;
    }
    Gain gain = gain_.load(relaxed);
    const bool won = gain.pair(library, ours);
    if (gain.found()) settle(kOurs);
    gain_.store(gain.found() || gain.broke() ? Gain() : gain, relaxed);
    return !won;
  }
};

}  // namespace undertow
