// What pairs of times say: whether one way is faster than another, and whether one that was taken still is.
//
// Times of a busy machine are no sample of anything that has a mean: a slice given to another program is a thousand times
// what is to be measured, and a slow spell lasts for many calls. So two ways are timed close to each other, the least of a
// few each, and of such a pair only its sign counts, and its size in coarse steps where that speaks against what we do.
//
// `Gain` is a bet at even odds on each pair to come. Where neither way is better, nobody multiplies a stake by 400 with a
// probability above 1/400, however long it is played and whatever the noise looks like (Ville's inequality; Shafer and
// Vovk, Game-Theoretic Foundations, 2019): that is how a way is begun. The stake is split between two bettors, one who
// expects nearly all pairs to be won, and decides after eleven, and one who expects three of four.
// `Doubt` is a cumulative sum (Page, 1954) over pairs of a way that is taken: it forgets what spoke for it, so that a change
// is seen soon, and asks for less than `Gain` does, because a way given up in error costs only what it had gained.
#pragma once

#include <algorithm>

namespace undertow {

class Gain {
 public:
  static constexpr double kMargin = 1.03;  // by how much a pair must be won
  static constexpr double kClear = 1.1;    // by how much it is clearly lost
  static constexpr double kBar = 400;      // the stake for which a way is begun
  static constexpr double kBroke = 0.1;    // the one at which nothing more is expected: three lost pairs, two clearly lost

  // A pair: what is done so far, and what may be done. Whether the latter wins.
  bool pair(double now, double other) {
    const bool won = now >= kMargin * other;
    steady_ *= won ? 1.5f : other > kClear * now ? 0.25f : 0.5f;
    bold_ *= won ? 1.9f : 0.1f;
    return won;
  }
  bool found(double bar = kBar) const { return (steady_ + bold_) / 2 >= bar; }
  bool broke() const { return (steady_ + bold_) / 2 < kBroke; }

 private:
  float steady_ = 1, bold_ = 1;
};

class Doubt {
 public:
  static constexpr double kBar = 20;  // three pairs lost by 30 %, five by 10 %, eight by less

  // A pair: the way that could be gone back to, and the one that is taken. True when the latter is to be given up.
  bool pair(double back, double taken) {
    const float step = taken > 1.3 * back ? 3.0f : taken > 1.1 * back ? 2.0f : taken > back ? 1.5f : 0.5f;
    sum_ = std::max(1.0f, sum_ * step);
    return sum_ >= kBar;
  }

 private:
  float sum_ = 1;
};

}  // namespace undertow
