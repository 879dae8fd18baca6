// A trial of whole rounds of messages: the library's way, what the table takes, and all that can be taken.
//
// What a table knows was measured on one message at a time. A round is another thing: twelve messages share caches and a
// transport, and a send that is packed may be best only where the receives are, too. So rounds that come again and again
// are tried in each way for a few in a row (after a change of way, caches and the transport's buffers are the other
// way's, so the first of these does not count), and the least time of each way decides. After the first turn, and every
// later one, a way that does not promise a gain is given up and its rounds go the library's way; when none is left, the
// trial is over. No clock and no MPI in here. Which way a round is meant for never depends on what was measured, and a
// trial cut short is followed by a longer rest: ranks that run the same rounds stay in step, and each sees the others go
// the way that it goes itself, as long as they find the same.
#pragma once

#include <algorithm>
#include <cstdint>

namespace undertow {

enum Way : int { kLibraryWay, kTableWay, kAllWay, kWays };

class Trial {
 public:
  static constexpr int kRow = 3, kTurns = 4, kBegin = 4;  // rounds in a row; times that each way is tried; before the first
  static constexpr int kTurn = kRow * kWays, kWhole = kTurn * kTurns;  // rounds of one turn, of a trial
  static constexpr int kRest = 512, kLongest = 65536;      // rounds between trials: doubled each time
  static constexpr double kBegins = 1.08, kStays = 1.05;   // gains for which a way is taken that was not, or is kept
  static constexpr double kPromise = 1.03, kDoubt = 0.9;   // gains so far for which such ways are tried on
  static constexpr double kHopeless = 1.3;                 // loss for which a way is not tried again

  // The way of the next round. `timed()`: whether its time is wanted.
  Way next() {
    if (rest_ > 0) {
      timed_ = false;
      return chosen_;
    }
    timed_ = true;
    if (at_ == 0) out_ = hopeless_;
    way_ = static_cast<Way>(at_ / kRow % kWays);
    if (is_out(way_)) way_ = is_out(chosen_) ? kLibraryWay : chosen_;
    return way_;
  }
  bool timed() const { return timed_; }

  // After that round; true when the trial has ended with it. `tables`: the table takes some of its messages.
  bool done(int64_t ns, bool tables) {
    if (!timed_) {
      --rest_;
      return false;
    }
    if (at_ % kRow > 0) least_[way_] = least_[way_] ? std::min(least_[way_], ns) : ns;
    if (++at_ % kTurn > 0 || (at_ < kWhole && promises(tables))) return false;
    decide();
    rest_ = kWhole - at_ + pause_;
    at_ = 0;
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

  // Rounds until the next that is timed, all of which go the chosen way; and that so many of them have been.
  int rest() const { return rest_; }
  void rested(int rounds) { rest_ -= rounds; }

 private:
  Way chosen_ = kTableWay, way_ = kTableWay;
  bool timed_ = false;
  unsigned hopeless_ = 0, out_ = 0;  // a bit for each way: for good, and in this trial
  int at_ = 0, rest_ = kBegin, pause_ = kRest;
  int64_t least_[kWays] = {};

  bool is_out(Way way) const { return out_ >> way & 1; }

  // Gives up what is no better than the library's way so far; whether anything is left to be tried.
  bool promises(bool tables) {
    if (!tables) out_ |= 1u << kTableWay;  // it is the library's
    for (const Way way : {kTableWay, kAllWay})
      if (static_cast<double>(least_[kLibraryWay]) < (way == chosen_ ? kDoubt : kPromise) * static_cast<double>(least_[way]))
        out_ |= 1u << way;
    return !is_out(kTableWay) || !is_out(kAllWay);
  }

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
