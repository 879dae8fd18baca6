// MPI_Request_get_status_all, _any and _some (MPI 4.1): they say that requests are complete and leave them be, so a
// receive's data must be the program's when they return. An MPI that lacks them is asked for each request by itself.
#pragma once

#include "handlers_requests.hh"

extern "C" {
extern void* undertow_next[];
extern void* const undertow_absents[];
}

namespace undertow {

inline bool absent(Site site) { return undertow_next[site] == undertow_absents[site]; }

// The requests of one such call: whether a receive of ours is among them, and room for what their statuses say.
struct Asked {
  int n;
  MPI_Request* requests;
  Few<MPI_Status> own_statuses;
  bool any = false;

  Asked(Site site, int count, MPI_Request* users) : n(count), requests(users) {
    if (any_entries() && requests)
      for (int i = 0; i < n && !any; ++i) any = entry_of(requests[i]) != nullptr;
    count_call(site, any);
  }
  MPI_Status* statuses(MPI_Status* users) {
    if (!ignored(users)) return users;
    own_statuses.resize(static_cast<size_t>(n > 0 ? n : 1));
    return own_statuses.data();
  }
  bool null(int i) const { return handle_key(requests[i]) == handle_key(constants.request_null); }
  void delivered(int i, MPI_Status* status) {
    if (i < 0 || i >= n) return;
    Entry* e = entry_of(requests[i]);
    if (e && e->receive) deliver(e, status);
  }
};

template <class F>
int on_request_get_status_all(F next, Site site, int n, MPI_Request* requests, int* flag, MPI_Status* statuses) {
  Asked asked(site, n, requests);
  if (!asked.any && !absent(site)) return next(n, requests, flag, statuses);
  MPI_Status* st = asked.statuses(statuses);
  int rc = MPI_SUCCESS;
  if (!absent(site)) {
    rc = next(n, requests, flag, st);
  } else {
    *flag = 1;
    for (int i = 0; i < n && *flag && rc == MPI_SUCCESS; ++i) rc = own.Request_get_status(requests[i], flag, &st[i]);
  }
  if (rc == MPI_SUCCESS && *flag)
    for (int i = 0; i < n; ++i) asked.delivered(i, &st[i]);
  return rc;
}

template <class F>
int on_request_get_status_any(F next, Site site, int n, MPI_Request* requests, int* index, int* flag,
                              MPI_Status* status) {
  Asked asked(site, n, requests);
  if (!asked.any && !absent(site)) return next(n, requests, index, flag, status);
  MPI_Status* st = asked.statuses(status);
  int rc = MPI_SUCCESS;
  if (!absent(site)) {
    rc = next(n, requests, index, flag, st);
  } else {
    bool active = false;
    *index = MPI_UNDEFINED, *flag = 0;
    for (int i = 0; i < n && !*flag && rc == MPI_SUCCESS; ++i) {
      if (asked.null(i)) continue;
      active = true;
      rc = own.Request_get_status(requests[i], flag, st);
      if (*flag) *index = i;
    }
    if (!active) {  // nothing to wait for: true, with an empty status
      *flag = 1;
      MPI_Request none = constants.request_null;
      rc = own.Test(&none, flag, st);
    }
  }
  if (rc == MPI_SUCCESS && *flag) asked.delivered(*index, st);
  return rc;
}

template <class F>
int on_request_get_status_some(F next, Site site, int n, MPI_Request* requests, int* done, int* indices,
                               MPI_Status* statuses) {
  Asked asked(site, n, requests);
  if (!asked.any && !absent(site)) return next(n, requests, done, indices, statuses);
  MPI_Status* st = asked.statuses(statuses);
  int rc = MPI_SUCCESS;
  if (!absent(site)) {
    rc = next(n, requests, done, indices, st);
  } else {
    bool active = false;
    *done = 0;
    for (int i = 0; i < n && rc == MPI_SUCCESS; ++i) {
      if (asked.null(i)) continue;
      active = true;
      int flag = 0;
      rc = own.Request_get_status(requests[i], &flag, &st[*done]);
      if (rc == MPI_SUCCESS && flag) indices[(*done)++] = i;
    }
    if (!active) *done = MPI_UNDEFINED;
  }
  if (rc == MPI_SUCCESS && *done != MPI_UNDEFINED)
    for (int k = 0; k < *done; ++k) asked.delivered(indices[k], &st[k]);
  return rc;
}

}  // namespace undertow
