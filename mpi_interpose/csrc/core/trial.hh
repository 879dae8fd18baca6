// A trial of whole rounds of messages: the library's way, what the table takes, and all that can be taken.
//
// What a table knows was measured on one message at a time. A round is another thing: twelve messages share caches and a
// transport, and a send that is packed may be best only where the receives are, too. So rounds that come again and again
// are tried in each way for a few in a row (after a change of way, caches and the transport's buffers are the other
// way's, so the first of these does not count), four times over, and the least time of each way decides. No clock and no MPI in
// here. The order and the number of rounds never depend on what was measured: ranks that run the same rounds stay in
// step, and each sees the others go the way that it goes itself.
#pragma once

#include <algorithm>
#include <cstdint>

namespace undertow {

enum Way : int { kLibraryWay, kTableWay, kAllWay, kWays };

class Trial {
 public:
  static constexpr int kRow = 3, kTurns = 4, kBegin = 4;  // rounds in a row; times that each way is tried; before the first
  static constexpr int kRest = 512, kLongest = 65536;      // rounds between trials: doubled each time
  static constexpr double kBegins = 1.08, kStays = 1.05;   // gains for which a way is taken that was not, or is kept
  static constexpr double kHopeless = 1.3;                 // loss for which a way is not tried again

  // The way of the next round. `timed()`: whether its time is wanted.
  Way next() {
    if (rest_ > 0) {
      timed_ = false;
      return chosen_;
    }
    timed_ = true;
    way_ = static_cast<Way>(at_ / kRow % kWays);
    if (hopeless_ >> way_ & 1) way_ = chosen_;
    return way_;
  }
  bool timed() const { return timed_; }

  // After that round; true when the trial has ended with it.
  bool done(int64_t ns) {
    if (!timed_) {
      --rest_;
      return false;
    }
    if (at_ % kRow > 0) least_[way_] = least_[way_] ? std::min(least_[way_], ns) : ns;
    if (++at_ < kRow * kTurns * kWays) return false;
    decide();
    at_ = 0;
    rest_ = pause_;
    pause_ = std::min(2 * pause_, kLongest);
    return true;
  }

  // Nothing in these rounds could be taken, or they were others than before: begin again after `rounds`.
  void put_off(int rounds) {
    at_ = 0;
    rest_ = rounds;
    std::fill(least_, least_ + kWays, 0);
  }
  Way chosen() const { return chosen_; }

 private:
  Way chosen_ = kTableWay, way_ = kTableWay;
  bool timed_ = false;
  unsigned hopeless_ = 0;
  int at_ = 0, rest_ = kBegin, pause_ = kRest;
  int64_t least_[kWays] = {};

  void decide() {
    // In doubt the library's: what is packed must be worth it, and what is new clearly so.
    const auto cost = [&](Way way) {
      return static_cast<double>(least_[way]) * (way == kLibraryWay ? 1 : way == chosen_ ? kStays : kBegins);
    };
    Way best = chosen_;
    for (const Way way : {kLibraryWay, kTableWay, kAllWay})
      if (least_[way] && least_[best] && cost(way) < cost(best)) best = way;
    for (int way = kTableWay; way < kWays; ++way)
      if (least_[kLibraryWay] && least_[way] > kHopeless * least_[kLibraryWay]) hopeless_ |= 1u << way;
    chosen_ = best;
    std::fill(least_, least_ + kWays, 0);
  }
};

}  // namespace undertow
