// A trial of whole rounds of messages: the library's way, what the table takes, and all that can be taken.
//
// What a table knows was measured on one message at a time. A round is another thing: twelve messages share caches and a
// transport, and a send that is packed may be best only where the receives are, too. So rounds that come again and again
// are tried in each way, a few in a row (after a change of way, caches and the transport's buffers are the other way's, so
// the first of these does not count), and the least of a row stands beside the least of the rows next to it. Turn for turn
// such pairs are evidence (evidence.hh): a way is begun only where it is clear, else the rounds go the library's way. Between
// turns rounds go the way that is chosen by then, so that a trial is the smaller part of any program's time. A way that is
// taken is compared with the library's in a few rounds now and then, and given up when these speak against it.
// No clock and no MPI in here. Which way a round is meant for, and which are timed, never depends on what was measured, and
// a trial cut short is followed by a longer rest: ranks that run the same rounds stay in step. Each rank goes the way that
// is meant as long as it may find it better, so that it sees the others go the way that it goes itself; in a check, each
// goes the way that it has decided for, so that ranks which decided otherwise are seen as they are.
#pragma once

#include <algorithm>
#include <cstdint>

#include "evidence.hh"

namespace undertow {

enum Way : int { kLibraryWay, kTableWay, kAllWay, kWays };

class Trial {
 public:
  static constexpr int kBegin = 4;                          // rounds before the first trial
  static constexpr int kTurns = 28, kQuick = 11;            // turns of a trial at most; those with short rows
  static constexpr int kShort = 3, kLong = 5;               // rounds in a row
  static constexpr int kConfirms = 8;                       // turns after a way was begun
  static constexpr int kPause = 1, kLongPause = 3;          // turn lengths that the chosen way goes after each turn
  static constexpr int kWhole =                             // rounds of a trial
      kWays * (kQuick * kShort * (1 + kPause) + (kTurns - kQuick) * kLong * (1 + kLongPause));
  static constexpr int kRest = 512, kLongest = 65536;       // rounds between trials: doubled each time
  static constexpr int kSoon = 64, kSeldom = 1024, kCheck = 2 * kShort;  // between checks, doubled; of a check
  static constexpr double kHopeless = 1.3;                  // loss for which a way is given up at once
  static constexpr int kBurns = 3;                          // times that a way given up again makes the next one harder

  // The way of the next round. `timed()`: whether it belongs to a trial or check.
  Way next() {
    timed_ = rest_ == 0;
    if (!timed_) return chosen_;
    if (!checking_ && turn_ == 0 && row_ == 0 && at_ == 0) begin();
    way_ = meant();
    if (is_out(way_)) way_ = chosen_;
    return way_;
  }
  bool timed() const { return timed_; }
  bool clocked() const { return timed_ && at_ > 0; }  // and whether it counts, which of the first of a row it does not

  // After that round; true when what `chosen` says is news. `tables`: the table takes some of its messages.
  bool done(int64_t ns, bool tables) {
    if (!timed_) {
      --rest_;
      return false;
    }
    ++spent_;
    if (at_ > 0) least_ = least_ ? std::min(least_, ns) : ns;
    if (++at_ < row_length()) return false;
    row_ns_[meant()] = static_cast<double>(std::max<int64_t>(1, least_));
    at_ = 0;
    least_ = 0;
    if (++row_ < (checking_ ? 2 : kWays)) return false;
    row_ = 0;
    return checking_ ? checked() : turned(tables);
  }

  // Nothing in these rounds could be taken, or they were others than before: begin again after `rounds`.
  void put_off(int rounds) {
    at_ = row_ = turn_ = spent_ = until_ = 0;
    checking_ = false;
    rest_ = rounds;
    least_ = 0;
  }
  // From now on other rounds are meant than those that were judged: nothing is known of them.
  void forget() {
    chosen_ = kTableWay;
    tried_ = false;
    burned_ = 0;
    std::fill(hopeless_, hopeless_ + kWays, 0);
    std::fill(gain_, gain_ + kWays, Gain());
    doubt_ = Doubt();
  }
  Way chosen() const { return chosen_; }

  // Rounds until the next that is timed, all of which go the chosen way; and that so many of them have been.
  int rest() const { return rest_; }
  void rested(int rounds) { rest_ -= rounds; }

