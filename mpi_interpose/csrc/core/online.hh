// A running comparison of the library's path with ours, for one use and size: which to take, and which calls to time.
//
// One call in mask + 1 of either path is timed. Near-least times are kept, because an interrupted call, or one that
// waited for its peer, says nothing of the path. When enough samples of either path are there, they decide instead of
// the table, with hysteresis; while they agree with what is done, sampling becomes rarer. No clock and no MPI in here.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace undertow {

// What to do with a call, and whether to time it.
struct Choice {
  bool ours, timed;
};

// Local calls are compared wherever the table does not know a heavy loss, messages only where the table takes them: for
// a message the comparison can switch our path off and on again, but never begin where nothing was measured.
struct OnlineRule {
  uint32_t least;     // samples of either path before they decide
  double begin, stay; // library's time / ours: to begin with ours, to go on
  bool explores;
};
constexpr OnlineRule kLocalRule{3, 1.12, 1.03, true}, kMessageRule{6, 1.12, 1.0, false};

class Online {
 public:
  enum Decision : int { kOpen, kLibrary, kOurs };

  // `gain`: what the table says (time without us / with us; negative or 0: unknown); `takes`: whether that is enough.
  Choice choose(const OnlineRule& rule, double gain, bool takes) {
    if (!rule.explores && !takes) return {false, false};
    const uint32_t phase = calls_.fetch_add(1, relaxed) & mask_.load(relaxed);
    const int decided = decision();
    const bool ours = decided ? decided == kOurs : takes;
    if (phase == 8 && (ours || decided || gain > 0.5 || gain <= 0)) return {true, true};
    if (phase == 40) return {false, true};
    return {ours, false};
  }
  // For a call that cannot be timed: follows the samples of those that can.
  bool takes(bool table) const {
    const int decided = decision();
    return decided ? decided == kOurs : table;
  }
  // Keeps a sample, and decides nothing.
  void note(bool ours, int64_t bytes, int64_t ns) {
    if (bytes <= 0) return;
    std::atomic<int64_t>& slot = ps_per_byte_[ours];
    const int64_t sample = std::max<int64_t>(1, ns * 1000 / bytes), old = slot.load(relaxed);
    // Rises slowly when the program's buffers have moved.
    slot.store(old == 0 || sample < old ? sample : old + std::min(old / 16, (sample - old) / 4), relaxed);
    samples_[ours].fetch_add(1, relaxed);
  }
  void settle(Decision decision) { decision_.store(decision, relaxed); }  // somebody else has decided
  void observe(const OnlineRule& rule, bool ours, int64_t bytes, int64_t ns, bool takes) {
    if (bytes <= 0) return;
    note(ours, bytes, ns);
    if (ours) return;  // a pair is complete
    const int before = decision();
    const bool taking = before ? before == kOurs : takes;
    const int now = by_samples(rule, taking);
    if (now == kOpen) return;
    decision_.store(now, relaxed);
    const uint32_t mask = mask_.load(relaxed);
    mask_.store((now == kOurs) == taking ? std::min(kRarest, 2 * mask + 1) : 63, relaxed);
  }
  Decision decision() const { return static_cast<Decision>(decision_.load(relaxed)); }
  int64_t ps_per_byte(bool ours) const { return ps_per_byte_[ours].load(relaxed); }
  uint32_t samples(bool ours) const { return samples_[ours].load(relaxed); }

 private:
  static constexpr uint32_t kRarest = 4095;
  static constexpr std::memory_order relaxed = std::memory_order_relaxed;
  std::atomic<int64_t> ps_per_byte_[2]{};  // library, ours
  std::atomic<uint32_t> samples_[2]{};
  std::atomic<uint32_t> calls_{0}, mask_{63};
  std::atomic<int> decision_{kOpen};

  int by_samples(const OnlineRule& rule, bool taking) const {
    if (samples(false) < rule.least || samples(true) < rule.least) return kOpen;
    const double library = static_cast<double>(ps_per_byte(false)), ours = static_cast<double>(ps_per_byte(true));
    return library >= (taking ? rule.stay : rule.begin) * ours ? kOurs : kLibrary;
  }
};

}  // namespace undertow
