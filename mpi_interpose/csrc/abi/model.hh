// Which path for this call: the measured table (core/policy.hh), and for local calls a running comparison.
//
// Pass-through is the default: a path is taken only where the table, measured on this MPI, shows a gain of kGain. A
// record keeps the answer per use, link to the peer and size, so a call costs one load. MPI_Pack, MPI_Unpack and the
// blocking sends and receives are also timed while the program runs (core/online.hh); what these samples say of a
// message holds for all calls of its kind.
#pragma once

#include "types.hh"

namespace undertow {

constexpr double kGain = 1.04;            // to take a path
constexpr double kCollectiveGain = 1.5;   // the table is measured on two ranks
constexpr int64_t kLargestCopy = 1 << 30; // a message's slab; larger ones would double the program's memory

void model_init();  // UNDERTOW_MPI_MODEL, else model.txt beside this library, else the built-in table of the flavour
double model_ratio(Record& record, Use use, int link, int64_t bytes);  // time without us / with us; negative: unknown

double link_slower(int link, int base);  // by the table: what sends take over `link` to what they take over `base`; 0: not known

int64_t now_ns();

// For pack and unpack in auto mode.
Choice choose_local(Record& record, Use use, int64_t bytes);
void observe(Record& record, Use use, int link, bool ours, int64_t bytes, int64_t ns);
Samples& round_of(Record& record, Use use, int link, int64_t bytes);  // what rounds of nonblocking messages say (round.hh)

bool small_enough(int64_t bytes);  // for a slab; the report tells of messages that are not

// A message's time from its side's making to its end, taken of a few blocking calls.
class Stopwatch {
 public:
  Stopwatch() = default;
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;
  ~Stopwatch() {
    if (record_) stop();
  }
  void start(Record* record, Use use, int link, int64_t bytes, bool ours);

 private:
  Record* record_ = nullptr;  // held
  Use use_{};
  int link_ = 0;
  int64_t bytes_ = 0, start_ns_ = 0;
  bool ours_ = false;
  void stop();
};

// How a message may be timed: not at all, as one blocking call, or with the round of nonblocking ones that it is in. A
// persistent one is not timed, and decided for good (patience.hh).
enum class Timed { No, Call, Round, Lasting };

// Take it; pass it; or pass it and every other call alike, whatever the running program measures.
enum class Verdict { Take, Pass, PassAlways };

// For messages; counts the decision. Collectives ask for more gain. `watch` is started where a blocking call is timed.
Verdict judge(Record* record, Use use, int64_t count, const Peer& peer, double gain, Timed timed, Stopwatch* watch);
inline bool wanted(Record* record, Use use, int64_t count, const Peer& peer, double gain) {
  return judge(record, use, count, peer, gain, Timed::No, nullptr) == Verdict::Take;
}

}  // namespace undertow
