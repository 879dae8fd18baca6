// Rounds: the nonblocking messages that a thread starts until one MPI_Waitall completes just these.
//
// The time of one nonblocking message cannot be told from that of its neighbours, but the time a whole round spends in
// MPI can: the starting calls and the Waitall, without what the program computes between them. A round is known again by
// its messages (datatype, count, communicator and peer of each, in their order). Rounds that come again are tried in
// several ways (core/trial.hh), and what a trial decides holds for the nonblocking messages of these datatypes, sizes and
// kinds of peer. Only a thread whose last round ended with such a Waitall looks for the round that begins; one that
// completes its requests otherwise pays a few loads per call. Between trials nothing is asked of a round: after some that
// were alike and whose messages are all known to pass, a script (script.hh) serves those that are left until the next
// trial, as long as they go on to be alike.
#pragma once

#include "model.hh"
#include "script.hh"
#include "trial.hh"

namespace undertow {

constexpr double kTry = 0.6;  // the table's worst gain for a message that a trial may take
constexpr unsigned kUnasked = 64;  // messages of no known round that pass without a question while we wait

// What a thread knows of rounds that begin with one message.
struct Habit {
  uint64_t first = 0, whole = 0;  // fingerprints of the first message and of all
  uint64_t judged = 0;            // of the rounds that the trial knows
  int wait = 64;                  // rounds to the next look at the clock, while there is no trial yet (patience.hh)
  Trial trial;
};

struct Member {  // a message of a timed round that may go either way
  Record* record = nullptr;  // held
  Use use{};
  int link = 0;
  int64_t bytes = 0;
  bool ours = false, table = false;  // went our way; would by the table
};

struct Habits {  // of a thread; made when its first round has been completed by one Waitall
  static constexpr int kKnown = 16, kMost = 64;  // rounds that are remembered; messages of one, more only count in bytes
  Habit known[kKnown];
  Member part[kMost];
  Script script;
  explicit Habits(Reader& reader) : script(reader) {}
};

struct Round {
  enum : unsigned { kLooks = 1, kTimed = 2 };
  unsigned attends = 0;  // why a call must come the long way. kLooks: the last round was completed by one Waitall, so the
                         // next message may begin a round that is known
  int posts = 0;         // nonblocking messages started since the last completion, ours or not
  uint64_t prints = 0;   // their fingerprints
  uint64_t usual = 0;    // those of the last whole round
  int alike = 0, patience = 4;  // whole rounds alike in a row; how many it takes before a script begins
  Reader reader;
  bool served = false;  // a script has ended in this round
  bool clocked = false;  // its time counts; of a timed round that is the first of a row it does not
  Way way = kTableWay;
  int parts = 0;
  unsigned strangers = 0;  // messages of no known round while we wait; after the first ones, those that the table takes
  uintptr_t first = 0;  // the request of the first message that was started under the clock
  bool has_first = false;
  int64_t bytes = 0, ns = 0, mark_ns = 0;
  Habit* habit = nullptr;  // of this round, or of those that the script serves
  Habits* all = nullptr;   // every member has a constant to begin with, so that no access asks whether it was constructed

  bool looks() const { return attends & kLooks; }
  bool timed() const { return attends & kTimed; }
  void post(uint64_t print) {
    ++posts;
    prints = (prints << 7 | prints >> 57) ^ print;
  }
  void post(uint64_t print, const Line& line) {
    if (all) all->script.note(posts, line, print);
    post(print);
  }
  void clear() { posts = 0, prints = 0; }
};

inline thread_local Round this_round __attribute__((tls_model("initial-exec")));

void round_opens(Round& round, uint64_t print);  // before the first message of what may be a known round
bool round_takes(Record& record, Use use, int link, int64_t bytes, double ratio);  // of a message in a timed round
void round_closes(Round& round, bool whole, bool valid);  // whole: by one Waitall; valid: its time is the round's own
void script_ends(Round& round);  // what it served is counted, and the round goes on as if there had been none
// Another message than the script's.
inline void leave_script() {
  if (this_round.reader.end) script_ends(this_round);
}
// Another completion; between two rounds the script stays.
inline void interrupt_script() {
  if (this_round.reader.at != this_round.reader.begin) leave_script();
}

// Around the call that starts a nonblocking message. Of one that passes only the library's time counts: when rounds are not
// timed, next to nothing is asked before it, while one that is packed is asked about and packed each time. Reading the clock
// is much of what a timed round costs, so none is read that does not count.
inline void round_mark() {
  if (this_round.clocked) this_round.mark_ns = now_ns();
}
inline void round_enter() {  // before it is known whether this one is packed
  if (this_round.way != kLibraryWay || gpu::news()) round_mark();
}
inline void round_packs() {  // in the library's way, too, if its peer's link is not known
  if (this_round.way == kLibraryWay) round_mark();
}
inline void round_passes() { round_mark(); }
inline void round_leave(uint64_t print, const Line& line, MPI_Request* request, int rc) {
  Round& r = this_round;
  r.post(print, line);
  if (!r.timed()) return;
  if (r.clocked) r.ns += now_ns() - r.mark_ns;
  if (!r.has_first && rc == MPI_SUCCESS && request) r.first = handle_key(*request), r.has_first = true;
}

// A call that completes some other way.
inline void round_break() {
  Round& r = this_round;
  interrupt_script();
  if (r.posts && (r.habit || r.attends)) round_closes(r, false, false);
  else r.clear();
}

// Around a Waitall: begins before the library's call, which forgets the handles, and ends after our unpacking.
class RoundEnd {
 public:
  RoundEnd(int n, const MPI_Request* requests) {
    Round& r = this_round;
    whole_ = r.posts > 0 && n == r.posts && requests;
    if (!r.timed() || !whole_) return;
    bool there = false;
    for (int i = 0; i < n && r.has_first; ++i) there |= handle_key(requests[i]) == r.first;
    whole_ = there;
    if (whole_ && r.clocked) start_ns_ = now_ns();
  }
  RoundEnd(const RoundEnd&) = delete;
  RoundEnd& operator=(const RoundEnd&) = delete;
  int done(int rc) {
    Round& r = this_round;
    if (!r.posts) return rc;
    if (start_ns_) r.ns += now_ns() - start_ns_;
    round_closes(r, whole_ && rc == MPI_SUCCESS, start_ns_ && rc == MPI_SUCCESS);
    return rc;
  }

 private:
  bool whole_ = false;
  int64_t start_ns_ = 0;
};

}  // namespace undertow
