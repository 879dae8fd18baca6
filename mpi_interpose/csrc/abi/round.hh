// Rounds: the nonblocking messages that a thread starts until one MPI_Waitall completes just these.
//
// The time of one nonblocking message cannot be told from that of its neighbours, but the time a whole round spends in
// MPI can: the starting calls and the Waitall, without what the program computes between them. So all messages of a timed
// round that the table takes go the same way, and what it took counts for each of them by its bytes. Only a thread whose
// last round ended with such a Waitall is timed; one that completes its requests otherwise pays a few loads per call.
#pragma once

#include "model.hh"

namespace undertow {

struct Round {
  static constexpr int kMost = 32;  // messages that are remembered; more only count in bytes
  struct Part {
    Record* record = nullptr;  // held
    Use use{};
    int link = 0;
    int64_t bytes = 0;
  };
  int posts = 0;         // nonblocking messages started since the last completion, ours or not
  bool regular = false;  // the last round was completed by one Waitall
  bool decided = false, timed = false, ours = false;
  int parts = 0;
  uintptr_t first = 0;  // the request of the first message that was started under the clock
  bool has_first = false;
  int64_t bytes = 0, ns = 0, mark_ns = 0;
  Part part[kMost] = {};  // all constant, so that no access asks whether it was constructed

  void add(Record* record, Use use, int link, int64_t message_bytes) {
    bytes += message_bytes;
    if (parts == kMost) return;
    hold(record);
    part[parts++] = Part{record, use, link, message_bytes};
  }

  // Counts what was measured if `valid`, and begins anew.
  void finish(bool valid) {
    posts = 0, decided = false;
    if (!timed) return;
    const double each = bytes > 0 ? static_cast<double>(ns) / static_cast<double>(bytes) : 0;
    for (int k = 0; k < parts; ++k) {
      const Part& p = part[k];
      if (valid) observe(*p.record, p.use, p.link, ours, p.bytes, static_cast<int64_t>(each * p.bytes), true);
      release(p.record);
    }
    parts = 0;
    timed = has_first = false;
    bytes = ns = 0;
  }
};

inline thread_local Round this_round __attribute__((tls_model("initial-exec")));

// Around the call that starts a nonblocking message.
inline void round_enter() {
  if (this_round.timed) this_round.mark_ns = now_ns();
}
inline void round_leave(MPI_Request* request, int rc) {
  Round& r = this_round;
  ++r.posts;
  if (!r.timed) return;
  r.ns += now_ns() - r.mark_ns;
  if (!r.has_first && rc == MPI_SUCCESS && request) r.first = handle_key(*request), r.has_first = true;
}

// A call that completes some other way.
inline void round_break() {
  if (this_round.posts) this_round.finish(false), this_round.regular = false;
}

// Around a Waitall: begins before the library's call, which forgets the handles, and ends after our unpacking.
class RoundEnd {
 public:
  RoundEnd(int n, const MPI_Request* requests) {
    Round& r = this_round;
    whole_ = r.posts > 0 && n == r.posts && requests;
    if (!r.timed || !whole_) return;
    bool there = false;
    for (int i = 0; i < n && r.has_first; ++i) there |= handle_key(requests[i]) == r.first;
    whole_ = there;
    if (whole_) start_ns_ = now_ns();
  }
  RoundEnd(const RoundEnd&) = delete;
  RoundEnd& operator=(const RoundEnd&) = delete;
  int done(int rc) {
    Round& r = this_round;
    if (!r.posts) return rc;
    if (start_ns_) r.ns += now_ns() - start_ns_;
    r.finish(start_ns_ && rc == MPI_SUCCESS);
    r.regular = whole_ && rc == MPI_SUCCESS;
    return rc;
  }

 private:
  bool whole_ = false;
  int64_t start_ns_ = 0;
};

}  // namespace undertow
