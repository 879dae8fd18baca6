// Handlers of everything that starts, completes, asks about or frees a request.
//
// With no entry in the table every call goes straight on. Otherwise the entries are looked up before the library's
// call; those that completed are finished after it. Where the user ignores statuses but a receive must know how much
// arrived, our own statuses are used.
#pragma once

#include "handlers_p2p.hh"

namespace undertow {

// An array that lies on the stack while it is small. Its elements are not initialised.
template <class T>
class Few {
 public:
  Few() {}
  ~Few() {
    if (at_ != few_) delete[] at_;
  }
  Few(const Few&) = delete;
  Few& operator=(const Few&) = delete;
  void resize(size_t n) {  // once
    if (n > kFew) at_ = new T[n];
    size_ = n;
  }
  size_t size() const { return size_; }
  T* data() { return at_; }
  T& operator[](size_t i) { return at_[i]; }

 private:
  static constexpr size_t kFew = 32;
  T few_[kFew];
  T* at_ = few_;
  size_t size_ = 0;
};

inline void prepare_start(MPI_Request request) {
  Entry* e = entry_of(request);
  if (!e) return;
  if (!e->receive) pack_slab(*e->record, e->count, e->user, e->slab);
  e->active = true;
  e->done = false;
}

template <class F>
int on_start(F next, Site site, MPI_Request* request) {
  count_call(site, false);
  if (any_entries() && request) prepare_start(*request);
  return next(request);
}

template <class F>
int on_startall(F next, Site site, int n, MPI_Request* requests) {
  count_call(site, false);
  if (any_entries() && requests)
    for (int i = 0; i < n; ++i) prepare_start(requests[i]);
  return next(n, requests);
}

template <class F>
int on_wait(F next, Site site, MPI_Request* request, MPI_Status* status) {
  poll_orphans();
  round_break();
  Entry* e = any_entries() && request ? claim(*request) : nullptr;
  count_call(site, e != nullptr);
  if (!e) return next(request, status);
  MPI_Status local;
  MPI_Status* st = ignored(status) ? &local : status;
  const int rc = next(request, st);
  rc == MPI_SUCCESS ? complete(e, st) : failed(e, *request);
  return rc;
}

template <class F>
int on_test(F next, Site site, MPI_Request* request, int* flag, MPI_Status* status) {
  poll_orphans();
  round_break();
  Entry* e = any_entries() && request && flag ? claim(*request) : nullptr;
  count_call(site, e != nullptr);
  if (!e) return next(request, flag, status);
  MPI_Status local;
  MPI_Status* st = ignored(status) ? &local : status;
  const int rc = next(request, flag, st);
  if (rc != MPI_SUCCESS)
    failed(e, *request);
  else
    *flag ? complete(e, st) : restore(e);
  return rc;
}

template <class F>
int on_request_get_status(F next, Site site, MPI_Request request, int* flag, MPI_Status* status) {
  Entry* e = any_entries() && flag ? entry_of(request) : nullptr;
  count_call(site, e != nullptr);
  if (!e || !e->receive) return next(request, flag, status);
  MPI_Status local;
  MPI_Status* st = ignored(status) ? &local : status;
  const int rc = next(request, flag, st);
  if (rc == MPI_SUCCESS && *flag) deliver(e, st);
  return rc;
}

template <class F>
int on_request_free(F next, Site site, MPI_Request* request) {
  Entry* e = any_entries() && request ? claim(*request) : nullptr;
  count_call(site, e != nullptr);
  if (!e) return next(request);
  if (!e->active) {  // an idle persistent request
    const int rc = next(request);
    rc == MPI_SUCCESS ? forget(e) : restore(e);
    return rc;
  }
  adopt_orphan(e);
  *request = constants.request_null;
  return MPI_SUCCESS;
}

// The entries behind an array of requests, claimed; those that a call did not settle are put back.
struct Batch {
  Few<Entry*> entries;
  Few<MPI_Status> own_statuses;
  MPI_Request* requests;
  bool any = false;

