// Which path for this call: the measured table (core/policy.hh), and for local calls a running comparison.
//
// Pass-through is the default: a path is taken only where the table, measured on this MPI, shows a gain of kGain. A
// record keeps the answer per use and size, so a call costs one load. MPI_Pack and MPI_Unpack are also timed while the
// program runs; after three samples of either path these decide, and sampling becomes rarer as long as they agree. A
// message's time is its peer's too and is not sampled: for messages the table decides alone, with rows for peers on the
// same host and on another one. A job on several hosts takes what wins for both.
#pragma once

#include "types.hh"

namespace undertow {

constexpr double kGain = 1.08;            // to take a path
constexpr double kSampledGain = 1.12, kStay = 1.03;  // the same by samples: to begin, to go on
constexpr double kCollectiveGain = 1.5;   // the table is measured on two ranks
constexpr int64_t kLargestCopy = 1 << 30; // a message's slab; larger ones would double the program's memory

void model_init();  // UNDERTOW_MPI_MODEL, else model.txt beside this library, else the built-in table of the flavour
double model_ratio(Record& record, Use use, int64_t bytes);  // time without us / with us; negative: unknown

int64_t now_ns();

// For pack and unpack in auto mode: what to do with this call, and whether to time it.
struct Choice {
  bool ours, timed;
};
Choice choose_local(Record& record, Use use, int64_t bytes);
void observe(Record& record, Use use, bool ours, int64_t bytes, int64_t ns);

bool small_enough(int64_t bytes);  // for a slab; the report tells of messages that are not

// For messages; counts the decision. Collectives ask for more gain.
bool wanted(Record* record, Use use, int64_t count, double gain = kGain);

}  // namespace undertow
