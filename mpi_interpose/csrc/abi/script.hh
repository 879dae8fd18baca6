// A script: the messages of a round that comes again and again, in their order, known to pass (see passing.hh, round.hh).
//
// A call that is the next one of the script needs no fingerprint and no search: it is compared with its line, and the
// lines lie in a row. Calls are counted for the round as a whole, when the script ends and before a report. The script
// ends with the first call that is another than its line says; the messages before that are then counted by the round as
// if there had been none. It ends, too, when the answers that it was made of may have changed (passing_changed): at once
// in the thread that changed them, in others with the round that is under way, whose messages pass without need.
#pragma once

#include "passing.hh"

namespace undertow {

struct Line {
  uintptr_t type = 0, comm = 0;
  int64_t count = 0;
  uint64_t whom = 0;  // peer and function; 0: matches nothing
};

__attribute__((always_inline)) inline Line line_of(Site site, int64_t count, MPI_Datatype type, MPI_Comm comm, int peer) {
  return {handle_key(type), handle_key(comm), count, static_cast<uint64_t>(static_cast<uint32_t>(peer)) << 32 | (site + 1u)};
}

extern const Line no_line UNDERTOW_HIDDEN;

// Where a thread is in its script.
struct Reader {
  const Line *at = &no_line, *end = nullptr, *begin = nullptr;  // `end` null: no script
  uint64_t age = 0;          // hot.age when the script began
  std::atomic<int> left{0};  // rounds that it may still serve, this one too

  // Whether this call is what the script says, which is all there is to ask about it.
  __attribute__((always_inline)) bool reads(const Line& call) {
    const Line* const line = at;
    const uint64_t differs = (line->type ^ call.type) | (line->comm ^ call.comm) | static_cast<uint64_t>(line->count ^ call.count) |
                             (line->whom ^ call.whom) | reinterpret_cast<uint64_t>(gpu::news());
    if (__builtin_expect(differs != 0, 0)) return false;
    at = line + 1;
    return true;
  }
  // Whether a Waitall of `n` requests completes a round of the script. The last one is for round.cc to see.
  __attribute__((always_inline)) bool completes(int n) {
    const int more = left.load(std::memory_order_relaxed);
    if ((at != end) | (more <= 1) | (n != end - begin) | (hot.age.load(std::memory_order_relaxed) != age)) return false;
    left.store(more - 1, std::memory_order_relaxed);
    at = begin;
    return true;
  }
};

// What a thread keeps for its scripts, apart from what every call reads.
void scripts_settle(const Record* dying);  // of all threads: before a report, and before a datatype's record goes
int64_t scripted_rounds();  // served by scripts until the last settling

class Script {
 public:
  static constexpr int kMost = 64;  // messages; rounds of more have no script
  explicit Script(Reader& reader);
  ~Script();
  Script(const Script&) = delete;
  Script& operator=(const Script&) = delete;

  // While no script runs: the message number `k` of this round.
  void note(int k, const Line& line, uint64_t print) {
    if (k < kMost) line_[k] = line, print_[k] = print;
  }
  // Begins with the last `n` notes, for at most `rounds` rounds; false where one of them is not known to pass.
  bool begin(int n, int rounds);
  // Ends it. Messages of the round that is under way: `posts`, with their fingerprints. Rounds served before it.
  int end(int* posts, const uint64_t** prints);

 private:
  friend void scripts_settle(const Record* dying);
  void settle();  // counts the rounds served since the last time

  Reader& reader_;
  int rounds_ = 0, counted_ = 0;
  Line line_[kMost + 1];  // the one after the last matches nothing
  uint64_t print_[kMost] = {};
  Owner owner_[kMost];
};

}  // namespace undertow