  Batch(int n, MPI_Request* users) : requests(users) {
    poll_orphans();
    if (!any_entries() || !requests || n <= 0) return;
    entries.resize(static_cast<size_t>(n));
    for (int i = 0; i < n; ++i) any |= (entries[i] = claim(requests[i])) != nullptr;
  }
  ~Batch() {
    for (size_t i = 0; i < entries.size(); ++i)
      if (entries[i]) restore(entries[i]);
  }
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;
  MPI_Status* statuses(MPI_Status* users) {
    if (!ignored(users)) return users;
    own_statuses.resize(entries.size());
    return own_statuses.data();
  }
  void settle(size_t i, MPI_Status* status, bool good) {
    if (i >= entries.size() || !entries[i]) return;
    good ? complete(entries[i], status) : failed(entries[i], requests[i]);
    entries[i] = nullptr;
  }
  // After an error. With MPI_ERR_IN_STATUS each of the `n` statuses says whether its request completed, failed or is
  // pending. Nothing else was set: what the library freed is gone, the rest stays.
  void settle_errors(int rc, int n, const int* indices, MPI_Status* st) {
    if (rc == MPI_ERR_IN_STATUS)
      for (int k = 0; k < n; ++k)
        if (st[k].MPI_ERROR != MPI_ERR_PENDING)
          settle(indices ? indices[k] : k, &st[k], st[k].MPI_ERROR == MPI_SUCCESS);
    for (size_t i = 0; i < entries.size(); ++i)
      if (entries[i] && handle_key(requests[i]) == handle_key(constants.request_null)) settle(i, nullptr, false);
  }
};

template <auto Next, Site site>
UNDERTOW_APART int waitall_asked(int n, MPI_Request* requests, MPI_Status* statuses) {
  const auto next = real.*Next;
  if (!this_round.reader.completes(n)) interrupt_script();
  RoundEnd end(n, requests);
  if (!any_entries() && !any_orphans()) {
    count_call(site, false);
    return end.done(next(n, requests, statuses));
  }
  Batch batch(n, requests);
  count_call(site, batch.any);
  if (!batch.any) return end.done(next(n, requests, statuses));
  MPI_Status* st = batch.statuses(statuses);
  const int rc = next(n, requests, st);
  DeviceGroup group;
  if (rc != MPI_SUCCESS) batch.settle_errors(rc, n, nullptr, st);
  else
    for (int i = 0; i < n; ++i) batch.settle(i, &st[i], true);
  group.finish();
  return end.done(rc);
}

template <auto Next, Site site>
UNDERTOW_IN_ENTRY int on_waitall(int n, MPI_Request* requests, MPI_Status* statuses) {
  if (any_entries() || any_orphans() || !this_round.reader.completes(n)) return waitall_asked<Next, site>(n, requests, statuses);
  count_loosely(sites[site].calls);
  return (real.*Next)(n, requests, statuses);
}

template <class F>
int on_testall(F next, Site site, int n, MPI_Request* requests, int* flag, MPI_Status* statuses) {
  round_break();
  Batch batch(n, requests);
  count_call(site, batch.any);
  if (!batch.any) return next(n, requests, flag, statuses);
  MPI_Status* st = batch.statuses(statuses);
  const int rc = next(n, requests, flag, st);
  DeviceGroup group;
  if (rc != MPI_SUCCESS) batch.settle_errors(rc, n, nullptr, st);
  else if (*flag)
    for (int i = 0; i < n; ++i) batch.settle(i, &st[i], true);
  group.finish();
  return rc;
}

// Waitany and Testany: `call` runs the library with an index, a flag and a status of ours: after an error the library
// may have written none of them.
template <class Call>
int any_of(Site site, int n, MPI_Request* requests, int* index, int* flag, MPI_Status* status, Call call) {
  round_break();
  Batch batch(n, requests);
  count_call(site, batch.any);
  if (!batch.any) return call(index, flag, status);
  MPI_Status local;
  MPI_Status* st = ignored(status) ? &local : status;
  int at = MPI_UNDEFINED, done = 0;
  const int rc = call(index ? &at : nullptr, flag ? &done : nullptr, st);
  const bool one = at >= 0 && at < n;  // MPI_UNDEFINED is negative in every MPI
  if (index && (one || rc == MPI_SUCCESS)) *index = at;
  if (flag && (done || rc == MPI_SUCCESS)) *flag = done;
  if (rc != MPI_SUCCESS)
    batch.settle_errors(rc, 0, nullptr, st);
  else if (one && (!flag || done))
    batch.settle(at, st, true);
  return rc;
}

template <class F>
int on_waitany(F next, Site site, int n, MPI_Request* requests, int* index, MPI_Status* status) {
  return any_of(site, n, requests, index, nullptr, status,
                [&](int* at, int*, MPI_Status* st) { return next(n, requests, at, st); });
}

template <class F>
int on_testany(F next, Site site, int n, MPI_Request* requests, int* index, int* flag, MPI_Status* status) {
  return any_of(site, n, requests, index, flag, status,
                [&](int* at, int* done, MPI_Status* st) { return next(n, requests, at, done, st); });
}

// Waitsome and Testsome; the count that the library leaves unset after an error is not read either.
template <class F>
int some_of(F next, Site site, int n, MPI_Request* requests, int* done, int* indices, MPI_Status* statuses) {
  round_break();
  Batch batch(n, requests);
  count_call(site, batch.any);
  if (!batch.any) return next(n, requests, done, indices, statuses);
  MPI_Status* st = batch.statuses(statuses);
  int count = MPI_UNDEFINED;
  const int rc = next(n, requests, done ? &count : nullptr, indices, st);
  const int completed = count == MPI_UNDEFINED ? 0 : count;
  if (done && (rc == MPI_SUCCESS || completed)) *done = count;
  DeviceGroup group;
  if (rc != MPI_SUCCESS)
    batch.settle_errors(rc, completed, indices, st);
  else
    for (int k = 0; k < completed; ++k) batch.settle(indices[k], &st[k], true);
  group.finish();
  return rc;
}

template <class F>
int on_waitsome(F next, Site site, int n, MPI_Request* requests, int* done, int* indices, MPI_Status* statuses) {
  return some_of(next, site, n, requests, done, indices, statuses);
}

template <class F>
int on_testsome(F next, Site site, int n, MPI_Request* requests, int* done, int* indices, MPI_Status* statuses) {
  return some_of(next, site, n, requests, done, indices, statuses);
}

}  // namespace undertow
