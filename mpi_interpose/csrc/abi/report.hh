// What happened: calls per function, and per datatype the calls, bytes and times; written at MPI_Finalize.
//
// Every rank writes its own file and no message is sent: a rank that runs without the preload must not be waited for.
// `undertow mpi run --report` merges the files. The time saved is modelled, not measured: every call that was taken counts
// what the table says of its type and size.
#pragma once

#include <atomic>
#include <cstdint>

#include "types.hh"

namespace undertow {

struct SiteTally {
  std::atomic<int64_t> calls{0}, taken{0};
};
extern SiteTally sites[kSites] UNDERTOW_HIDDEN;

void report_refused(const char* why);       // a datatype was not understood
void report_retired(Record& record);        // a datatype died: keep its counts
void report_mismatch(const Record& record, const char* what, int64_t at);  // check mode found a difference
void report_write(int rank, int size);

}  // namespace undertow
