// See requests.hh.
#include "requests.hh"

#include <mutex>
#include <unordered_map>

namespace undertow {
namespace {

constexpr size_t kShards = 16;

struct Shard {
  std::mutex lock;
  std::unordered_map<uintptr_t, Entry*> entries;
};

Shard* shards() {
  static Shard* all = new Shard[kShards];  // never destroyed: threads may outlive main
  return all;
}
Shard& shard_of(uintptr_t key) { return shards()[(key * 0x9e3779b97f4a7c15ull) >> 60]; }

std::atomic<int64_t> g_live{0};
std::mutex g_orphan_lock;
std::vector<Entry*>* g_orphans = new std::vector<Entry*>;
std::atomic<int64_t> g_orphan_count{0};

void destroy(Entry* e) {
  slab_put(e->slab);
  release(e->record);
  delete e;
}

void take_out(Entry* e) {
  Shard& s = shard_of(handle_key(e->request));
  std::lock_guard<std::mutex> guard(s.lock);
  const auto found = s.entries.find(handle_key(e->request));
  if (found != s.entries.end() && found->second == e) s.entries.erase(found);
}

void put_in(Entry* e) {
  Shard& s = shard_of(handle_key(e->request));
  std::lock_guard<std::mutex> guard(s.lock);
  s.entries[handle_key(e->request)] = e;
}

void remove(Entry* e) {
  if (!e->claimed) take_out(e);
  e->claimed = false;
  g_live.fetch_sub(1, std::memory_order_relaxed);
}

void unpack_entry(Entry* e, MPI_Status* status) {
  if (!e->receive || e->done) return;
  const int64_t n = received_bytes(status);
  if (n > 0) unpack_slab(*e->record, e->count, e->slab, e->user, n);
  e->done = true;
}

}  // namespace

bool threads_may_race = false;

bool any_entries() { return g_live.load(std::memory_order_relaxed) != 0; }

Entry* entry_of(MPI_Request request) {
  Shard& s = shard_of(handle_key(request));
  std::lock_guard<std::mutex> guard(s.lock);
  const auto found = s.entries.find(handle_key(request));
  return found == s.entries.end() ? nullptr : found->second;
}

Entry* claim(MPI_Request request) {
  Entry* e = entry_of(request);
  if (e && threads_may_race) {
    take_out(e);
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
  g_live.fetch_add(1, std::memory_order_relaxed);
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
  g_orphan_count.fetch_add(1);
}

namespace {

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
    g_orphan_count.fetch_sub(1);
  }
  inside = false;
}

}  // namespace

void poll_orphans() {
  if (g_orphan_count.load(std::memory_order_relaxed)) drain_orphans(false);
}

void finish_orphans() {
  if (g_orphan_count.load()) drain_orphans(true);
}

}  // namespace undertow
