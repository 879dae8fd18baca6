// When to begin to learn: not before the program has run for so long that the price of it is little beside that time.
//
// Before a type's first use what the library packs is compared with the IR (prove.cc), which takes some 30 µs for a small
// one and many ms for one that reaches over MiB, and a trial of rounds takes rounds of its own. A program that ends sooner
// than this pays would be slower for us. So until then its rounds of nonblocking messages go the library's way, at the cost
// of calls that pass. Ranks that run the same rounds look at the clock in the same ones, ever fewer, so that nearly always
// they begin together. Other calls (blocking, local, collective) are taken from the start with small types, because each
// that gains gains by itself, and with a type that reaches far when its own time has come. Persistent requests are made to
// be used again and again and decided once: they do not wait.
#pragma once

#include "types.hh"

namespace undertow {

void patience_init();  // UNDERTOW_MPI_PATIENCE_MS: for all that waits alike; 0: learn at once
void patience_end();   // learn from now on: a measuring program chooses the ways itself

namespace patience {
inline std::atomic<bool> rounds_wait{false};         // still
inline std::atomic<int64_t> served_reach{INT64_MAX};  // other calls wait still if their type reaches further
}
inline bool waiting() { return patience::rounds_wait.load(std::memory_order_relaxed); }

// Of types that reach no further rounds wait the least time, whatever the table says of them: it is not asked until then.
constexpr int64_t kNear = 1 << 18;
inline bool reaches_far(const Record& r) { return r.plan.ir->hi - r.plan.ir->lo > kNear; }

void wait_for(const Record& wanted);  // this type is to be used when the time of rounds has come
bool waits_on();                      // looks at the clock; false from when the time of rounds has come

bool still_too_soon(const Record& wanted, bool taken);  // looks at the clock
// Whether a call goes the library's way because its type reaches far, though it would be `taken`, or timed to learn whether
// it should. No clock is read once nothing waits any more, nor for a type that has been compared.
inline bool too_soon(const Record& wanted, bool taken = true) {
  const int64_t served = patience::served_reach.load(std::memory_order_relaxed);
  return __builtin_expect(served != INT64_MAX, 0) && wanted.plan.ir->hi - wanted.plan.ir->lo > served &&
         still_too_soon(wanted, taken);
}
int64_t too_soon_calls();  // sides of calls that would have been taken, for the report

}  // namespace undertow
