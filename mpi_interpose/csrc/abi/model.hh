// Which path for this call: the measured table, and for local calls a running comparison.
//
// Pass-through is the default. The table holds, for each use (pack, unpack, send, recv), class of plan, block size and
// message size, the ratio library time / our time measured on this MPI; a path is taken only where the ratio exceeds
// kGain. MPI_Pack and MPI_Unpack are also sampled while the program runs (one call in 64 of each path is timed), and
// the samples of a type replace the table once there are enough; a send's time depends on its peer and is not sampled.
#pragma once

#include "types.hh"

namespace undertow {

constexpr double kGain = 1.15;

// Rows "use class log2(block) log2(bytes) library_ns ours_ns", '#' starts a comment. Returns the number of rows used.
int model_load(const char* text);
void model_init();  // UNDERTOW_MPI_MODEL, else model.txt beside this library, else the built-in table of the flavour
double model_ratio(Use use, const Plan& plan, int64_t bytes);  // 0 when nothing is known

int64_t now_ns();

// For pack and unpack in auto mode: what to do with this call, and whether to time it.
struct Choice {
  bool ours, timed;
};
Choice choose_local(Record& record, Use use, int64_t bytes);
void observe(Record& record, Use use, bool ours, int64_t bytes, int64_t ns);

// For messages; counts the decision. Collectives ask for more gain, because the table is measured on two ranks.
bool wanted(Record* record, Use use, int64_t count, double gain = kGain);
constexpr double kCollectiveGain = 1.5;

}  // namespace undertow
