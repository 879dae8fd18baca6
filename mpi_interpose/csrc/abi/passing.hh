// Calls that are known to pass through: one look tells, before anything else is asked.
//
// When the table leaves a message alone, its next call with the same datatype, count, communicator and peer will pass,
// too. A slot keeps a fingerprint of these, mixed with an age that grows whenever an answer may have changed (a datatype
// was committed, a communicator was freed, the mode was switched, freed requests have to be polled). Two messages with one
// fingerprint would only mean that one of them passes through without need. The calls are counted in the slot and reach
// the function's count and the datatype's tally when the slot is given to another, when the datatype dies, and before the
// report is written. What every call reads and writes lies close together, and is declared hidden, because an address
// that the loader has to be asked for costs a load.
#pragma once

#include "driver.hh"
#include "types.hh"

namespace undertow {

struct Passing {
  std::atomic<uint64_t> mark{0};
  std::atomic<int64_t> calls{0};
};
constexpr int kSlots = 4, kSets = 256, kPassing = kSlots * kSets;  // a set is a cache line
extern Passing passing[kPassing] UNDERTOW_HIDDEN;

// What calls ask before they pass.
struct alignas(64) Hot {
  std::atomic<uint64_t> age{0};
  std::atomic<int64_t> entries{0}, orphans{0};  // of the table of requests (requests.hh)
};
extern Hot hot UNDERTOW_HIDDEN;
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

// Of one side of a call of the function `site`. Few operations with small constants: it must do with the registers that
// the call's arguments leave free.
__attribute__((always_inline)) inline uint64_t fingerprint(Site site, Use use, int64_t count, MPI_Datatype type, MPI_Comm comm,
                                                           int peer) {
  const uint64_t what = handle_key(type) + static_cast<uint64_t>(count) * 0x5bd1e995;
  const uint64_t whom = handle_key(comm) + static_cast<uint64_t>(peer) * 0x7feb352d + (2u * site + (use == kRecvUse)) * 0x1000193;
  return (what ^ (whom << 32 | whom >> 32)) * 0x9e3779b97f4a7c15ull;
}

// Its set; the first slot of that is looked at first.
__attribute__((always_inline)) inline Passing* set_of(uint64_t print) {
  return passing + (print >> 56) * kSlots;
}

// 0 when such a call passes by this slot and nothing else has to be looked at.
__attribute__((always_inline)) inline uint64_t doubt(const Passing& slot, uint64_t print) {
  return (slot.mark.load(std::memory_order_relaxed) ^ print ^ hot.age.load(std::memory_order_relaxed)) |
         reinterpret_cast<uint64_t>(gpu::news());
}

struct Owner {  // of a slot
  Site site = kSites;      // where the calls count
  Tally* tally = nullptr;  // and here; null for a datatype without a record
  Record* record = nullptr;
  uint64_t age = 0;  // of its mark
  void count(int64_t calls) const;
};
bool passing_owner(uint64_t print, uint64_t age, Owner* owner);  // false when the call is not known to pass

// `site`: kSites where another side's slot counts the call. `record` may be null. `age`: hot.age before the answer was
// asked for; an older answer is not kept.
void will_pass(uint64_t print, Site site, Use use, Record* record, uint64_t age);
void passing_changed();               // answers may differ from now on
void passing_retired(Record& record); // its datatype died: counts what its slots hold, and empties them
void passing_count();                 // the same for all, before a report

}  // namespace undertow
