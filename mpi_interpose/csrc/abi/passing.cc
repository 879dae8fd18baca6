// See passing.hh.
#include "passing.hh"

#include <mutex>

namespace undertow {

Passing passing[kPassing];
std::atomic<uint64_t> passing_age{0};
bool threads_may_race = false;

namespace {

std::mutex g_lock;  // for who owns a slot; its mark and count are read and counted without

void settle(Passing& p) {
  const int64_t calls = p.calls.exchange(0, std::memory_order_relaxed);
  if (p.tally) p.tally->passed.fetch_add(calls, std::memory_order_relaxed);
}

}  // namespace

void will_pass(uint64_t print, Use use, Record* record, uint64_t age) {
  Passing& p = passing[print % kPassing];
  std::lock_guard<std::mutex> guard(g_lock);
  if (age != passing_age.load(std::memory_order_relaxed)) return;
  settle(p);
  p.tally = record ? &record->tally[use] : nullptr;
  p.record = record;
  if (record) record->passing.fetch_or(1ull << (print % kPassing / (kPassing / 64)), std::memory_order_relaxed);
  p.mark.store(print ^ age, std::memory_order_relaxed);
}

void passing_changed() {
  std::lock_guard<std::mutex> guard(g_lock);
  passing_age.fetch_add(0x9e3779b97f4a7c15ull, std::memory_order_relaxed);
}

void passing_retired(Record& record) {
  if (!record.passing.load(std::memory_order_relaxed)) return;
  std::lock_guard<std::mutex> guard(g_lock);
  for (uint64_t groups = record.passing.exchange(0, std::memory_order_relaxed); groups; groups &= groups - 1) {
    Passing* const first = passing + __builtin_ctzll(groups) * (kPassing / 64);
    for (Passing* p = first; p < first + kPassing / 64; ++p) {
      if (p->record != &record) continue;
      settle(*p);
      p->mark.store(0, std::memory_order_relaxed);
      p->record = nullptr;
      p->tally = nullptr;
    }
  }
}

void passing_count() {
  std::lock_guard<std::mutex> guard(g_lock);
  for (Passing& p : passing) settle(p);
}

}  // namespace undertow
