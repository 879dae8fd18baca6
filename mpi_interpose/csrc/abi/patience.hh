// When to begin to learn from rounds of nonblocking messages: not before the program has run for so long that the price of
// it is little beside that time.
//
// Before a type's first use what the library packs is compared with the IR (prove.cc), which takes some 30 µs for a small
// one and many ms for one that reaches over MiB, and a trial takes rounds of its own. A program that ends sooner than this
// pays would be slower for us. So until then its nonblocking messages go the library's way, at the cost of calls that pass.
// Ranks that run the same rounds look at the clock in the same ones, ever fewer, so that nearly always they begin together.
// Blocking calls, collectives and local packs are taken from the start: there each call that gains gains by itself.
#pragma once

#include <atomic>

#include "types.hh"

namespace undertow {

void patience_init();  // UNDERTOW_MPI_PATIENCE_MS: for all types alike; 0: learn at once

namespace patience {
inline std::atomic<bool> waits{false};  // still
}
inline bool waiting() { return patience::waits.load(std::memory_order_relaxed); }

void wait_for(const Record& wanted);  // this type is to be used when the time has come
bool waits_on();                      // looks at the clock; false from when the time has come

}  // namespace undertow
