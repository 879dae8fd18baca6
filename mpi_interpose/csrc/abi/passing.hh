// Calls that are known to pass through: one look tells, before anything else is asked.
//
// When the table leaves a message alone, its next call with the same datatype, count, communicator and peer will pass,
// too. A slot keeps a fingerprint of these, mixed with an age that grows whenever an answer may have changed (a datatype
// was committed, a communicator was freed, the mode was switched). Two messages with one fingerprint would
// only mean that one of them passes through without need. The calls are counted in the slot and reach the datatype's
// tally when the slot is given to another, when the datatype dies, and before the report is written.
#pragma once

#include "types.hh"

namespace undertow {

struct Passing {
  std::atomic<uint64_t> mark{0};
  std::atomic<int64_t> calls{0};
  Tally* tally = nullptr;  // where the calls count; null for a datatype without a record. Under the lock of passing.cc.
  Record* record = nullptr;
};
constexpr int kPassing = 256;
extern Passing passing[kPassing];
extern std::atomic<uint64_t> passing_age;
extern bool threads_may_race;  // the program was granted MPI_THREAD_MULTIPLE

// A counter that threads may lose now and then: a locked addition costs as much as the rest of a call that passes.
__attribute__((always_inline)) inline void count_loosely(std::atomic<int64_t>& n) {
  n.store(n.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
}
// One that must not lose anything, without a lock where only one thread at a time calls MPI.
inline void add(std::atomic<int64_t>& n, int64_t more) {
  if (threads_may_race)
    n.fetch_add(more, std::memory_order_relaxed);
  else
    n.store(n.load(std::memory_order_relaxed) + more, std::memory_order_relaxed);
}

// A nonblocking message may be judged otherwise than a blocking one.
constexpr int kIsend = kUses, kIrecv = kUses + 1;

__attribute__((always_inline)) inline uint64_t fingerprint(int use, int64_t count, MPI_Datatype type, MPI_Comm comm, int peer) {
  const uint64_t a = handle_key(type) + static_cast<uint64_t>(count) * 0x9e3779b97f4a7c15ull + 0x8bb84b93962eacc9ull;
  const uint64_t b = handle_key(comm) + (static_cast<uint64_t>(static_cast<uint32_t>(peer)) * 8 + use + 1) * 0xd6e8feb86659fd93ull;
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// The slot of such a call when it passes, else NULL.
__attribute__((always_inline)) inline Passing* known_to_pass(uint64_t print) {
  Passing& p = passing[print % kPassing];
  return p.mark.load(std::memory_order_relaxed) == (print ^ passing_age.load(std::memory_order_relaxed)) ? &p : nullptr;
}

// `record` may be null. `age`: passing_age before the answer was asked for; an older answer is not kept.
void will_pass(uint64_t print, Use use, Record* record, uint64_t age);
void passing_changed();               // answers may differ from now on
void passing_retired(Record& record); // its datatype died: counts what its slots hold, and empties them
void passing_count();                 // the same for all, before a report

}  // namespace undertow
