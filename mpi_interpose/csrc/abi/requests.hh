// Requests whose buffer is one of our slabs. The user holds the library's own request; this table remembers, by handle,
// what must happen when it completes: unpack a receive, free the slab.
//
// Completion is seen in every Wait and Test variant. The library may recycle a handle as soon as it has completed, and
// another thread may then hold the same handle, for a request of ours or not. So with MPI_THREAD_MULTIPLE an entry is
// taken out of the table before the library's call, and put back when the request did not complete. A request that the user frees while it is active becomes an orphan: we keep the library's
// request and poll it, because its slab (and a receive's data) must live until it completes.
#pragma once

#include <vector>

#include "transfer.hh"

namespace undertow {

struct Entry {
  MPI_Request request;
  Record* record = nullptr;  // held
  char* slab = nullptr;
  void* user = nullptr;
  int64_t count = 0;
  bool receive = false, persistent = false;
  bool active = true;   // a persistent request between Start and completion
  bool done = false;    // unpacked already (Request_get_status saw it complete)
  bool claimed = false; // out of the table while one thread asks the library about it
};

bool any_entries();                     // one atomic load: false on the pass-through path
extern bool threads_may_race;           // the program was granted MPI_THREAD_MULTIPLE
Entry* entry_of(MPI_Request request);   // for looking only
Entry* claim(MPI_Request request);      // for a call that may complete it: ends in complete, forget or restore
void restore(Entry* entry);             // did not complete
void enter(Entry* entry, MPI_Request request);
void complete(Entry* entry, MPI_Status* status);  // unpacks; removes and frees the entry unless it is persistent
void deliver(Entry* entry, MPI_Status* status);   // seen complete: a receive's data goes to the program, the entry stays
void forget(Entry* entry);              // frees without unpacking
void failed(Entry* entry, MPI_Request after);  // after an error: gone if the library freed the request, else kept
void adopt_orphan(Entry* entry);
void poll_orphans();
void finish_orphans();

inline bool ignored(const MPI_Status* s) {
  return s == MPI_STATUS_IGNORE || s == MPI_STATUSES_IGNORE || s == nullptr;
}

// After the library has started an operation on a side's slab: finish it if it is complete already, else enter it.
// Both MPIs hand out one shared request for sends that completed at once, so complete ones must not be keyed by handle.
template <class Side>
void attach(Side& side, int64_t count, void* user, bool receive, bool persistent, MPI_Request request) {
  if (!persistent) {
    MPI_Status status;
    int flag = 0;
    if (own.Request_get_status(request, &flag, &status) == MPI_SUCCESS && flag) {
      const int64_t n = receive ? received_bytes(&status) : 0;
      if (n > 0) unpack_slab(*side.record, count, side.slab, user, n);
      return;
    }
  }
  Entry* e = new Entry;
  e->record = side.record;
  hold(e->record);
  e->count = count;
  e->user = user;
  e->receive = receive;
  e->persistent = persistent;
  e->active = !persistent;
  e->slab = side.give();
  enter(e, request);
}

}  // namespace undertow