 private:
  Way chosen_ = kTableWay, way_ = kTableWay;  // until the first trial, what the table says
  bool timed_ = false, checking_ = false, tried_ = false;
  unsigned out_ = 0;                  // a bit for each way that is given up in this trial
  int turn_ = 0, row_ = 0, at_ = 0;   // of the trial; of the turn or check; round of the row
  int spent_ = 0, confirms_ = 0;      // rounds of this trial; turns that are still wanted after a way was begun
  int rest_ = kBegin, until_ = 0;     // rounds to the next that is timed; more that lie before the next trial
  int pause_ = kRest, gap_ = kSoon;
  unsigned checks_ = 0;
  int burned_ = 0, all_over_table_ = 0;
  int hopeless_[kWays] = {};          // trials in which it lost by kHopeless; after two it is not tried again
  int64_t least_ = 0;                 // of this row
  double row_ns_[kWays] = {};         // of this turn
  double trial_ns_[kWays] = {};       // the least row of the trial
  Gain gain_[kWays];
  Doubt doubt_;

  bool is_out(Way way) const { return out_ >> way & 1; }
  int row_length() const { return checking_ || turn_ < kQuick ? kShort : kLong; }

  // Every other turn and check goes backwards: what the machine does slowly meets all ways alike.
  Way meant() const {
    if (checking_) return (row_ + checks_) % 2 ? chosen_ : kLibraryWay;
    return static_cast<Way>(turn_ % 2 ? kWays - 1 - row_ : row_);
  }

  void begin() {
    if (!tried_) chosen_ = kLibraryWay;
    tried_ = true;
    out_ = 0;
    spent_ = confirms_ = all_over_table_ = 0;
    std::fill(trial_ns_, trial_ns_ + kWays, 0);
    for (const Way way : {kTableWay, kAllWay}) {  // what was left open in the last trial goes on in this one
      if (gain_[way].broke()) gain_[way] = Gain();
      if (hopeless_[way] >= 2 && way != chosen_) out_ |= 1u << way;
    }
  }

  double bar() const { return Gain::kBar * (1 << 2 * std::min(burned_, kBurns)); }

  // Whether the way that is taken loses; then it is no longer.
  bool taken_back() {
    if (chosen_ == kLibraryWay || !doubt_.pair(row_ns_[kLibraryWay], row_ns_[chosen_])) return false;
    chosen_ = kLibraryWay;
    ++burned_;
    doubt_ = Doubt();
    gain_[kTableWay] = gain_[kAllWay] = Gain();
    return true;
  }

  // After a turn; whether the trial is over.
  bool turned(bool tables) {
    ++turn_;
    if (!tables && chosen_ != kTableWay) out_ |= 1u << kTableWay;  // it is the library's
    for (int way = 0; way < kWays; ++way)
      if (trial_ns_[way] == 0 || row_ns_[way] < trial_ns_[way]) trial_ns_[way] = row_ns_[way];
    bool news = taken_back() || turn_ == 1;  // by now nothing is taken unasked
    const double now = row_ns_[chosen_];
    bool found[kWays] = {}, open = false;
    for (const Way way : {kTableWay, kAllWay}) {
      if (is_out(way) || way == chosen_) continue;
      gain_[way].pair(now, row_ns_[way]);
      found[way] = gain_[way].found(bar());
      if (gain_[way].broke() || (turn_ == 1 && row_ns_[way] > kHopeless * now)) out_ |= 1u << way;
      open |= !is_out(way);
    }
    if (!is_out(kTableWay) && !is_out(kAllWay)) all_over_table_ += row_ns_[kTableWay] >= Gain::kMargin * row_ns_[kAllWay] ? 1 : -1;
    if (confirms_ > 0) --confirms_;
    if (found[kTableWay] || found[kAllWay]) {
      chosen_ = found[kTableWay] && !(found[kAllWay] && all_over_table_ > 0) ? kTableWay : kAllWay;
      doubt_ = Doubt();
      gain_[kTableWay] = gain_[kAllWay] = Gain();
      confirms_ = kConfirms;
      news = true;
    }
    if (turn_ < kTurns && (open || confirms_ > 0)) {
      rest_ = turn_ <= kQuick ? kPause * kWays * kShort : kLongPause * kWays * kLong;
      spent_ += rest_;
      return news;
    }
    for (const Way way : {kTableWay, kAllWay})
      if (way != chosen_ && trial_ns_[way] > kHopeless * trial_ns_[kLibraryWay]) ++hopeless_[way];
    turn_ = 0;
    rest_ = kWhole - spent_;
    until_ = pause_;
    pause_ = std::min(2 * pause_, kLongest);
    go_on();
    return true;
  }

  bool checked() {
    ++checks_;
    const bool news = taken_back();
    go_on();
    return news;
  }

  // Rests until the next check or trial; where the library's way is taken there is nothing to check.
  void go_on() {
    do {
      const int rounds = std::min(gap_, until_);
      gap_ = std::min(2 * gap_, kSeldom);
      until_ -= rounds;
      rest_ += rounds;
      checking_ = until_ > 0;
      if (checking_ && chosen_ == kLibraryWay) {
        rest_ += kCheck;
        ++checks_;
      }
    } while (checking_ && chosen_ == kLibraryWay);
  }
};

}  // namespace undertow
