// See requests.hh.
#include "requests.hh"

#include <algorithm>

#include "maybe_lock.hh"

namespace undertow {
namespace {

constexpr size_t kShards = 16;

struct Shard {
  std::mutex lock;
  std::vector<Entry*> buckets = std::vector<Entry*>(64);
  size_t entries = 0;

  Entry*& bucket(uintptr_t key) { return buckets[(key * 0x9e3779b97f4a7c15ull) >> 20 & (buckets.size() - 1)]; }
  void put(Entry* e) {
    if (entries++ == 2 * buckets.size()) grow();
    Entry*& first = bucket(handle_key(e->request));
    e->next = first;
    first = e;
  }
  void grow() {
    std::vector<Entry*> old(2 * buckets.size());
    old.swap(buckets);
    for (Entry* e : old)
      while (e) {
        Entry* const next = e->next;
        Entry*& first = bucket(handle_key(e->request));
        e->next = first;
        first = e;
        e = next;
      }
  }
  Entry* find(uintptr_t key) {
    Entry* e = bucket(key);
    while (e && handle_key(e->request) != key) e = e->next;
    return e;
  }
  void remove(Entry* e) {
    for (Entry** at = &bucket(handle_key(e->request)); *at; at = &(*at)->next)
      if (*at == e) {
        *at = e->next;
        --entries;
        return;
      }
  }
};

Shard* shards() {
  static Shard* all = new Shard[kShards];  // never destroyed: threads may outlive main
  return all;
}
Shard& shard_of(uintptr_t key) { return shards()[(key * 0x9e3779b97f4a7c15ull) >> 60]; }

std::mutex g_orphan_lock;
std::vector<Entry*>* g_orphans = new std::vector<Entry*>;

void destroy(Entry* e) {
  if (e->slab) slab_put(e->slab);
  if (e->record) release(e->record);
  delete e->later;
  delete e;
}

void put_in(Entry* e) {
  Shard& s = shard_of(handle_key(e->request));
  MaybeLock guard(s.lock);
  s.put(e);
}

void remove(Entry* e) {
  if (!e->claimed) {
    Shard& s = shard_of(handle_key(e->request));
    MaybeLock guard(s.lock);
    s.remove(e);
  }
  e->claimed = false;
  add(hot.entries, -1);
}

void unpack_entry(Entry* e, MPI_Status* status) {
  if (!e->receive || e->done) return;
  e->done = true;
  if (e->later) return e->later->finish();
  const int64_t n = received_bytes(status);
  if (n > 0) unpack_slab(*e->record, e->count, e->slab, e->user, n);
}

}  // namespace

uintptr_t complete_request = 0;

void requests_init() {
#if defined(OPEN_MPI) && !defined(UNDERTOW_ABI)
  complete_request = reinterpret_cast<uintptr_t>(find_data("ompi_request_empty"));
#endif
}

Entry* entry_of(MPI_Request request) {
  Shard& s = shard_of(handle_key(request));
  MaybeLock guard(s.lock);
  return s.find(handle_key(request));
}

Entry* claim(MPI_Request request) {
  Shard& s = shard_of(handle_key(request));
  MaybeLock guard(s.lock);
  Entry* e = s.find(handle_key(request));
  if (e) {
    s.remove(e);
    e->claimed = true;
  }
  return e;
}

void restore(Entry* e) {
  if (!e->claimed) return;
  e->claimed = false;
  put_in(e);
}

void enter(Entry* e, MPI_Request request) {
  e->request = request;
  put_in(e);
  add(hot.entries, 1);
}

void deliver(Entry* e, MPI_Status* status) {
  if (e->active) unpack_entry(e, status);  // once: the Wait that follows must not write again
}

void complete(Entry* e, MPI_Status* status) {
  deliver(e, status);
  if (e->persistent) {
    e->active = false;
    restore(e);
    return;
  }
  remove(e);
  destroy(e);
}

void forget(Entry* e) {
  remove(e);
  destroy(e);
}

void failed(Entry* e, MPI_Request after) {
  handle_key(after) == handle_key(constants.request_null) ? forget(e) : restore(e);
}

void adopt_orphan(Entry* e) {
  remove(e);
  std::lock_guard<std::mutex> guard(g_orphan_lock);
  g_orphans->push_back(e);
  hot.orphans.fetch_add(1);
  passing_changed();  // until the last one is gone no call passes without polling them
}

void drain_orphans(bool wait) {
  // The library may call the program's error handler, and that may come here again: then somebody is polling already.
  static thread_local bool inside = false;
  if (inside) return;
  inside = true;
  std::lock_guard<std::mutex> guard(g_orphan_lock);
  for (size_t i = 0; i < g_orphans->size();) {
    Entry* e = (*g_orphans)[i];
    MPI_Status status;
    int flag = 1;
    const int rc = wait ? own.Wait(&e->request, &status) : own.Test(&e->request, &flag, &status);
    if (rc == MPI_SUCCESS && !flag) {
      ++i;
      continue;
    }
    if (rc == MPI_SUCCESS) unpack_entry(e, &status);
    // A persistent request is not freed by its completion; the user's Request_free is carried out now.
    if (e->persistent) own.Request_free(&e->request);
    destroy(e);
    (*g_orphans)[i] = g_orphans->back();
    g_orphans->pop_back();
    hot.orphans.fetch_sub(1);
  }
  inside = false;
}

void finish_orphans() {
  if (hot.orphans.load()) drain_orphans(true);
}

}  // namespace undertow
